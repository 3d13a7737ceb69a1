"""What one encoded image may cost, and what is made of it whatever Pillow calls its format."""

import io
import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deepfake_core import decoding
from deepfake_core.data.contents import decode
from deepfake_core.decoding import MAX_SCANS, MemoryBudget, UnreadableImageError, decode_image, open_image
from deepfake_core.image_header import JpegFile
from tests.builders import FACES, draw_image, encode, jpeg, mpo, needs_faces

ORIENTATION = 0x0112


def repeat_last_scan(image: Image.Image, scans: int) -> bytes:
    """Make a progressive JPEG of so many scans more."""
    data = encode(image, progressive=True, quality=50)
    end, last = data.rfind(b"\xff\xd9"), data.rfind(b"\xff\xda")
    return data[:end] + data[last:end] * scans + data[end:]


def put_exif(exif: bytes) -> bytes:
    """Put Exif into a JPEG, in as many segments as it needs."""
    parts = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
    return jpeg(1)[:2] + b"".join(segments) + jpeg(1)[2:]


def write_tiff(entries: int, size: int, kind: int = 1, unit: int = 1) -> bytes:
    """Write Exif of so many entries, each of which names the same bytes."""
    fields = b"".join(struct.pack("<HHLL", 1000 + entry, kind, size // unit, 8) for entry in range(entries))
    return (b"II*\0" + struct.pack("<LH", 8, entries) + fields + bytes(4)).ljust(size + 8, b"\0")


def add_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return png[:33] + struct.pack(">L", len(content)) + body + struct.pack(">L", zlib.crc32(body)) + png[33:]


def reason_of(data: bytes) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(data)
    assert decode(data)[0].reason == caught.value.reason  # the index refuses what serving refuses
    return caught.value.reason


def test_a_jpeg_with_pictures_behind_the_first_is_a_jpeg():
    data = mpo(draw_image(1, 96))
    assert Image.open(io.BytesIO(data)).format == "MPO"
    decoded = decode_image(data)
    assert (decoded.format, decoded.size) == ("JPEG", (96, 96))
    content, _ = decode(data)
    assert (content.format, content.reason, content.width) == ("JPEG", "", 96)


def test_only_the_first_frame_of_an_animation_is_decoded():
    frames = [draw_image(seed, 64) for seed in range(3)]
    for form in ("PNG", "WEBP"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:] * 200, lossless=True)
        started = time.process_time()
        decoded = decode_image(data)
        assert time.process_time() - started < 1
        assert decoded.format == form
        assert (np.asarray(decoded) == np.asarray(frames[0])).all()


@pytest.mark.parametrize("scans", [MAX_SCANS, 2000])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(scans):
    data = repeat_last_scan(Image.new("L", (1000, 1000), 128), scans)
    started = time.process_time()
    assert reason_of(data) == "too_many_scans"
    assert time.process_time() - started < 0.5


def test_of_a_large_jpeg_fewer_scans_are_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_SCANNED_PIXELS", 20 * 1_000_000)
    assert decode_image(repeat_last_scan(Image.new("L", (1000, 1000), 128), 10)).size == (1000, 1000)
    assert reason_of(repeat_last_scan(Image.new("L", (1000, 1000), 128), 20)) == "too_many_scans"


def test_scans_of_embedded_pictures_do_not_count():
    preview = b"\xff\xe2" + struct.pack(">H", 4 * MAX_SCANS + 2) + b"\xff\xda\0\2" * MAX_SCANS
    data = jpeg(1)[:2] + preview + jpeg(1)[2:] + b"\xff\xda\0\2" * MAX_SCANS
    assert decode_image(data).tobytes() == decode_image(jpeg(1)).tobytes()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 10**9))
def test_scans_of_garbage_are_counted_or_refused(garbage, pixels):
    for data in (garbage, jpeg(1)[:2] + garbage * 50, jpeg(1) + garbage):
        try:
            decoding.check_scans(data, pixels)
        except UnreadableImageError as exc:
            assert data.count(b"\xff\xda") > 1
            assert exc.reason == "too_many_scans"


@needs_faces
@pytest.mark.slow
def test_every_real_face_has_far_fewer_scans_than_the_limit():
    files = sorted((FACES / "faces").rglob("*.jpg"))
    assert len(files) > 1000
    assert max(file.read_bytes().count(b"\xff\xda") for file in files) <= MAX_SCANS // 5


def put_chunks(data: bytes, kind: bytes, count: int) -> bytes:
    """Put empty chunks into a WebP."""
    body = data[8:] + (kind + bytes(4)) * count
    return data[:4] + struct.pack("<L", len(body)) + body


EMPTY_CHUNK = struct.pack(">L4sL", 0, b"prVt", zlib.crc32(b"prVt"))
PNG, WEBP = encode(draw_image(1), "PNG"), encode(draw_image(1), "WEBP", exif=b"Exif\0\0II")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(jpeg(1)[:2] + b"\xff\xe5\0\2" * 300_000 + jpeg(1)[2:], id="segments"),
        pytest.param(jpeg(1)[:2] + b"\xff\xe1\0\x08Exif\0\0" * 300_000 + jpeg(1)[2:], id="Exif"),
        pytest.param(
            jpeg(1)[:2] + (b"\xff\xe1\xfd\xe8Exif\0\0" + bytes(64_994)) * 500 + jpeg(1)[2:], id="32 MB of Exif"
        ),
        pytest.param(jpeg(1)[:2] + b"\xff\xf0\xff\xff" * 300_000 + jpeg(1)[2:], id="markers"),
        pytest.param(jpeg(1)[:20] + bytes(1_000_000) + jpeg(1)[20:], id="junk"),
        pytest.param(PNG[:33] + EMPTY_CHUNK * 300_000 + PNG[33:], id="PNG"),
        pytest.param(PNG[:-12] + EMPTY_CHUNK * 300_000 + PNG[-12:], id="behind a PNG's picture"),
        pytest.param(put_chunks(WEBP, b"abcd", 300_000), id="WebP"),
    ],
)
def test_a_header_of_many_segments_is_refused_before_it_is_read(data):
    tracemalloc.start()
    started = time.process_time()
    try:
        assert reason_of(data) == "too_many_segments"
        assert time.process_time() - started < 3  # reading 300,000 segments twice takes more
        assert tracemalloc.get_traced_memory()[1] < 120_000_000  # for 32 MB of Exif; else under 10
    finally:
        tracemalloc.stop()


def test_what_real_files_hold_is_not_too_many_segments():
    assert decode_image(jpeg(1)[:2] + (b"\xff\xe5\0\2" + b"\xff" * 4) * 100 + jpeg(1)[2:]).size == (48, 48)
    assert decode_image(jpeg(1) + bytes(1_000_000)).size == (48, 48)
    assert decode_image(PNG + bytes(1_000_000)).size == (48, 48)
    assert decode_image(WEBP + bytes(1_000_000)).size == (48, 48)


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_side_is_limited_as_the_area_is(form, size):
    assert reason_of(encode(Image.new("L", size), form)) == "too_large"


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif", b"avio", b"mif2", b"miaf"])
def test_heic_is_named(brand):
    assert reason_of(b"\0\0\0\x18ftyp" + brand + bytes(100)) == "heic"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(put_exif(write_tiff(20_000, 250_000)), id="Exif in a JPEG"),
        pytest.param(add_chunk(encode(draw_image(1), "PNG"), b"eXIf", write_tiff(20_000, 250_000)), id="Exif in a PNG"),
        pytest.param(
            encode(draw_image(1), "WEBP", exif=b"Exif\0\0" + write_tiff(20_000, 250_000)), id="Exif in a WebP"
        ),
        pytest.param(
            add_chunk(
                encode(draw_image(1), "PNG"),
                b"zTXt",
                b"Raw profile type exif\0\0"
                + zlib.compress(b"\nexif\n  250008\n" + write_tiff(20_000, 250_000).hex().encode()),
            ),
            id="Exif as ImageMagick wrote it",
        ),
        pytest.param(
            jpeg(1)[:2]
            + b"\xff\xe2"
            + struct.pack(">H", 60_014)
            + b"MPF\0"
            + write_tiff(5000, 60_000, 3, 2)
            + jpeg(1)[2:],
            id="a list of pictures",
        ),
    ],
)
def test_exif_of_many_entries_takes_neither_memory_nor_time(data):
    assert len(data) < 300_000
    started = time.process_time()
    tracemalloc.start()
    try:
        assert decode_image(data).size == (48, 48)
        assert decode(data)[0].reason == ""
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 5


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_orientation_is_read_as_pillow_reads_it(form, orientation, endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[ORIENTATION] = "a camera's maker", orientation
    data = encode(draw_image(1, 48).crop((0, 0, 48, 32)), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode_image(data).tobytes() == expected.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.mark.parametrize("exif", [None, 1, 3])
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_the_index_turns_an_image_as_serving_does_where_xmp_alone_says_so(form, exif):
    stored = draw_image(1, 200).crop((0, 0, 200, 120))
    other = Image.Exif()
    other[ORIENTATION] = exif
    data = encode(stored, form, xmp=XMP % 6, **({"exif": other} if exif else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (expected.size == (120, 200)) == (exif is None)
    assert decode_image(data).tobytes() == expected.convert("RGB").tobytes()
    content, grey = decode(data)
    assert (content.width, content.height) == expected.size
    assert (grey.shape[0] > grey.shape[1]) == (exif is None)


def zip_text(key: bytes, text: bytes) -> tuple[bytes, bytes]:
    return b"zTXt", key + b"\0\0" + zlib.compress(text)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        pytest.param(b"iCCP", b"a profile\0\0" + zlib.compress(bytes(2_000_000)), id="a colour profile of 2 MB"),
        pytest.param(*zip_text(b"Comment", b"a" * 2_000_000), id="text of 2 MB"),
        pytest.param(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000), id="XMP of 2 MB"),
        pytest.param(b"tEXt", b"workflow\0" + b"a" * 70_000_000, id="plain text of 70 MB"),
        pytest.param(*zip_text(b"Raw profile type exif", b"\nexif\n  12\nno hex"), id="Exif that is no hex"),
        pytest.param(b"tEXt", b"xmp\0text", id="a key that Pillow takes for its own"),
        pytest.param(b"pHYs", b"\0", id="a resolution cut short"),
    ],
)
def test_metadata_that_can_not_be_read_costs_no_png(kind, content):
    before = add_chunk(PNG, kind, content)
    chunk = before[33 : 45 + len(content)]
    for data in (before, PNG[:-12] + chunk + PNG[-12:]):  # and behind the picture
        tracemalloc.start()
        try:
            assert decode_image(data).tobytes() == draw_image(1).tobytes()
            assert decode(data)[0].reason == ""
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()


def test_damaged_exif_costs_the_orientation_and_not_the_picture():
    whole = Image.Exif()
    whole[ORIENTATION] = 6
    for exif in (b"", b"II", b"MM\0*\0\0\0\xff", b"nothing at all", whole.tobytes()[6:-9]):
        assert decode_image(put_exif(exif)).size == (48, 48)
    assert JpegFile(put_exif(b"nothing")).getexif() == {}


def test_memory_is_shared_out_whatever_the_number_of_threads():
    budget, held, most = MemoryBudget(100), [0], [0]

    def use(amount: int) -> None:
        for _ in range(20):
            with budget.hold(amount):
                held[0] += amount
                most[0] = max(most[0], held[0])
                time.sleep(0.001)
                held[0] -= amount

    threads = [threading.Thread(target=use, args=(amount,)) for amount in (10, 30, 30, 60, 90, 100, 500) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most[0] == 500  # alone: one that is larger than all there is
    assert held[0] == 0


def test_memory_is_given_back_where_decoding_fails():
    for data in (jpeg(1)[:300], b"no image", jpeg(1)):
        for _ in range(3):
            try:
                with open_image(data) as image:
                    assert image.size == (48, 48)
                    raise ZeroDivisionError
            except (UnreadableImageError, ZeroDivisionError):
                pass
    assert decoding.DECODING._held == 0
