"""`deepfake feedback`: from a wrong verdict to a decision, and to being forgotten."""

import io
import sys

import pytest

from deepfake_core.cli import main
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.registry import production
from deepfake_core.serving.predictor import Predictor, load_detector
from tests.builders import NAME, draw_portrait, encode, write_clip


@pytest.fixture
def run(candidate, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in a folder of its own; it returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments, model=True):
        more = ["--model", str(candidate.folder)] if name == "add" and model else []
        status = main(["feedback", name, *map(str, arguments), *more])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def face(tmp_path):
    file = tmp_path / "face.png"
    file.write_bytes(encode(draw_portrait(1), "PNG"))
    return file


@pytest.mark.slow
def test_a_wrong_verdict_is_reported_reviewed_taken_back_and_forgotten(run, face, candidate, tmp_path):
    status, output, _ = run("add", face, "--label", "fake", "--note", "an | [bold] ear")
    assert status == 0
    sha256, name, _ = output.split(maxsplit=2)
    (judged,) = Predictor(load_detector(candidate.folder)).judge([("x", face)])
    assert judged.sha256.startswith(sha256)
    assert name == f"{face}:"
    assert f"P(fake) = {judged.verdicts[0].fake_probability:.2f}" in output
    assert "reported as fake, 1 report, unreviewed" in output
    (entry,) = open_feedback(tmp_path / "data" / "feedback").list_entries()
    assert entry.reports[0].verdict.version == candidate.folder.name
    assert entry.reports[0].verdict.faces == 1
    assert "an | [bold] ear" in run("list")[1]
    assert run("list", "--status", "confirmed")[1].startswith("No reports that are confirmed in ")

    assert run("confirm", sha256, "--why", "it has no ear", "--by", "someone")[:2] == (
        0,
        f"{sha256} is confirmed as fake. `deepfake feedback withdraw` takes it back.\n",
    )
    status, output, _ = run("show", sha256, "--save", "saved.png")
    assert "confirmed as fake by someone: it has no ear" in output
    assert (tmp_path / "saved.png").read_bytes() == face.read_bytes()
    assert run("withdraw", sha256)[1] == f"{sha256} is unreviewed.\n"
    assert "is rejected." in run("reject", sha256)[1]

    assert run("forget", sha256, "--yes")[0] == 0
    assert open_feedback(tmp_path / "data" / "feedback").list_entries() == []
    assert run("show", sha256)[0] == 2


@pytest.mark.slow
def test_the_same_image_twice_is_counted_and_reports_that_disagree_need_a_label(run, face, tmp_path):
    run("add", face, "--label", "fake", "--to", "reports")
    (tmp_path / "copy.png").write_bytes(face.read_bytes())
    _, output, _ = run("add", "copy.png", "--label", "real", "--to", "reports")
    sha256 = output[:12]
    assert "reported as real, 2 reports" in output
    status, _, error = run("confirm", sha256, "--in", "reports")
    assert (status, error) == (
        2,
        "deepfake: --label must say what the image is. Received: none, and the reports say fake and real.\n",
    )
    assert run("confirm", sha256, "--in", "reports", "--label", "real")[0] == 0


@pytest.mark.slow
def test_what_is_no_image_is_said_and_the_others_are_reported(run, face, tmp_path, monkeypatch):
    (tmp_path / "words.jpg").write_text("words")
    clip = write_clip(tmp_path / "clip.mp4", [draw_portrait(1)] * 3)
    status, output, errors = run("add", "words.jpg", "absent.jpg", clip, face, "--label", "fake")
    assert status == 2
    assert output.count("\n") == 1
    assert errors.splitlines() == [
        "deepfake: words.jpg: must be a JPEG, PNG or WebP image",
        "deepfake: absent.jpg: No such file or directory",
        f"deepfake: {clip}: must be a JPEG, PNG or WebP image",
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(face.read_bytes())))
    assert "standard input: " in run("add", "-", "--label", "fake")[1]


@pytest.mark.slow
def test_a_rejected_image_that_is_sent_again_after_its_time_is_not_kept(run, face, tmp_path):
    sha256 = run("add", face, "--label", "fake")[1][:12]
    run("reject", sha256)
    open_feedback(tmp_path / "data" / "feedback").expire(sha256)
    assert run("add", face, "--label", "fake")[1] == f"{sha256}  {face}: was rejected before; nothing is kept\n"
    assert f"{sha256} │ rejected" in run("list")[1]


def test_an_unknown_label_is_refused_by_the_command_line(run, face, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("add", face, "--label", "forged")
    assert "argument --label: invalid choice: 'forged'" in capsys.readouterr().err


def test_what_can_not_work_is_said_before_anything_is_written(run, face, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").touch()
    status, _, error = run("add", face, "--label", "fake", "--to", "pictures")
    assert (status, error.count("\n")) == (2, 1)
    assert "which holds holiday.jpg and no feedback.json. Name another." in error
    status, _, error = run("add", face, "--label", "fake", "--model", "nothing", model=False)
    assert status == 2
    assert error.startswith("deepfake: --model must be a folder written by `deepfake pull`")
    assert not (tmp_path / "data").exists()
    assert run("list")[1].startswith("No reports in ")
    status, _, error = run("forget", "../../etc")
    assert (status, error.count("\n")) == (2, 1)
    assert "named by its SHA-256" in error


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_production_judges_where_no_model_is_named(face, registered, capsys, tmp_path):
    production.move_production(NAME, registered[2], None, "test")
    assert main(["feedback", "add", str(face), "--label", "fake", "--to", str(tmp_path / "reports")]) == 0
    assert f"by {NAME} version {registered[2]}; reported as fake" in capsys.readouterr().out
