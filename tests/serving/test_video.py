"""Clips, drawn and encoded here."""

import csv
import io
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from deepfake_core.cli import main
from deepfake_core.detector import Detector
from deepfake_core.serving import video
from deepfake_core.serving.page import ModelKeeper, judge_upload
from deepfake_core.serving.predictor import Predictor
from deepfake_core.serving.video import average_scores, judge_clip, plot_timeline
from tests.builders import draw_portrait, draw_scene, write_clip

RATE = 25


def grey(value, size=(64, 48)):
    return Image.new("RGB", size, (value, value, value))


@pytest.fixture(scope="module")
def two_people(tmp_path_factory):
    """One person from the start, another from frame 60 on, both moving."""
    first, second = draw_portrait(1, 150), draw_portrait(2, 110)
    frames = []
    for number in range(150):
        people = {(20 + number // 2, 40): first}
        if number >= 60:
            people[(420, 250 - number // 3)] = second
        frames.append(draw_scene(people))
    return write_clip(tmp_path_factory.mktemp("clips") / "two.mp4", frames)


@pytest.fixture(scope="module")
def detector(candidate):
    return Detector(candidate.folder)


@pytest.mark.slow
def test_faces_are_followed_and_judged_one_by_one(detector, two_people):
    steps = []
    clip = judge_clip(Predictor(detector), two_people, 30, explain=True, on_progress=lambda *step: steps.append(step))
    assert sum(new for new, _ in steps) == 30
    assert len(clip.verdicts) == 2
    long, short = sorted(clip.verdicts, key=lambda verdict: -verdict.clip.frames)
    assert long.clip.frames == 30
    assert long.clip.first_second < 0.2
    assert 15 <= short.clip.frames <= 20
    assert short.clip.first_second >= 60 / RATE
    for verdict, (seconds, scores) in zip(clip.verdicts, clip.timelines, strict=True):
        assert len(seconds) == len(scores) == verdict.clip.frames
        assert verdict.fake_probability == pytest.approx(average_scores(scores))
        assert verdict.clip.low <= verdict.fake_probability <= verdict.clip.high
    assert clip.verdicts[0].fake_probability >= clip.verdicts[1].fake_probability
    assert clip.picture
    figure = plot_timeline(clip, detector.threshold, "two.mp4")
    assert len(figure.axes[0].lines) == 3


@pytest.mark.slow
def test_without_detection_whole_frames_are_one_track(detector, two_people):
    (verdict,) = judge_clip(Predictor(detector, detect=False), two_people, frames=12).verdicts
    assert (verdict.face, verdict.clip.frames, verdict.box) == (None, 12, (0, 0, 640, 480))


@pytest.mark.slow
def test_many_crops_are_scored_as_they_come(detector, two_people, monkeypatch):
    at_once = judge_clip(Predictor(detector), two_people, frames=30)
    monkeypatch.setattr(video, "BATCH_SIZE", 4)
    in_parts = judge_clip(Predictor(detector), two_people, frames=30)
    for one, other in zip(at_once.timelines, in_parts.timelines, strict=True):
        assert one[0] == other[0]
        assert np.allclose(one[1], other[1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lower", "limits", "frames", "reason"),
    [
        (1.0, {"side": 100, "saturation": 0.01}, 30, None),
        (1e-9, {}, 30, "P(fake) must be"),
        (1.0, {"side": 5000}, 30, "5000 and more"),
        (1.0, {"saturation": 0.99}, 30, "grey or nearly so"),
        (1.0, {}, 7, "7 frames; 8 are needed"),
    ],
)
def test_a_clip_is_sure_where_most_of_its_frames_are(candidate, two_people, tmp_path, lower, limits, frames, reason):
    model = Path(shutil.copytree(candidate.folder, tmp_path / "model"))
    description = json.loads((model / "detector.json").read_text())
    bounds = {"lower": lower, "upper": 1 - lower, "max_error": 0.05}
    (model / "detector.json").write_text(json.dumps(description | {"bounds": bounds, "limits": limits}))
    longest = max(judge_clip(Predictor(Detector(model)), two_people, frames).verdicts, key=lambda one: one.clip.frames)
    assert longest.sure is (reason is None)
    assert reason is None or reason in longest.reason


def test_the_mean_of_logits_is_trimmed():
    assert average_scores([0.9] * 20) == pytest.approx(0.9)
    assert average_scores([0.9] * 19 + [0.0]) == pytest.approx(0.9)  # one odd frame decides nothing
    assert average_scores([0.2, 0.8]) == pytest.approx(0.5)
    assert 0 < average_scores([0.0, 0.0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("empty.mp4", b"", "no clip that can be read"),
        ("words.mp4", b"words " * 1000, "no clip that can be read"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/etc/passwd\n", "no clip that can be read"),
        ("concat.avi", b"ffconcat version 1.0\nfile /etc/passwd\n", "no clip that can be read"),
    ],
)
def test_what_is_no_clip_is_said(tmp_path, detector, name, content, error):
    (tmp_path / name).write_bytes(content)
    (verdict,) = judge_clip(Predictor(detector, detect=False), tmp_path / name).verdicts
    assert error in verdict.error
    assert verdict.unreadable


def test_a_truncated_clip_is_an_error_or_gives_what_can_be_decoded(tmp_path, detector, two_people):
    data = two_people.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])  # mp4's index lies at the end
    (verdict,) = judge_clip(Predictor(detector), tmp_path / "cut.mp4").verdicts
    assert verdict.unreadable


def remux(file, target, form=None):
    """Write a clip's pictures, unchanged, into another container."""
    with av.open(str(file)) as source, av.open(str(target), "w", format=form) as container:
        pictures = source.streams.video[0]
        stream = container.add_stream_from_template(pictures)
        stream.time_base = 1 / pictures.average_rate  # which AVI numbers frames by
        as_stream = av.BitStreamFilterContext("h264_mp4toannexb", pictures)
        for packet in source.demux(pictures):
            if packet.dts is None:
                continue
            packet.dts, packet.pts = packet.dts + 2048, packet.pts + 2048  # AVI holds no time below 0
            for one in as_stream.filter(packet) if target.suffix in (".avi", ".mpg") else [packet]:
                one.stream = stream
                container.mux(one)
    return target


@pytest.fixture(scope="module")
def cut(two_people):
    """Half of a file in Matroska, whose name does not say that it is a clip."""
    whole = remux(two_people, two_people.with_name("whole.mkv"))
    file = two_people.with_name("recording")
    file.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return file


WARNING = "the file is cut short: "


def test_the_page_says_what_of_a_clip_was_not_seen(candidate, cut):
    text, _, timeline, shown = judge_upload(ModelKeeper(str(candidate.folder), detect=False), cut)
    assert "frames); " + WARNING in text
    assert timeline
    assert shown is None  # a clip can't be reported


@pytest.mark.parametrize("how", ["--json", "--csv", "table"])
def test_the_command_line_says_what_of_a_clip_was_not_seen(candidate, cut, capsys, monkeypatch, how):
    monkeypatch.setenv("COLUMNS", "300")
    options = ["--no-detect", "--model", str(candidate.folder), *([] if how == "table" else [how])]
    assert main(["predict", str(cut), *options]) == 2  # a part could not be read, which may be the fake one
    out, err = capsys.readouterr()
    if how == "table":
        assert WARNING in out
        return
    row = json.loads(out) if how == "--json" else next(csv.DictReader(io.StringIO(out)))
    assert WARNING in row["warning"]
    assert row["frames_seen"] in (48, "48")
    assert row["frames_asked"] in (48, "48")
    assert WARNING in err


@pytest.mark.parametrize(
    ("name", "form"),
    [("mkv", None), ("mov", None), ("flv", None), ("ts", None), ("m2ts", "mpegts"), ("mpg", None), ("avi", None)],
)
def test_the_same_pictures_in_any_container_get_the_same_verdict(detector, two_people, tmp_path, name, form):
    def judge(file):
        (verdict,) = judge_clip(Predictor(detector, detect=False), file).verdicts
        return {name: value for name, value in verdict.as_row().items() if name not in ("image", "box")}

    expected = judge(two_people)
    assert expected["frames_seen"] == expected["frames_asked"] == 48
    found = judge(remux(two_people, tmp_path / f"clip.{name}", form))
    assert found == pytest.approx(expected, abs=0.002)  # seconds are rounded to milliseconds


def test_no_face_in_a_clip_is_said(tmp_path, detector):
    file = write_clip(tmp_path / "wall.mp4", [grey(100, (320, 240)) for _ in range(10)])
    (verdict,) = judge_clip(Predictor(detector), file, frames=5).verdicts
    assert "no face was found in 5 frames" in verdict.error
    assert not verdict.unreadable


@pytest.mark.slow
def test_the_command_line_takes_clips_among_images(candidate, two_people, tmp_path, capsys):
    draw_portrait(3).save(tmp_path / "face.png")
    names = [str(tmp_path / "face.png"), str(two_people)]
    assert main(["predict", *names, "--model", str(candidate.folder), "--explain", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "48 frames" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "face.explained.png",
        "two.explained.png",
        "two.timeline.png",
    }
