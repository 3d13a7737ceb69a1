"""Clips, drawn and encoded here."""

import av
import numpy as np
import pytest
from PIL import Image

from deepfake_core.cli import main
from deepfake_core.detector import Detector, UnreadableImageError
from deepfake_core.serving import frames, video
from deepfake_core.serving.frames import sample_frames
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


@pytest.mark.parametrize("gop", [1, 10, 250], ids=["key frames alone", "some key frames", "one key frame"])
@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "webm", "mov"])
def test_frames_are_spread_evenly_and_are_those_of_their_time(tmp_path, gop, container):
    codec = "libvpx" if container == "webm" else "mpeg4" if container == "avi" else "libx264"
    file = write_clip(tmp_path / f"clip.{container}", [grey(20 + 2 * number) for number in range(100)], gop, codec)
    found = list(sample_frames(file, 10))
    assert len(found) == 10
    seconds = np.array([second for second, _ in found])
    assert (np.diff(seconds) > 0).all()
    wanted = (np.arange(10) + 0.5) * 99 / RATE / 10
    assert np.abs(seconds - wanted).max() <= 99 / RATE / 20 + 1 / RATE
    brightness = np.array([np.asarray(image).mean() for _, image in found])
    assert np.abs(brightness - (20 + 2 * seconds * RATE)).max() < 4  # a codec's error; frames are 2 apart


def test_a_clip_of_fewer_frames_gives_each_once(tmp_path):
    file = write_clip(tmp_path / "short.mp4", [grey(50 * number) for number in range(5)])
    assert len(list(sample_frames(file, 48))) == 5


def test_nothing_is_decoded_twice_and_little_where_key_frames_lie_near(tmp_path, monkeypatch):
    file = write_clip(tmp_path / "long.mp4", [grey(number % 200) for number in range(1000)], gop=10)
    decoded = 0
    sample = frames._sample

    class Counting:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def decode(self, stream):
            nonlocal decoded
            for frame in self._container.decode(stream):
                decoded += 1
                yield frame

    monkeypatch.setattr(frames, "_sample", lambda container, count: sample(Counting(container), count))
    assert len(list(sample_frames(file, 20))) == 20
    assert decoded == 20


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
    stream = write_clip(tmp_path / "whole.mkv", [grey(number) for number in range(200)], gop=10).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(stream[: len(stream) // 2])
    assert 3 <= len(list(sample_frames(tmp_path / "cut.mkv", 10))) <= 10


def test_sound_alone_and_frames_too_large_are_refused(tmp_path, monkeypatch):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(UnreadableImageError, match="holds no pictures"):
        list(sample_frames(tmp_path / "sound.mp4", 5))
    file = write_clip(tmp_path / "large.mp4", [grey(1)])
    monkeypatch.setattr(frames, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"1,000 pixels a frame at most. Received: 64 x 48"):
        list(sample_frames(file, 5))


def test_a_codec_that_nobody_knows_is_said_and_odd_titles_are_no_matter(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", [grey(number) for number in range(20)]).read_bytes()
    (tmp_path / "codec.mp4").write_bytes(clip.replace(b"avc1", b"zzzz"))
    with pytest.raises(UnreadableImageError, match="in a codec that can't be decoded"):
        list(sample_frames(tmp_path / "codec.mp4", 5))
    (tmp_path / "title.mp4").write_bytes(clip.replace(b"Lavf", b"L\xe4\xffv"))
    assert len(list(sample_frames(tmp_path / "title.mp4", 5))) == 5


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
