"""The frames of clips whose number is drawn into each, in every container that the installed PyAV writes."""

import contextlib
import random

import av
import numpy as np
import pytest

from deepfake_core.detector import UnreadableImageError
from deepfake_core.serving import packets
from deepfake_core.serving.frames import ClipFrames
from tests.numbered_clips import CODEC_OPTIONS, CONTAINERS, RATE, read_number, write_numbered

NOMINAL = {"mpg", "h264.mpg", "m2v.mpg", "h264.avi", "ogv"}
"""Containers that state the times of few frames; for the others, the rate counts."""

WITH_LENGTH = ("mp4", "mov", "3gp", "mkv", "webm", "avi", "h264.avi", "flv", "wmv")


def look(file, count):
    clip = ClipFrames(file, count)
    return clip, [(read_number(image), second) for second, image in clip]


def choose(count, total, gop):
    """Return the frames that are to be chosen of an even clip: each the key frame, if one is near."""
    chosen = []
    for place in (np.arange(count) + 0.5) * total / count:
        key = min(range(0, total, gop), key=lambda one: abs(one - place))
        chosen.append(key if abs(key - place) < 0.499 * total / count else int(place))
    return chosen


@pytest.mark.parametrize("start", [0, 37], ids=["from 0", "from 1.48 s"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_frames_in_any_container(tmp_path, container, start):
    file = write_numbered(tmp_path, container, range(start, start + 100))
    gop = 19 if CONTAINERS[container][0] in ("mpeg2video", "mpeg4") else 20  # these count B-frames otherwise
    for count, expected in ((10, choose(10, 100, gop)), (33, choose(33, 100, gop)), (200, range(100))):
        clip, found = look(file, count)
        assert [number for number, _ in found] == list(expected)
        assert [second for _, second in found] == pytest.approx([number / RATE for number in expected], abs=0.002)
        assert (clip.seen, clip.asked, clip.warning) == (len(expected), len(expected), None)


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name not in NOMINAL])
def test_frames_of_a_variable_rate_are_those_of_their_time(tmp_path, container):
    times = np.cumsum([0, *([1] * 40), *([5] * 20), *([2, 1] * 19)])
    clip, found = look(write_numbered(tmp_path, container, times.tolist(), gop=200), 12)
    targets = (np.arange(12) + 0.5) / 12 * times[-1] * len(times) / (len(times) - 1)
    expected = np.searchsorted(times, targets, side="right") - 1
    assert [number for number, _ in found] == expected.tolist()
    assert [second for _, second in found] == pytest.approx((times[expected] / RATE).tolist(), abs=0.002)
    assert clip.warning is None


def test_a_picture_that_stands_long_is_seen_and_so_are_as_many_as_asked(tmp_path):
    clip, found = look(write_numbered(tmp_path, "mkv", [*range(50), 5000, *range(5001, 5050)]), 48)
    numbers = [number for number, _ in found]
    assert 49 in numbers  # it stands for 198 seconds of 202
    assert len(set(numbers)) == clip.asked == clip.seen == 48
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("container", CONTAINERS)
def test_of_a_file_that_was_cut_short_what_is_there_is_seen_and_what_lacks_is_said(tmp_path, container):
    file = write_numbered(tmp_path, container, range(200))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    clip, found = look(file, 10)
    assert 8 <= clip.seen <= 10
    assert all(abs(number / RATE - second) < 0.05 for number, second in found)
    assert found[-1][0] < 195
    if container in WITH_LENGTH:
        assert "the file is cut short" in clip.warning


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "avi", "flv", "webm"])
def test_damage_in_the_middle_costs_only_what_it_hits(tmp_path, container):
    file = write_numbered(tmp_path, container, range(200), gop=10)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 10] = bytes(len(data) // 10)
    file.write_bytes(data)
    clip, found = look(file, 300)
    assert len(found) == clip.seen >= 110
    assert (clip.seen == clip.asked) == (clip.warning is None)
    if container == "mp4":
        assert f"only {clip.seen} of 200 frames could be decoded" in clip.warning


@pytest.mark.slow
@pytest.mark.parametrize("container", ["mp4", "mkv", "mts", "m2ts", "mpg", "avi", "flv", "ogv", "wmv"])
def test_changed_bits_are_an_error_of_ours_or_cost_only_what_they_hit(tmp_path, container):
    data = write_numbered(tmp_path, container, range(60)).read_bytes()
    for seed in range(30):
        draw = random.Random(seed)
        changed = bytearray(data)
        for _ in range(draw.choice([1, 5, 30, 100])):
            changed[draw.randrange(len(data) if seed % 2 else min(len(data), 1500))] ^= 1 << draw.randrange(8)
        (tmp_path / "changed").write_bytes(changed)
        with contextlib.suppress(UnreadableImageError):
            clip = ClipFrames(tmp_path / "changed", 20)
            assert sum(1 for _ in clip) == clip.seen <= 20


def test_a_recording_that_begins_within_a_packet_and_joined_ones_are_healthy(tmp_path):
    file = write_numbered(tmp_path, "ts", range(100))
    data = file.read_bytes()
    file.write_bytes(data[5000:])  # no key frame before number 20
    clip, found = look(file, 48)
    assert [number for number, _ in found if number < 20] == []
    assert clip.warning is None
    file.write_bytes(data + data)  # the clock starts again
    clip, found = look(file, 20)
    assert [number for number, _ in found] == [*range(5, 100, 10)] * 2
    seconds = [second for _, second in found]
    assert seconds == sorted(seconds)
    assert clip.warning is None


def test_frames_come_one_at_a_time_and_key_frames_are_taken_where_they_lie_near(tmp_path):
    clip = ClipFrames(write_numbered(tmp_path, "mp4", range(250), gop=10), 20)
    images = iter(clip)
    found = [read_number(next(images)[1])]
    assert clip.seen == 1
    found += [read_number(image) for _, image in images]
    assert len(found) == 20
    assert all(number % 10 == 0 for number in found)


@pytest.mark.parametrize("parameters", ["intra-refresh=1:keyint=20", "open-gop=1:keyint=20:bframes=3", "tff=1"])
@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "flv"])
def test_key_frames_of_any_kind_cost_no_frame(tmp_path, monkeypatch, container, parameters):
    monkeypatch.setitem(CODEC_OPTIONS, "libx264", {"preset": "veryfast", "x264-params": parameters})
    clip, found = look(write_numbered(tmp_path, container, range(150)), 10)
    assert len(found) == 10
    assert [second for _, second in found] == pytest.approx([number / RATE for number, _ in found], abs=0.002)
    assert clip.warning is None


def test_sound_alone_and_frames_too_large_are_refused(tmp_path, monkeypatch):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(UnreadableImageError, match="holds no pictures"):
        look(tmp_path / "sound.mp4", 5)
    file = write_numbered(tmp_path, "mp4", range(1))
    monkeypatch.setattr(packets, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"1,000 pixels a frame at most. Received: 128 x 64"):
        look(file, 5)


def test_a_codec_that_nobody_knows_is_said_and_odd_titles_are_no_matter(tmp_path):
    clip = write_numbered(tmp_path, "mp4", range(20)).read_bytes()
    (tmp_path / "codec.mp4").write_bytes(clip.replace(b"avc1", b"zzzz"))
    with pytest.raises(UnreadableImageError, match="in a codec that can't be decoded"):
        look(tmp_path / "codec.mp4", 5)
    (tmp_path / "title.mp4").write_bytes(clip.replace(b"Lavf", b"L\xe4\xffv"))
    assert look(tmp_path / "title.mp4", 5)[0].seen == 5
