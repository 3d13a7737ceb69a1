"""Clips whose frames show their numbers, in every container that the installed PyAV writes."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

RATE = 25
BLOCK = 32

CONTAINERS = {
    "mp4": ("libx264", "mp4", {"movflags": "faststart"}),
    "mov": ("libx264", "mov", {"movflags": "faststart"}),
    "3gp": ("libx264", "3gp", {"movflags": "faststart"}),
    "mkv": ("libx264", "matroska", {}),
    "webm": ("libvpx-vp9", "webm", {}),
    "flv": ("libx264", "flv", {}),
    "ts": ("libx264", "mpegts", {}),
    "mts": ("mpeg2video", "mpegts", {}),
    "m2ts": ("libx264", "mpegts", {"mpegts_m2ts_mode": "1"}),
    "mpg": ("mpeg2video", "mpeg", {}),
    "h264.mpg": ("libx264", "mpeg", {}),
    "m2v.mpg": ("mpeg2video", "mpeg2video", {}),
    "avi": ("mpeg4", "avi", {}),
    "h264.avi": ("libx264", "avi", {}),
    "ogv": ("libvpx", "ogg", {}),
    "wmv": ("wmv2", "asf", {}),
}
"""Codec, format and its options, by what the file's name ends in."""

CODEC_OPTIONS = {
    "libx264": {"sc_threshold": "0", "preset": "veryfast", "x264-params": "b-adapt=0"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def draw_number(number):
    """Draw a number's bits as blocks, white for 1, onto a dark gradient."""
    bits = (number >> np.arange(8)).reshape(2, 4) & 1
    blocks = np.kron(bits, np.ones((BLOCK, BLOCK), int)) * 180
    pixels = blocks + np.linspace(0, 50, 4 * BLOCK, dtype=int)
    return Image.fromarray(np.repeat(pixels[:, :, None], 3, axis=2).astype(np.uint8))


def read_number(image):
    grey = np.asarray(image.convert("L")).reshape(2, BLOCK, 4, BLOCK).mean(axis=(1, 3))
    return int(((grey > 115).ravel() << np.arange(8)).sum())


def write_numbered(folder, container, times, gop=20):
    """Encode numbered frames with B-frames, where the codec has any, each shown at its time, in 25ths of a second."""
    codec, form, options = CONTAINERS[container]
    file = folder / f"clip.{container}"
    with av.open(str(file), "w", format=form, options=options) as opened:
        stream = opened.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 4 * BLOCK, 2 * BLOCK, "yuv420p", gop
        stream.bit_rate = 2_000_000
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.options = CODEC_OPTIONS.get(codec, {"sc_threshold": "1000000000", "flags": "+cgop"})
        stream.max_b_frames = 0 if codec == "wmv2" else 2
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(draw_number(number))
            frame.pts, frame.time_base = time, Fraction(1, RATE)
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode())
    return file
