"""The real Kaggle client, unmodified, against Kaggle on loopback; and what local archives may be."""

import json
import os
import shutil
import zipfile

import pytest

from deepfake_core.config import KAGGLE_SOURCES, Source
from deepfake_core.data.archive import verify_zip
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.errors import (
    ArchiveError,
    CredentialsError,
    DiskError,
    DownloadError,
    PermanentError,
    SourceError,
    TransientError,
)
from deepfake_core.storage.files import hash_file
from deepfake_core.storage.store import open_store
from tests.builders import faces, free_port, write_zip
from tests.kaggle_server import HIDDEN, KaggleServer

SOURCE = Source(name="owner/some-faces")
CHUNK = 1 << 20  # the client writes whole chunks, so it resumes at the last one


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A zip of a few megabytes, so that a download takes more than one chunk."""
    noise = {f"real/noise{i}.bin": os.urandom(1_000_000) for i in range(3)}
    return write_zip(tmp_path_factory.mktemp("content") / "a.zip", faces(5) | noise).read_bytes()


@pytest.fixture
def kaggle(tmp_path, monkeypatch, content):
    folder = tmp_path / "kaggle"
    folder.mkdir()
    for name in HIDDEN:
        monkeypatch.delenv(name, raising=False)
    with KaggleServer(folder) as server:
        server.add(SOURCE.name, content)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


def files(data_dir):
    return sorted(str(file.relative_to(data_dir)) for file in data_dir.rglob("*") if file.is_file())


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
    assert [asked for _, asked in kaggle.downloads] == ["", f"bytes={CHUNK}-"]


@pytest.mark.slow
def test_a_download_that_failed_goes_on_where_it_stopped(kaggle, data_dir, content):
    kaggle.cuts = [1_500_000, 1000]
    with pytest.raises(DownloadError, match="the download continues from there") as caught:
        fetch_archive(SOURCE, open_store(data_dir))
    assert isinstance(caught.value, TransientError)
    assert files(data_dir) == [
        "archives/owner/some-faces/1.zip.partial",
        "archives/owner/some-faces/1.zip.partial.kaggle-partial",
    ]
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content
    assert kaggle.downloads[-1][1] == f"bytes={CHUNK}-"
    assert files(data_dir) == ["archives/owner/some-faces/1.json", "archives/owner/some-faces/1.zip"]


@pytest.mark.slow
def test_an_error_instead_of_the_rest_is_never_taken_for_it(kaggle, data_dir, content):
    kaggle.cuts = [2_500_000]
    kaggle.storage_statuses = [0, 503, 503]
    with pytest.raises(DownloadError, match=r"something else.*run again"):
        fetch_archive(SOURCE, open_store(data_dir))
    assert files(data_dir) == []
    assert fetch_archive(SOURCE, open_store(data_dir)).path.read_bytes() == content


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
    assert not data_dir.exists()


@pytest.mark.usefixtures("kaggle")
def test_provenance_on_disk_is_what_was_returned(data_dir):
    fetched = fetch_archive(SOURCE, open_store(data_dir))
    assert json.loads(fetched.path.with_suffix(".json").read_text())["sha256"] == hash_file(fetched.path)
