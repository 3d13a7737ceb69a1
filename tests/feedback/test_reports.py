"""Reports on wrong verdicts: what is kept, counted, decided and forgotten, in a folder and at a URL."""

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from deepfake_core.cli import main
from deepfake_core.decoding import MAX_BYTES, UnreadableImageError
from deepfake_core.errors import ArchiveError, ConfigurationError, CredentialsError, DiskError, DownloadError
from deepfake_core.feedback import reports
from deepfake_core.feedback.records import make_entry
from deepfake_core.feedback.reports import open_feedback
from tests.builders import VERDICT, free_port, jpeg

SHA256 = hashlib.sha256(jpeg(1)).hexdigest()


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def address(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_url")
    return str(tmp_path / "feedback") if request.param == "folder" else f"memory://{tmp_path}/feedback"


@pytest.fixture
def folder(tmp_path):
    """Return a folder with one report."""
    open_feedback(tmp_path).add(jpeg(1), VERDICT, "fake", "a note")
    return tmp_path


def find_record(folder: Path, kind: str) -> Path:
    (found,) = folder.glob(f"*/{kind}-*.json")
    return found


def test_an_image_that_is_sent_twice_is_one_report_with_a_count(address):
    feedback = open_feedback(address)
    assert feedback.list_entries() == []
    assert feedback.list_confirmed() == []
    feedback.add(jpeg(1), VERDICT, "fake", "an ear is missing")
    entry = open_feedback(address).add(jpeg(1), VERDICT, "real")
    (listed,) = open_feedback(address).list_entries("unreviewed")
    assert listed == entry
    assert (entry.count, entry.claimed, entry.status, entry.problems) == (2, ["fake", "real"], "unreviewed", ())
    assert entry.reports[0].verdict == VERDICT
    assert entry.reports[0].note == "an ear is missing"
    assert feedback.read_image(entry.sha256[:8]) == jpeg(1)


def test_only_what_is_confirmed_is_learned_from_and_a_decision_can_be_taken_back(address):
    feedback = open_feedback(address)
    sha256 = feedback.add(jpeg(1), VERDICT, "fake").sha256
    assert feedback.list_confirmed() == []
    feedback.confirm(sha256, "fake", by="someone", why="the ear")
    (confirmed,) = feedback.list_confirmed()
    assert (confirmed.sha256, confirmed.label, confirmed.box) == (sha256, "fake", (0, 0, 9, 9))
    assert confirmed.read() == jpeg(1)
    entry = feedback.withdraw(sha256, by="another", why="not sure")
    assert entry.status == "unreviewed"
    assert feedback.list_confirmed() == []
    entry = feedback.reject(sha256, by="another")
    assert entry.status == "rejected"
    assert [(one.decision, one.by, one.why) for one in entry.decisions] == [
        ("confirmed", "someone", "the ear"),
        ("withdrawn", "another", "not sure"),
        ("rejected", "another", ""),
    ]


def test_what_is_forgotten_is_gone(address):
    feedback = open_feedback(address)
    sha256 = feedback.add(jpeg(1), VERDICT, "fake").sha256
    other = feedback.add(jpeg(2), VERDICT, "fake").sha256
    feedback.confirm(sha256, "fake", by="someone")
    assert feedback.forget(sha256[:12]) == sha256
    assert [entry.sha256 for entry in feedback.list_entries()] == [other]
    with pytest.raises(ArchiveError, match="nothing"):
        feedback.read_image(sha256)
    with pytest.raises(ConfigurationError, match="holds nothing"):
        feedback.forget(sha256)


def kill_at(monkeypatch, removed):
    """Let the removal of files end after some of them, as if the process had been killed."""
    unlink, calls = os.unlink, itertools.count()

    def stop(*args, **options):
        if next(calls) == removed:
            raise KeyboardInterrupt
        unlink(*args, **options)

    monkeypatch.setattr(os, "unlink", stop)


@pytest.mark.parametrize("removed", range(6))
def test_a_removal_that_was_killed_revives_no_older_decision(tmp_path, monkeypatch, removed):
    feedback = open_feedback(tmp_path)
    images = [feedback.add(jpeg(seed), VERDICT, "fake").sha256 for seed in range(5)]
    for sha256 in images:
        feedback.confirm(sha256, "fake", by="someone")
        feedback.withdraw(sha256, by="another")
        feedback.confirm(sha256, "real", by="someone")
        feedback.reject(sha256, by="another")
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            kill_at(patch, removed)
            feedback.forget(sha256)
    found = [(entry.status, entry.size > 0) for entry in open_feedback(tmp_path).list_entries()]
    assert found == [("rejected", removed == 0)] * 5
    for sha256 in images:
        feedback.forget(sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["feedback.json"]


def test_an_image_that_a_killed_process_wrote_in_part_can_be_removed(folder):
    feedback = open_feedback(folder)
    other = hashlib.sha256(jpeg(2)).hexdigest()
    (folder / other).mkdir()
    for sha256 in (SHA256, other):
        (folder / sha256 / ".image.4242").write_bytes(jpeg(2)[:500])
    assert [entry.sha256 for entry in feedback.list_entries()] == [SHA256]
    feedback.reject(SHA256, by="someone")
    assert feedback.expire(SHA256)
    assert [path.name[:9] for path in (folder / SHA256).iterdir()] == ["decision-"]
    assert main(["feedback", "forget", other, "--in", str(folder), "--yes"]) == 0
    assert not (folder / other).exists()


def test_a_rejected_image_that_expired_is_known_when_it_is_sent_again(address):
    feedback = open_feedback(address)
    sha256 = feedback.add(jpeg(1), VERDICT, "fake", "a note").sha256
    feedback.reject(sha256, by="someone", why="it is real")
    feedback.expire(sha256)
    entry = feedback.add(jpeg(1), VERDICT, "fake", "a note")
    assert (entry.size, entry.count, entry.status, entry.problems) == (0, 0, "rejected", ())
    feedback.withdraw(sha256, by="someone")
    entry = feedback.add(jpeg(1), VERDICT, "fake", "a note")
    assert (entry.count, entry.status) == (1, "unreviewed")
    assert feedback.read_image(sha256) == jpeg(1)


def test_names_of_senders_have_no_field():
    (entry,) = [open_feedback("memory://fields").add(jpeg(1), VERDICT, "fake", "a note")]
    assert set(entry.reports[0].model_dump()) == {"verdict", "label", "note", "time"}
    assert set(entry.reports[0].verdict.model_dump()) == {"label", "probability", "sure", "version", "box", "faces"}


@pytest.mark.parametrize("label", ["", "Fake", "1", "a" * 10_000, "real\n"])
def test_an_unknown_label_is_refused_and_nothing_is_kept(tmp_path, label):
    feedback = open_feedback(tmp_path / "feedback")
    with pytest.raises(ConfigurationError, match=r"must be real or fake\. Received: '"):
        feedback.add(jpeg(1), VERDICT, label)
    assert not (tmp_path / "feedback").exists()
    feedback.add(jpeg(1), VERDICT, "fake")
    with pytest.raises(ConfigurationError, match="must be real or fake"):
        feedback.confirm(SHA256, label, by="someone")


def test_a_note_that_is_too_long_is_refused_and_what_a_terminal_would_obey_is_not_kept(tmp_path):
    feedback = open_feedback(tmp_path)
    with pytest.raises(ConfigurationError, match=r"`note` may hold 1,000 characters at most\. Received: 1,001"):
        feedback.add(jpeg(1), VERDICT, "fake", "x" * 1001)
    with pytest.raises(ConfigurationError, match=r"`by` may hold 200 characters at most\. Received: 201"):
        open_feedback(tmp_path).reject(feedback.add(jpeg(2), VERDICT, "fake").sha256, by="x" * 201)
    entry = feedback.add(jpeg(1), VERDICT, "fake", "red\x1b[31m\r\nnext \ud800 \u202e end")
    assert entry.reports[0].note == "red [31m  next     end"
    assert feedback.add(jpeg(1), VERDICT, "fake", "\U0001f600" * 1000).reports[1].note == "\U0001f600" * 1000


@pytest.mark.parametrize(
    ("image", "reason"), [(b"", "not_an_image"), (b"words", "not_an_image"), (jpeg(1)[:-200], "truncated")]
)
def test_what_is_no_image_is_refused_and_nothing_is_kept(tmp_path, image, reason):
    with pytest.raises(UnreadableImageError) as refused:
        open_feedback(tmp_path).add(image, VERDICT, "fake")
    assert refused.value.reason == reason
    assert not list(tmp_path.iterdir())


def test_an_image_of_too_many_bytes_is_refused(tmp_path):
    with pytest.raises(UnreadableImageError, match="100,000,000 bytes at most"):
        open_feedback(tmp_path).add(jpeg(1) + bytes(MAX_BYTES), VERDICT, "fake")


def test_a_folder_that_is_full_by_the_limit_takes_no_more(tmp_path, monkeypatch):
    feedback = open_feedback(tmp_path)
    feedback.add(jpeg(1), VERDICT, "fake")
    monkeypatch.setattr(reports, "MAX_TOTAL_BYTES", 22_000)
    with pytest.raises(DiskError, match=r"may hold 2\.2e-05 GB in all.*Review what is there"):
        open_feedback(tmp_path).add(jpeg(2), VERDICT, "fake")
    assert len(feedback.list_entries()) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"holiday.jpg": b""},
        {"splits/x": b""},
        {"feedback.json": b""},
        {"feedback.json": b"[" * 10_000},
        {"feedback.json": b'{"format": 1, "project": "another"}'},
        {"feedback.json": b'{"format": 2, "project": "deepfake-retraining"}'},
    ],
)
def test_a_folder_of_others_is_refused_and_left_as_it_is(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"Feedback must be in a new folder.*Name another"):
        open_feedback(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()] == list(files)


def test_a_file_and_a_marker_that_is_huge_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="must be a folder"):
        open_feedback(tmp_path / "file")
    (tmp_path / "feedback.json").write_bytes(bytes(1_000_000))
    with pytest.raises(ArchiveError, match="20,000 bytes at most"):
        open_feedback(tmp_path)


@pytest.mark.parametrize(
    "named", ["../../etc", "/etc/passwd", "", "a" * 7, "g" * 64, "a" * 65, "\0" * 8, f"{SHA256}/image"]
)
@pytest.mark.parametrize("method", ["read", "read_image", "reject", "withdraw", "forget", "expire"])
def test_what_is_no_hash_names_nothing(folder, named, method):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    more = {"by": "someone"} if method in ("reject", "withdraw") else {}
    with pytest.raises(ConfigurationError, match="named by its SHA-256"):
        getattr(open_feedback(folder), method)(named, **more)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_beginning_of_several_hashes_names_none(folder):
    twin = folder / f"{SHA256[:20]}{'0' * 44}"
    twin.mkdir()
    feedback = open_feedback(folder)
    with pytest.raises(ConfigurationError, match="which 2 have"):
        feedback.read(SHA256[:20])
    assert feedback.read(SHA256[:21]).sha256 == SHA256
    with pytest.raises(ConfigurationError, match="which 0 have"):
        feedback.read("0" * 8)


def test_an_image_that_was_changed_is_neither_confirmed_nor_learned_from(folder):
    feedback = open_feedback(folder)
    (folder / SHA256 / "image").write_bytes(jpeg(2))
    with pytest.raises(ArchiveError, match=r"bytes with another SHA-256 at .*forget"):
        feedback.confirm(SHA256, "fake", by="someone")
    (folder / SHA256 / "image").write_bytes(jpeg(1))
    feedback.confirm(SHA256, "fake", by="someone")
    (folder / SHA256 / "image").write_bytes(jpeg(2))
    (confirmed,) = feedback.list_confirmed()
    with pytest.raises(ArchiveError, match="another SHA-256"):
        confirmed.read()
    (folder / SHA256 / "image").unlink()
    assert feedback.list_confirmed() == []
    assert feedback.read(SHA256).problems == ("the image is gone or empty",)
    assert feedback.add(jpeg(1), VERDICT, "fake").problems == ()  # sent again, it is whole again


def test_links_and_pipes_are_not_followed(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_bytes(jpeg(1))
    feedback = open_feedback(folder)
    (folder / SHA256 / "image").unlink()
    (folder / SHA256 / "image").symlink_to(secret)
    with pytest.raises(ArchiveError, match="nothing"):
        feedback.read_image(SHA256)
    report = find_record(folder, "report")
    report.unlink()
    os.mkfifo(report)
    assert feedback.list_entries() == []
    (folder / ("0" * 64)).symlink_to(secret.parent)
    assert feedback.list_entries() == []
    with pytest.raises(ConfigurationError, match="holds nothing"):
        feedback.forget("0" * 64)
    assert secret.read_bytes() == jpeg(1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"words",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 19_000,
        b"x" * 30_000_000,
        {"label": "neither"},
        {"time": "2026-01-01T00:00:00Z"},
        {"time": "2026-01-01T00:00:00"},
        {"note": "x" * 1001},
        {"sender": "someone"},
        {"verdict": None},
    ],
)
def test_a_report_that_was_changed_is_said_and_stops_no_other(folder, content):
    feedback = open_feedback(folder)
    feedback.add(jpeg(2), VERDICT, "fake")
    (report,) = (folder / SHA256).glob("report-*")
    if isinstance(content, dict):
        content = json.dumps(json.loads(report.read_bytes()) | content).encode()
    report.write_bytes(content)
    changed, whole = sorted(feedback.list_entries(), key=lambda entry: entry.sha256 != SHA256)
    assert (changed.count, changed.reports) == (1, ())
    assert changed.problems[0].startswith(f"{report.name} can't be read: ")
    assert len(changed.problems[0]) < 400
    assert whole.problems == ()


@pytest.mark.parametrize("change", [b"", {"decision": "confirmed", "label": None}, {"label": "real"}])
def test_a_decision_that_was_changed_counts_as_taken_back(folder, change):
    feedback = open_feedback(folder)
    feedback.reject(SHA256, by="someone")
    decision = find_record(folder, "decision")
    content = change if isinstance(change, bytes) else json.dumps(json.loads(decision.read_bytes()) | change).encode()
    decision.write_bytes(content)
    entry = feedback.read(SHA256)
    assert (entry.status, len(entry.problems)) == ("unreviewed", 1)
    assert feedback.confirm(SHA256, "fake", by="another").status == "confirmed"


@given(
    records=st.dictionaries(
        st.one_of(st.text(max_size=20), st.just("decision-20260101T000000000000Z-00000000.json")),
        st.one_of(st.none(), st.binary(max_size=50), st.just(b'{"decision": "confirmed", "label": "fake"}')),
        max_size=4,
    )
)
def test_no_content_of_records_confirms_an_image_unless_it_is_a_whole_decision(records):
    assert make_entry(SHA256, 1, records).status == "unreviewed"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(steps=st.lists(st.sampled_from(["confirm", "reject", "withdraw"]), max_size=6))
def test_the_last_decision_counts_whatever_came_before(tmp_path, steps):
    feedback = open_feedback(tmp_path / str(len(list(tmp_path.iterdir()))))
    feedback.add(jpeg(1), VERDICT, "fake")
    status = "unreviewed"
    for step in steps:
        if step == "confirm":
            feedback.confirm(SHA256, "fake", by="someone")
        elif step == "reject":
            feedback.reject(SHA256, by="someone")
        elif status == "unreviewed":
            with pytest.raises(ConfigurationError, match="Only a decision can be withdrawn"):
                feedback.withdraw(SHA256, by="someone")
            continue
        else:
            feedback.withdraw(SHA256, by="someone")
        status = {"confirm": "confirmed", "reject": "rejected", "withdraw": "unreviewed"}[step]
    assert feedback.read(SHA256).status == status
    assert bool(feedback.list_confirmed()) == (status == "confirmed")


def test_a_decision_from_a_machine_whose_clock_is_late_still_counts(folder):
    feedback = open_feedback(folder)
    feedback.confirm(SHA256, "fake", by="someone")
    early = find_record(folder, "decision")
    ahead = json.loads(early.read_bytes()) | {"time": "2090-01-01T00:00:00.000000Z"}
    early.unlink()
    (early.parent / "decision-20900101T000000000000Z-00000000.json").write_text(json.dumps(ahead))
    assert feedback.read(SHA256).status == "confirmed"
    assert feedback.withdraw(SHA256, by="someone").status == "unreviewed"


ADD_MANY = """
import sys
from deepfake_core.feedback.reports import open_feedback
from tests.builders import VERDICT, jpeg
feedback = open_feedback(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for seed in range(10):
    feedback.add(jpeg(seed), VERDICT, "fake")
"""


@pytest.mark.slow
@pytest.mark.process
def test_of_two_processes_that_add_at_once_no_report_is_lost(tmp_path):
    command = [sys.executable, "-c", ADD_MANY, str(tmp_path / "feedback")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.stdout.readline() for one in started] == ["ready\n"] * 2
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.wait() for one in started] == [0, 0]
    for one in started:
        one.stdin.close()
        one.stdout.close()
    entries = open_feedback(tmp_path / "feedback").list_entries()
    assert [(entry.count, entry.problems) for entry in entries] == [(2, ())] * 10
    assert not list((tmp_path / "feedback").rglob(".*"))


@pytest.mark.slow
def test_a_store_that_refuses_or_does_not_answer_is_said(s3_url, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"bucket .* must exist"):
        open_feedback("s3://nothing-of-this-name/feedback")
    feedback = open_feedback(s3_url)
    feedback.add(jpeg(1), VERDICT, "fake")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(DownloadError, match="must answer"):
        open_feedback(s3_url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(CredentialsError, match="needs credentials"):
        open_feedback(s3_url)


@pytest.mark.slow
@pytest.mark.usefixtures("s3_url")
def test_a_store_that_went_away_refuses_a_report_and_takes_it_once_it_is_back(monkeypatch):
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for attempt in range(2):
        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
        if attempt == 0:
            fsspec.filesystem("s3").mkdir("went-away")
            feedback = open_feedback("s3://went-away/feedback")
        assert feedback.add(jpeg(attempt), VERDICT, "fake").count == 1
        server.stop()
        with pytest.raises(DownloadError, match=r"The store must answer\."):
            feedback.add(jpeg(9), VERDICT, "fake")


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/x", "nothing://x/y", "s3:/bucket/x"])
def test_a_url_that_no_one_can_use_is_refused_without_its_secrets(address):
    with pytest.raises(ConfigurationError) as refused:
        open_feedback(address)
    assert "secret" not in str(refused.value).replace("AWS_SECRET", "")


@pytest.mark.slow
def test_500_reports_take_no_more_memory_or_open_files_than_50(tmp_path):
    import psutil

    process, seen = psutil.Process(), []
    feedback = open_feedback(tmp_path)
    for seed in range(500):
        feedback.add(jpeg(seed), VERDICT, "fake", "a note")
        if seed in (49, 499):
            assert len(feedback.list_entries()) == seed + 1
            seen.append((process.memory_info().rss / 1e6, process.num_fds()))
    print(f"MB and open files after 50 and 500 reports: {seen}")
    assert seen[1][1] == seen[0][1]
    assert seen[1][0] - seen[0][0] < 20
