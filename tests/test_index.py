import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from deepfake_core import detector
from deepfake_core.archive import fetch_archive
from deepfake_core.config import Source
from deepfake_core.errors import DatasetError
from deepfake_core.index import build_index
from tests.conftest import draw_image, encode, faces, jpeg, recode, write_zip


def index_of(path: Path, **rule: object):
    source = Source(name=str(path), **rule)
    data_dir = path.parent / "data"
    return build_index(fetch_archive(source, data_dir), data_dir).set_index("member")


def test_every_file_is_a_row_and_says_why_it_is_left_out(make_zip, monkeypatch):
    monkeypatch.setattr(detector, "MAX_PIXELS", 100 * 100)
    whole = jpeg(1)
    index = index_of(
        make_zip(
            {
                "real/a.jpg": whole,
                "fake/b.png": encode(draw_image(2), "PNG"),
                "fake/c.webp": encode(draw_image(3), "WEBP"),
                "real/truncated.jpg": whole[: len(whole) // 2],
                "real/words.jpg": b"this is no image",
                "real/empty.jpg": b"",
                "real/huge.png": encode(Image.new("L", (101, 100)), "PNG"),
                "elsewhere/d.jpg": jpeg(4),
                "notes.txt": b"hello",
            }
        )
    )
    assert index["reason"].to_dict() == {
        "real/a.jpg": "",
        "fake/b.png": "",
        "fake/c.webp": "",
        "real/truncated.jpg": "truncated",
        "real/words.jpg": "not_an_image",
        "real/empty.jpg": "not_an_image",
        "real/huge.png": "too_large",
        "elsewhere/d.jpg": "no_label",
        "notes.txt": "not_an_image",
    }
    assert index["format"].to_dict()["fake/c.webp"] == "WEBP"
    assert index.loc["real/a.jpg", ["label", "width", "height"]].tolist() == ["real", 48, 48]


def test_a_small_file_that_declares_absurd_dimensions_costs_no_memory(make_zip):
    tiny = encode(Image.new("L", (1, 1)), "PNG")
    header = tiny[:16] + (60_000).to_bytes(4, "big") + (60_000).to_bytes(4, "big") + tiny[24:29]
    import zlib

    bomb = header + zlib.crc32(header[12:29]).to_bytes(4, "big") + tiny[33:]
    index = index_of(make_zip({"real/a.jpg": jpeg(1), "fake/bomb.png": bomb}))
    assert index.loc["fake/bomb.png", "reason"] == "too_large"


@pytest.mark.parametrize(
    "name", ["../real/x.jpg", "/etc/real/x.jpg", "real/../../x.jpg", "C:/real/x.jpg", "..\\real\\x"]
)
def test_names_that_lead_out_of_the_archive_are_never_followed(make_zip, name):
    index = index_of(make_zip({"real/a.jpg": jpeg(1), name: jpeg(2)}))
    assert index.loc[name, "reason"] == "unsafe_name"


def test_symlinks_are_never_followed(tmp_path):
    link = zipfile.ZipInfo("real/link.jpg")
    link.external_attr = 0o120777 << 16
    path = tmp_path / "links.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("real/a.jpg", jpeg(1))
        archive.writestr(link, "/etc/passwd")
    assert index_of(path).loc["real/link.jpg", "reason"] == "symlink"

    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (folder / "real" / "a.jpg").write_bytes(jpeg(1))
    (folder / "real" / "link.jpg").symlink_to("/etc/passwd")
    (folder / "outside").symlink_to(tmp_path)
    index = index_of(folder)
    assert index["reason"].to_dict() == {"outside": "symlink", "real/a.jpg": "", "real/link.jpg": "symlink"}


def test_a_repeated_member_name_is_read_once(tmp_path):
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("real/a.jpg", jpeg(1))
        archive.writestr("real/a.jpg", jpeg(2))
    assert sorted(index_of(path)["reason"]) == ["", "repeated_name"]


def test_equal_pixels_share_a_group_whatever_their_bytes(make_zip):
    index = index_of(make_zip({"real/a.jpg": jpeg(1), "real/b.jpg": recode(jpeg(1)), "real/c.jpg": jpeg(2)}))
    assert index.loc["real/a.jpg", "sha256"] != index.loc["real/b.jpg", "sha256"]
    assert index.loc["real/a.jpg", "group"] == index.loc["real/b.jpg", "group"]
    assert index.loc["real/a.jpg", "group"] != index.loc["real/c.jpg", "group"]


def test_the_innermost_named_folder_decides_the_label(make_zip):
    index = index_of(make_zip({"real_vs_fake/real/fake/x.jpg": jpeg(1), "fake/sub/y.jpg": jpeg(2)}))
    assert index["label"].to_dict() == {"fake/sub/y.jpg": "fake", "real_vs_fake/real/fake/x.jpg": "fake"}


def csv(*rows: str) -> bytes:
    return "\n".join([",original_path,id,label,label_str,path", *rows]).encode()


def test_csv_files_must_agree_with_the_folders(tmp_path):
    members = {"top/train/real/1.jpg": jpeg(1), "top/train/fake/2.jpg": jpeg(2)}
    right = csv("0,a,1,1,real,train/real/1.jpg", "1,b,2,0,fake,train/fake/2.jpg")
    wrong = csv("0,a,1,1,real,train/real/1.jpg", "1,b,2,1,real,train/fake/2.jpg")
    agreeing = write_zip(tmp_path / "right.zip", members | {"train.csv": right})
    assert (index_of(agreeing, csv_real_label=1)["reason"] == "").sum() == 2

    disagreeing = write_zip(tmp_path / "wrong.zip", members | {"train.csv": wrong})
    with pytest.raises(DatasetError, match=r"top/train/fake/2.jpg.*train.csv has label 1, which means real"):
        index_of(disagreeing, csv_real_label=1)
    with pytest.raises(DatasetError, match="agree on every label"):
        index_of(agreeing, csv_real_label=0)  # the trap: in the 140k set 1 means real
    assert not list((tmp_path / "data" / "indexes").glob("wrong*"))


def test_a_csv_rule_without_csv_files_is_refused(make_zip):
    with pytest.raises(DatasetError, match="needs csv files"):
        index_of(make_zip(faces(1)), csv_real_label=1)


def test_a_source_without_labelled_images_is_refused(make_zip):
    with pytest.raises(DatasetError, match=r"folders named 'real' or 'fake'.*elsewhere"):
        index_of(make_zip({"elsewhere/a.jpg": jpeg(1)}))
    with pytest.raises(DatasetError, match="0 files"):
        index_of(make_zip({}, "empty.zip"))


def test_an_unchanged_archive_is_not_read_again(make_zip, monkeypatch):
    path = make_zip(faces(2))
    first = index_of(path)
    monkeypatch.setattr("deepfake_core.index.decode_image", None)  # any decoding would fail
    assert index_of(path).equals(first)


def test_names_that_are_no_text_are_listed_and_read(tmp_path):
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    Path(os.fsdecode(bytes(folder / "real") + b"/caf\xe9.jpg")).write_bytes(jpeg(1))
    index = index_of(folder)
    assert index["reason"].to_dict() == {"real/caf\\xe9.jpg": ""}


def test_a_changed_folder_is_indexed_again(tmp_path):
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (folder / "real" / "a.jpg").write_bytes(jpeg(1))
    assert len(index_of(folder)) == 1
    (folder / "real" / "b.jpg").write_bytes(jpeg(2))
    assert len(index_of(folder)) == 2
    os.utime(folder / "real" / "a.jpg", (1, 1))
    assert len(index_of(folder)) == 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_all_colour_modes_become_rgb(mode):
    image = draw_image(1).convert(mode)
    form = "JPEG" if mode in ("L", "CMYK") else "PNG"
    decoded = detector.decode_image(encode(image, form))
    assert decoded.mode == "RGB"
    assert decoded.format == form
    assert decoded.size == image.size


def test_images_are_turned_upright():
    image = draw_image(1, 48).crop((0, 0, 48, 32))
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    turned = detector.decode_image(encode(image, "PNG", exif=exif))
    assert turned.size == (32, 48)
    assert turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_only_three_formats_are_decoded():
    buffer = io.BytesIO()
    draw_image(1).save(buffer, "BMP")
    with pytest.raises(detector.UnreadableImageError) as caught:
        detector.decode_image(buffer.getvalue())
    assert caught.value.reason == "not_an_image"
