"""Which files are judged, and as what: by their content."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfake_core.cli import main
from deepfake_core.errors import ConfigurationError
from deepfake_core.serving.file_kinds import find_files, is_clip, list_names
from tests.builders import draw_image, encode, jpeg, stripes
from tests.numbered_clips import CONTAINERS, write_numbered

OTHERS = {
    "notes.txt": b"Got free Python notes\n" * 300,
    "page.html": b"<!DOCTYPE html><html>" + bytes(5000),
    "empty": b"",
    "report.pdf": b"%PDF-1.7\n" + os.urandom(3000),
    "song.mp3": b"ID3\4" + bytes(3000),
    "cover.mp3": b"ID3\4" + bytes(100) + jpeg(1),
    "song.ogg": b"OggS" + bytes(24) + b"\x01vorbis" + bytes(3000),
    "song": b"\0\0\0\x20ftypM4A " + bytes(3000),
    ".DS_Store": b"\0\0\0\1Bud1" + bytes(3000),
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(3000),
    "._photo.jpg": b"\0\5\x16\7" + bytes(3000),
}


def draw_fake():
    return Image.fromarray(stripes(2, 5).pixels[1])  # what the small model learned to call fake


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "MPO", "ICO", "PSD"])
def test_whatever_is_an_image_is_found_by_its_content(tmp_path, form):
    data = b"8BPS\0\1" + bytes(3000) if form == "PSD" else encode(draw_image(1), form)
    write(tmp_path, {"photo": data, "clip.mp4": data, "notes.txt": data})
    known, others = find_files(tmp_path)
    assert (len(known), others) == (3, [])
    assert not any(map(is_clip, known))


RARE = {
    "Fuji": b"FUJIFILMCCD-RAW 0201",
    "Olympus": b"IIRO\x08\0\0\0",
    "Panasonic": b"IIU\0\x18\0\0\0",
    "BigTIFF": b"II\x2b\0\x08\0\0\0",
    "JPEG XR": b"II\xbc\x01",
    "EXR": b"v/1\x01\2\0\0\0",
    "PPM": encode(draw_image(1), "PPM"),
    "PCX": encode(draw_image(1), "PCX"),
    "SGI": encode(draw_image(1), "SGI"),
    "drawing.tga": encode(draw_image(1), "TGA"),
    "BMP with reserved bytes": encode(draw_image(1), "BMP")[:6] + b"\1\0\1\0" + encode(draw_image(1), "BMP")[10:],
    "JPEG behind a line end": b"\n" + jpeg(1),
    "JPEG behind an answer": b"HTTP/1.1 200 OK\r\n\r\n" + jpeg(1),
    **{brand: b"\0\0\0\x1cftyp" + brand.encode() for brand in ("avio", "mif2", "miaf", "heif", "crx ")},
}


@pytest.mark.parametrize("name", RARE)
def test_an_image_of_a_rare_kind_is_not_passed_over(tmp_path, name):
    write(tmp_path, {name: RARE[name] + bytes(500)})
    assert find_files(tmp_path) == ([tmp_path / name], [])
    assert not is_clip(tmp_path / name)


@pytest.mark.parametrize("container", CONTAINERS)
def test_whatever_is_a_clip_is_found_by_its_content(tmp_path, container):
    file = write_numbered(tmp_path, container, range(60))
    for name in ("recording", "photo.jpg", "notes.txt"):
        file = file.rename(tmp_path / name)
        assert is_clip(file)


def test_a_stream_that_begins_within_a_packet_is_a_clip(tmp_path):
    data = write_numbered(tmp_path, "ts", range(60)).read_bytes()
    for cut in (1, 100, 187, 5000):
        (tmp_path / "cut").write_bytes(data[cut:])
        assert is_clip(tmp_path / "cut")


def test_what_is_neither_is_told_apart_and_what_should_be_one_is_not_lost(tmp_path):
    damaged = {"words.jpg": b"words", "none.JFIF": b"", "none.heic": b"", "words.mp4": b"words", "none.ts": b""}
    write(tmp_path, OTHERS | damaged)
    (tmp_path / "gone").symlink_to(tmp_path / "missing.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # would be waited for, for ever
    known, others = find_files(tmp_path)
    assert {file.name for file in known} == {*damaged, "gone"}
    assert {file.name for file in others} == {*OTHERS, "pipe.jpg"}
    assert [file.name for file in known if is_clip(file)] == ["none.ts", "words.mp4"]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3000))
def test_text_is_neither(tmp_path_factory, text):
    folder = write(
        tmp_path_factory.getbasetemp() / "texts", {"words": text.encode(), "more": b"The free " + text.encode()}
    )
    with pytest.raises(ConfigurationError, match="must hold images or clips"):
        find_files(folder)


def test_linked_folders_are_searched_once(tmp_path):
    folder = write(tmp_path / "in", {"a/1.jpg": jpeg(1), "notes.txt": b"notes"})
    outside = write(tmp_path / "outside", {"2": jpeg(2), "below/3": jpeg(3)})
    (folder / "first").symlink_to(outside)
    (folder / "second").symlink_to(outside)
    (folder / "a" / "third").symlink_to(outside / "below")
    (outside / "back").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)  # leads to a folder that holds this one
    known, others = find_files(folder)
    assert sorted(file.read_bytes() for file in known) == sorted(jpeg(seed) for seed in (1, 2, 3))
    assert {str(file.relative_to(folder)) for file in others} == {"notes.txt", "up", "first/back"}
    (tmp_path / "linked").symlink_to(folder)
    assert len(find_files(tmp_path / "linked")[0]) == 3


def test_names_are_listed_up_to_a_number(tmp_path):
    files = [tmp_path / str(number) for number in range(25)]
    assert list_names(files[:2]) == f"{files[0]}, {files[1]}"
    assert list_names(files).endswith(f"{files[19]} and 5 more")


@pytest.mark.parametrize("name", ["download.jfif", "photo", "photo.JPG_large", "notes.txt", "clip.mp4"])
def test_a_fake_of_any_name_is_found_in_a_folder(candidate, tmp_path, capsys, name):
    write(
        tmp_path, {name: encode(draw_fake(), "JPEG", quality=95), "real.png": encode(Image.new("RGB", (32, 32)), "PNG")}
    )
    model = ["--no-detect", "--model", str(candidate.folder)]
    assert main(["predict", str(tmp_path), "--fail-on", "fake", "--json", *model]) == 1
    rows = {row["image"]: row["label"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows == {str(tmp_path / name): "fake", str(tmp_path / "real.png"): "real"}


@pytest.mark.parametrize("form", ["GIF", "TIFF", "AVIF", "damaged", "gone"])
def test_no_fake_is_not_said_where_an_image_was_not_judged(candidate, tmp_path, capsys, form):
    write(tmp_path, {"real.png": encode(Image.new("RGB", (32, 32)), "PNG"), "notes.txt": b"notes"})
    model = ["--no-detect", "--fail-on", "fake", "--csv", "--model", str(candidate.folder)]
    assert main(["predict", str(tmp_path), *model]) == 0
    assert f"Skipped 1 that are neither image nor clip: {tmp_path / 'notes.txt'}" in capsys.readouterr().err
    if form == "gone":
        (tmp_path / "photo").symlink_to(tmp_path / "missing")
    else:
        (tmp_path / "photo").write_bytes(jpeg(1)[:30] if form == "damaged" else encode(draw_fake(), form))
    assert main(["predict", str(tmp_path), *model]) == 2
    assert f"deepfake: {tmp_path / 'photo'}: " in capsys.readouterr().err


def test_a_glob_names_the_folders_that_it_does_not_open_and_broken_links(candidate, tmp_path, capsys):
    write(tmp_path, {"a/fake.png": encode(draw_fake(), "PNG"), "real.png": encode(Image.new("RGB", (32, 32)), "PNG")})
    model = ["--no-detect", "--fail-on", "fake", "--json", "--model", str(candidate.folder)]
    assert main(["predict", str(tmp_path / "*"), *model]) == 0
    assert f"Skipped 1 that are neither image nor clip: {tmp_path / 'a'}" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "**"), *model]) == 1
    (tmp_path / "gone.png").symlink_to(tmp_path / "missing")
    assert main(["predict", str(tmp_path / "*.png"), *model]) == 2
