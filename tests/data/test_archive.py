"""The real Kaggle client, unmodified, against Kaggle on loopback; and what local archives may be."""

import base64
import json
import logging
import os
import shutil
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

import pytest
import trustme

from deepfake_core.config import KAGGLE_SOURCES, Source
from deepfake_core.data.archive import verify_zip
from deepfake_core.data.download import CHUNK  # is written whole, so a download resumes at the last one
from deepfake_core.data.kaggle import fetch_archive, find_new_version
from deepfake_core.data.kaggle_errors import MAX_WAITS
from deepfake_core.errors import (
    ArchiveError,
    ConfigurationError,
    CredentialsError,
    DiskError,
    DownloadError,
    PermanentError,
    SourceError,
    TransientError,
)
from deepfake_core.redaction import redact_logs
from deepfake_core.storage.files import hash_file
from deepfake_core.storage.store import open_store
from tests.builders import faces, free_port, jpeg, write_zip

SOURCE = Source(name="owner/some-faces")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A zip of a few megabytes, so that a download takes more than one chunk."""
    noise = {f"real/noise{i}.bin": os.urandom(1_000_000) for i in range(3)}
    return write_zip(tmp_path_factory.mktemp("content") / "a.zip", faces(5) | noise).read_bytes()


@pytest.fixture
def kaggle(kaggle, content):
    kaggle.add(SOURCE.name, content)
    return kaggle


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


def files(data_dir):
    """Return the files of the data folder but for what is remembered of its zips."""
    found = [file for file in data_dir.rglob("*") if file.is_file() and not file.match("indexes/zip-*.json")]
    return sorted(str(file.relative_to(data_dir)) for file in found)


@pytest.mark.slow
def test_download_is_verified_and_its_provenance_recorded(kaggle, data_dir, content):
    seen = []
    fetched = fetch_archive(SOURCE, open_store(data_dir), lambda done, total: seen.append((done, total)))
    assert fetched.path.read_bytes() == content
    assert (fetched.version, fetched.licence, fetched.bytes) == (1, "CC0-1.0", len(content))
    assert files(data_dir) == ["archives/owner/some-faces/1.json", "archives/owner/some-faces/1.zip"]
    assert seen[-1] == (len(content), len(content))
    assert len(kaggle.downloads) == 1


@pytest.mark.slow
def test_a_version_that_is_here_is_not_downloaded_again_and_a_new_one_is(kaggle, data_dir, content):
    first = fetch_archive(SOURCE, open_store(data_dir))
    assert fetch_archive(SOURCE, open_store(data_dir)) == first
    assert len(kaggle.downloads) == 1
    kaggle.add(SOURCE.name, content + b"", version=2)
    assert fetch_archive(SOURCE, open_store(data_dir)).version == 2
    assert len(kaggle.downloads) == 2
    assert first.path.exists()  # nothing lost


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [None, 1])
@pytest.mark.parametrize("change", ["half", "one byte", "another zip"])
def test_a_download_that_changed_on_this_disk_is_fetched_again(kaggle, data_dir, content, tmp_path, change, pinned):
    source = SOURCE.model_copy(update={"version": pinned})
    first = fetch_archive(source, open_store(data_dir))
    other = {
        "half": content[: len(content) // 2],
        "one byte": content[:-200_000] + bytes([content[-200_000] ^ 1]) + content[-199_999:],
        "another zip": write_zip(tmp_path / "other.zip", faces(5, start=50)).read_bytes(),
    }
    first.path.write_bytes(other[change])
    assert (find_new_version(source, open_store(data_dir)) is None) == bool(pinned)
    again = fetch_archive(source, open_store(data_dir))
    assert again.path.read_bytes() == content
    assert again.sha256 == first.sha256
    asked = len(kaggle.downloads)
    assert fetch_archive(source, open_store(data_dir)) == again
    assert len(kaggle.downloads) == asked


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [None, 1])
@pytest.mark.parametrize(
    "change", [lambda text: text[:40], lambda _: "[]", lambda _: "[" * 100_000, lambda text: text.replace("1,", '"1",')]
)
def test_a_provenance_that_cannot_be_read_counts_as_none(kaggle, data_dir, content, change, pinned):
    source = SOURCE.model_copy(update={"version": pinned})
    provenance = fetch_archive(source, open_store(data_dir)).path.with_suffix(".json")
    provenance.write_text(change(provenance.read_text()))
    again = fetch_archive(source, open_store(data_dir))
    assert again.path.read_bytes() == content
    assert (again.version, again.bytes) == (1, len(content))
    asked = len(kaggle.downloads)
    assert fetch_archive(source, open_store(data_dir)) == again
    assert len(kaggle.downloads) == asked


def test_a_pinned_version_that_is_here_needs_no_network(kaggle, data_dir, content):
    kaggle.add(SOURCE.name, content, version=2)
    pinned = SOURCE.model_copy(update={"version": 1})
    assert fetch_archive(pinned, open_store(data_dir)).version == 1
    asked = len(kaggle.requests)
    assert fetch_archive(pinned, open_store(data_dir)).version == 1
    assert len(kaggle.requests) == asked


@pytest.mark.slow
def test_a_connection_cut_half_way_is_resumed(kaggle, data_dir, content):
    kaggle.cuts = [len(content) // 2]
    fetched = fetch_archive(SOURCE, open_store(data_dir))
    assert fetched.path.read_bytes() == content
    assert [asked for _, asked in kaggle.downloads] == ["", f"bytes={len(content) // 2 // CHUNK * CHUNK}-"]


@pytest.mark.slow
def test_a_download_that_failed_goes_on_where_it_stopped(kaggle, data_dir, content):
    kaggle.cuts = [1_500_000, 1000]
    with pytest.raises(DownloadError, match="the download continues from there") as caught:
        fetch_archive(SOURCE, open_store(data_dir))
    assert isinstance(caught.value, TransientError)
    assert files(data_dir) == [
        "archives/owner/some-faces/1.zip.partial",
        "archives/owner/some-faces/1.zip.partial.etag",
    ]
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content
    assert kaggle.downloads[-1][1] == f"bytes={1_500_000 // CHUNK * CHUNK}-"
    assert files(data_dir) == ["archives/owner/some-faces/1.json", "archives/owner/some-faces/1.zip"]


@pytest.mark.slow
def test_connections_that_are_cut_early_make_progress(kaggle, data_dir, content):
    kaggle.cuts = [600_000, 20_000, 600_000, 400_000, 900_000]
    for _ in range(2):
        with pytest.raises(DownloadError, match="the download continues from there"):
            fetch_archive(SOURCE, open_store(data_dir))
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content
    asked = [int(span[6:-1]) for _, span in kaggle.downloads if span]
    assert asked == sorted(set(asked))


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_an_error_instead_of_the_rest_keeps_what_came(kaggle, data_dir, content, status):
    start = 2_500_000 // CHUNK * CHUNK
    kaggle.cuts = [2_500_000]
    kaggle.storage_statuses = [0, status, status]
    partial = data_dir / "archives" / "owner" / "some-faces" / "1.zip.partial"
    for _ in range(2):  # while it is resumed at once, and at the next call's start
        with pytest.raises(DownloadError, match=rf"storage answered {status} .*what has arrived is kept"):
            fetch_archive(SOURCE, open_store(data_dir))
        assert partial.read_bytes() == content[:start]
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content
    assert kaggle.downloads[-1][1] == f"bytes={start}-"


HTML = (200, {"Content-Type": "text/html"}, b"<html>Log in</html>")
FOREIGN = {
    "a page": [HTML],
    "a login": [(302, {"Location": "https://storage.googleapis.com/login"}, b""), HTML],
    "nothing": [(204, {}, b"")],
    "another start": [(206, {"Content-Range": "bytes 0-8/3000000"}, b"from zero")],
    "no range": [(206, {}, b"some bytes")],
    "a part of the rest": [(206, {"Content-Range": "bytes {start}-{start}/3000000"}, b"x")],
    "another object": [(200, {"ETag": '"other"'}, b"{content}")],
}
"""What a proxy may answer to a request for the rest."""


@pytest.mark.slow
@pytest.mark.parametrize("way", FOREIGN)
def test_a_foreign_answer_instead_of_the_rest_keeps_what_came(kaggle, data_dir, content, way):
    start = 2_500_000 // CHUNK * CHUNK
    kaggle.answers = [None]
    for status, headers, body in FOREIGN[way]:
        told = {name: value.replace("{start}", str(start)) for name, value in headers.items()}
        kaggle.answers.append((status, told, content if body == b"{content}" else body))
    kaggle.answers = [*kaggle.answers * 2, HTML]
    kaggle.cuts = [2_500_000]
    partial = data_dir / "archives" / "owner" / "some-faces" / "1.zip.partial"
    for _ in range(3):  # while it is resumed at once, by the next call, and before the next asks for the rest
        with pytest.raises(DownloadError, match=r"must be its rest. Received for owner/some-faces: status 20.*is kept"):
            fetch_archive(SOURCE, open_store(data_dir))
        assert partial.read_bytes() == content[:start]
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content
    assert kaggle.downloads[-1][1] == f"bytes={start}-"


@pytest.mark.slow
def test_the_whole_object_instead_of_the_rest_is_taken(kaggle, data_dir, content):
    kaggle.cuts = [2_500_000, 0]
    with pytest.raises(DownloadError, match="the download continues from there"):
        fetch_archive(SOURCE, open_store(data_dir))
    etag = (data_dir / "archives" / "owner" / "some-faces" / "1.zip.partial.etag").read_text()
    kaggle.answers = [None, (200, {"ETag": etag}, content)]
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("place", ["statuses", "storage_statuses"])
@pytest.mark.parametrize("status", [429, 503])
def test_kaggle_is_asked_again_after_the_time_it_asks_for(kaggle, data_dir, content, place, status):
    setattr(kaggle, place, [status])
    kaggle.retry_after = "1"
    start = time.monotonic()
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(("asked", "shown"), [("7200", "in 120 minutes, as it asks"), ("soon", "later")])
def test_a_time_that_is_too_long_or_no_time_is_not_waited_for(kaggle, data_dir, asked, shown):
    kaggle.statuses = [503]
    kaggle.retry_after = asked
    with pytest.raises(DownloadError, match=rf"answered 503.*Run again {shown}"):
        fetch_archive(SOURCE, open_store(data_dir))


def test_kaggle_is_not_waited_for_without_end(kaggle, data_dir):
    kaggle.statuses = [429] * 10
    kaggle.retry_after = "0"
    with pytest.raises(DownloadError, match="answered 429"):
        fetch_archive(SOURCE, open_store(data_dir))
    assert len(kaggle.statuses) == 10 - 1 - MAX_WAITS


def test_three_sources_are_downloaded_from_three_threads(kaggle, data_dir, content):
    from concurrent.futures import ThreadPoolExecutor

    for source in KAGGLE_SOURCES:
        kaggle.add(source.name, content)
    with ThreadPoolExecutor(3) as pool:
        fetched = list(pool.map(lambda source: fetch_archive(source, open_store(data_dir)), KAGGLE_SOURCES))
    assert [one.path.read_bytes() == content for one in fetched] == [True, True, True]
    assert len({one.path for one in fetched}) == 3


def test_no_credentials(kaggle, data_dir, monkeypatch):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(CredentialsError, match=r"none were found.*KAGGLE_API_TOKEN.*make demo"):
        fetch_archive(SOURCE, open_store(data_dir))
    assert kaggle.requests == []


@pytest.mark.usefixtures("kaggle")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KAGGLE_API_TOKEN": "KGAT_wrong"}, "the token in KAGGLE_API_TOKEN is refused"),
        ({"KAGGLE_USERNAME": "tester", "KAGGLE_KEY": "KGAT_wrong"}, r"refused the credentials \(401\)"),
    ],
)
def test_wrong_credentials(data_dir, monkeypatch, variables, message):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CredentialsError, match=rf"{message}.*kaggle.com/settings") as caught:
        fetch_archive(SOURCE, open_store(data_dir))
    assert "KGAT_wrong" not in str(caught.value)
    assert not data_dir.exists()


KEY = "0123456789abcdef5ecre7"
BROKEN: dict[str, tuple[type[Exception], str, dict[str, str], dict[str, Any]]] = {
    "typographic quotes": (
        CredentialsError,
        "number 1 is LEFT DOUBLE QUOTATION MARK",
        {"KAGGLE_API_TOKEN": f"“{KEY}”"},
        {},
    ),
    "not ASCII": (CredentialsError, "number 23 is LATIN SMALL LETTER", {"KAGGLE_API_TOKEN": f"{KEY}é"}, {}),
    "a line end inside": (CredentialsError, "number 23 is U", {"KAGGLE_API_TOKEN": f"{KEY}\r\n{KEY}"}, {}),
    "pasted JSON": (CredentialsError, "number 1 is LEFT CURLY", {"KAGGLE_API_TOKEN": f'{{"key":"{KEY}"}}'}, {}),
    "too long": (CredentialsError, "330 characters", {"KAGGLE_API_TOKEN": KEY * 15}, {}),
    "wrong token": (CredentialsError, "is refused", {"KAGGLE_API_TOKEN": KEY}, {}),
    "wrong key": (CredentialsError, r"\(401\)", {"KAGGLE_USERNAME": "tester", "KAGGLE_KEY": KEY}, {}),
    "key in quotes": (CredentialsError, "KAGGLE_KEY", {"KAGGLE_USERNAME": "tester", "KAGGLE_KEY": f"'{KEY}'"}, {}),
    "storage can't be reached": (DownloadError, "connection to Kaggle failed", {}, {"storage": "storage.invalid"}),
    "storage refuses": (DownloadError, "storage answered 403", {}, {"storage_statuses": [403]}),
    "storage cuts twice": (DownloadError, "connection to Kaggle failed", {}, {"cuts": [1_500_000, 1000]}),
    "Kaggle fails": (DownloadError, "answered 500", {}, {"statuses": [500]}),
}
"""The error, words of its message, variables to set and attributes of the server, by what is broken."""


@pytest.mark.parametrize("way", BROKEN)
def test_no_secret_is_in_what_a_failure_leaves(kaggle, data_dir, monkeypatch, caplog, capfd, way):
    """Neither in the message, its causes, the log at its most talkative, the output, nor a file."""
    error, words, variables, attributes = BROKEN[way]
    if variables:
        monkeypatch.delenv("KAGGLE_API_TOKEN")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, value in attributes.items():
        setattr(kaggle, name, value)
    check_that_nothing_is_told(kaggle, data_dir, error, words, caplog, capfd)


FILES = {
    "damaged": ("kaggle.json", f'{{"username": "tester", "key": "{KEY}"', "must hold .*damaged file"),
    "a list": ("kaggle.json", f'["{KEY}"]', "must hold .*damaged file"),
    "no user name": ("kaggle.json", f'{{"key": "{KEY}"}}', "must hold .*damaged file"),
    "a key with quotes": ("kaggle.json", f'{{"username": "tester", "key": "“{KEY}"}}', "`key` in .*DOUBLE QUOTATION"),
    "a token with quotes": (".kaggle/access_token", f"“{KEY}”", "access_token: 24 characters, of which number 1"),
    "PowerShell's encoding": (".kaggle/access_token", KEY.encode("utf-16"), "must be ASCII text"),
}


@pytest.mark.parametrize("way", FILES)
def test_no_secret_of_a_damaged_file_is_told(kaggle, data_dir, monkeypatch, caplog, capfd, way):
    from kaggle.api.kaggle_api_extended import KaggleApi

    name, content, words = FILES[way]
    monkeypatch.setattr(KaggleApi, "config", str(kaggle.folder / "kaggle.json"))  # else read once, on import
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    file = kaggle.folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_that_nothing_is_told(kaggle, data_dir, CredentialsError, words, caplog, capfd)


def check_that_nothing_is_told(kaggle, data_dir, error, words, caplog, capfd) -> None:
    before = logging.getLogRecordFactory()
    redact_logs()
    try:
        with caplog.at_level(logging.DEBUG), pytest.raises(error, match=words) as caught:
            fetch_archive(SOURCE, open_store(data_dir))
        logging.getLogger("deepfake_core").error("failed", exc_info=caught.value)
    finally:
        logging.setLogRecordFactory(before)
    assert caught.value.__cause__ is None
    told = ["".join(traceback.format_exception(caught.value)), caplog.text, *capfd.readouterr()]
    told += [(data_dir / file).read_text(errors="replace") for file in files(data_dir)]
    assert "failed" in caplog.text
    for secret in (kaggle.token, kaggle.signature, KEY):
        for form in (secret, base64.b64encode(f"tester:{secret}".encode()).decode()):
            assert not [text for text in told if form in text], form


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t"])
def test_white_space_around_credentials_does_not_count(kaggle, data_dir, content, monkeypatch, end):
    monkeypatch.setenv("KAGGLE_API_TOKEN", f" {kaggle.token}{end}")
    assert fetch_archive(SOURCE, open_store(data_dir / "by token")).path.read_bytes() == content
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_USERNAME", f"tester{end}")
    monkeypatch.setenv("KAGGLE_KEY", f"{kaggle.token}{end}")
    assert fetch_archive(SOURCE, open_store(data_dir / "by key")).path.read_bytes() == content
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setattr(KaggleApi, "config", str(kaggle.folder / "kaggle.json"))  # else read once, on import
    (kaggle.folder / "kaggle.json").write_text(json.dumps({"username": "tester", "key": f"{kaggle.token}{end}"}))
    assert fetch_archive(SOURCE, open_store(data_dir / "by file")).path.read_bytes() == content


def test_user_name_and_key_work_too(kaggle, data_dir, content, monkeypatch):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_USERNAME", "tester")
    monkeypatch.setenv("KAGGLE_KEY", kaggle.token)
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content


@pytest.mark.parametrize("source", [Source(name="owner/no-faces"), Source(name=SOURCE.name, version=9)])
@pytest.mark.usefixtures("kaggle")
def test_unknown_data_set(data_dir, source):
    with pytest.raises(SourceError, match=rf"{source.name}.*\(404\)"):
        fetch_archive(source, open_store(data_dir))


@pytest.mark.parametrize(
    ("status", "error"), [(403, SourceError), (429, DownloadError), (500, DownloadError), (503, DownloadError)]
)
def test_refusals_and_failures_of_the_server(kaggle, data_dir, status, error):
    kaggle.statuses = [status] * 10
    with pytest.raises(error, match=str(status)):
        fetch_archive(SOURCE, open_store(data_dir))


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_is_no_positive_number_is_refused(kaggle, data_dir, content, version):
    kaggle.datasets.clear()
    kaggle.add(SOURCE.name, content, version=version)
    for ask in (fetch_archive, find_new_version):
        with pytest.raises(SourceError, match=rf"must be a positive number. Received .*{SOURCE.name}: {version}\."):
            ask(SOURCE, open_store(data_dir))
    assert not data_dir.exists()


@pytest.mark.usefixtures("kaggle")
def test_a_certificate_that_is_not_trusted_fails_at_once(tmp_path, data_dir, monkeypatch):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "other.pem"))
    with pytest.raises(ConfigurationError, match=r"certificate of Kaggle.*REQUESTS_CA_BUNDLE") as caught:
        fetch_archive(SOURCE, open_store(data_dir))
    assert isinstance(caught.value, PermanentError)  # which no task retries
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nothing.pem"))
    with pytest.raises(ConfigurationError, match=r"REQUESTS_CA_BUNDLE must name a PEM file that exists.*nothing\.pem"):
        fetch_archive(SOURCE, open_store(data_dir))


@pytest.mark.usefixtures("kaggle")
def test_no_connection(data_dir, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(DownloadError, match=r"connection to Kaggle failed.*run again"):
        fetch_archive(SOURCE, open_store(data_dir))


def test_a_download_that_is_no_zip_is_deleted(kaggle, data_dir):
    kaggle.add(SOURCE.name, b"<html>maintenance</html>", version=3)
    with pytest.raises(ArchiveError, match=r"must be a whole zip.*b'<html>ma'.*deleted; run again") as caught:
        fetch_archive(SOURCE, open_store(data_dir))
    assert isinstance(caught.value, PermanentError)
    assert files(data_dir) == []


def test_a_damaged_download_is_deleted(kaggle, data_dir, content):
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    kaggle.add(SOURCE.name, bytes(damaged), version=2)
    with pytest.raises(ArchiveError, match="must match its checksum"):
        fetch_archive(SOURCE, open_store(data_dir))
    assert files(data_dir) == []


def test_a_full_disk_is_said_before_the_download(kaggle, data_dir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DiskError, match=r"owner/some-faces needs .* `data.data_dir`"):
        fetch_archive(SOURCE, open_store(data_dir))
    assert kaggle.downloads == [] or files(data_dir) == []


def write_with_method(path: Path, method: int, flags: int = 0) -> Path:
    """Write a zip whose member says that it is compressed by another method, or encrypted."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("real/a.jpg", jpeg(1))
    content = bytearray(path.read_bytes())
    for place in (6, content.index(b"PK\1\2") + 8):  # flags and method of the member, then those in the directory
        content[place : place + 4] = (flags | content[place]).to_bytes(2, "little") + method.to_bytes(2, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("places", "said"), [(2, r"marked as UTF-8 must be.*real/\\xff\\xfe"), (1, "is damaged")])
def test_a_name_that_is_not_the_utf8_that_it_says_is_said(tmp_path, places, said):
    path = write_zip(tmp_path / "a.zip", {"real/é.jpg": jpeg(1)})
    path.write_bytes(path.read_bytes().replace("real/é".encode(), b"real/\xff\xfe", places))
    with pytest.raises(ArchiveError, match=said):
        verify_zip(path)


@pytest.mark.parametrize(
    ("method", "flags", "found"),
    [(9, 0, r"\(method 9:"), (98, 0, r"\(method 98:"), (8, 1, "is encrypted"), (99, 1, "is encrypted")],
)
def test_a_zip_that_is_packed_in_another_way_is_to_be_packed_again(tmp_path, method, flags, found):
    path = write_with_method(tmp_path / "other.zip", method, flags)
    with pytest.raises(ArchiveError, match=rf"by Deflate.*'real/a.jpg' of .*other.zip .*{found}.*zip it again"):
        verify_zip(path)


def test_a_zip_bomb_is_refused_from_its_directory(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bomb:
        bomb.writestr("real/a.jpg", bytes(50_000_000))
    with pytest.raises(ArchiveError, match="may expand to 100 times"):
        verify_zip(path)


def test_a_missing_local_source(tmp_path, data_dir):
    with pytest.raises(SourceError, match=r"existing zip or folder.*nothing.zip"):
        fetch_archive(Source(name=f"{tmp_path}/nothing.zip"), open_store(data_dir))


def test_a_local_zip_is_used_in_place(tmp_path, data_dir):
    path = write_zip(tmp_path / "faces.zip", faces(1))
    assert fetch_archive(Source(name=str(path)), open_store(data_dir)).path == path
    assert not (data_dir / "archives").exists()


def test_a_local_zip_is_read_again_only_if_it_may_have_changed(tmp_path, data_dir):
    path, store = write_zip(tmp_path / "faces.zip", faces(1)), open_store(data_dir)
    source = Source(name=str(path))
    first = fetch_archive(source, store)
    assert first.sha256 == hash_file(path)
    before = path.stat()
    path.write_bytes(bytes(first.bytes))  # the same size and inode
    with pytest.raises(ArchiveError):
        fetch_archive(source, store)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch_archive(source, store) == first  # so it was not read
    (kept,) = (data_dir / "indexes").glob("zip-*.json")
    kept.write_text('{"state": 1}')
    with pytest.raises(ArchiveError):
        fetch_archive(source, store)
    path.unlink()
    write_zip(path, faces(2))
    assert fetch_archive(source, store).sha256 == hash_file(path) != first.sha256


@pytest.mark.usefixtures("kaggle")
def test_provenance_on_disk_is_what_was_returned(data_dir):
    fetched = fetch_archive(SOURCE, open_store(data_dir))
    assert json.loads(fetched.path.with_suffix(".json").read_text())["sha256"] == hash_file(fetched.path)
