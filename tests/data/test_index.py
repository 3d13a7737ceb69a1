import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfake_core import decoding, detector
from deepfake_core.config import Source
from deepfake_core.data.contents import decode
from deepfake_core.data.hashes import shrink_images
from deepfake_core.data.index import build_index, index_shard, list_shards
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.errors import ArchiveError, DatasetError, SourceError
from deepfake_core.storage.store import open_store
from tests.builders import draw_image, encode, faces, forbid, jpeg, recode, write_zip


def index_of(path: Path, **rule: object):
    source = Source(name=str(path), **rule)
    data_dir = path.parent / "data"
    return build_index(fetch_archive(source, open_store(data_dir)), open_store(data_dir)).set_index("member")


def test_every_file_is_a_row_and_says_why_it_is_left_out(make_zip, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100 * 100)
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
    assert index.loc[name.replace("\\", "/"), "reason"] == "unsafe_name"


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


def test_members_of_one_name_are_a_row_each(tmp_path):
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("real/a.jpg", jpeg(1))
        archive.writestr("real/a.jpg", jpeg(2))
        archive.writestr("real\\a.jpg", jpeg(3))
    index = index_of(path)
    assert index["reason"].to_dict() == {"real/a.jpg": "", "real/a.jpg (2)": "", "real/a.jpg (3)": ""}
    assert index["sha256"].tolist() == [hashlib.sha256(jpeg(seed)).hexdigest() for seed in (1, 2, 3)]


def test_equal_pixels_have_equal_thumbnails_and_hashes_whatever_their_bytes(make_zip):
    index = index_of(make_zip({"real/a.jpg": jpeg(1), "real/b.jpg": recode(jpeg(1)), "real/c.jpg": jpeg(2)}))
    a, b, c = (index.loc[f"real/{name}.jpg"] for name in "abc")
    assert a["sha256"] != b["sha256"]
    assert a["bytes"] == b["bytes"] - 9 == len(jpeg(1))
    assert (a["hash"], a["thumbnail"]) == (b["hash"], b["thumbnail"])
    assert len(a["hash"]) == 32
    assert len(a["thumbnail"]) == 32 * 32
    assert a["hash"] != c["hash"]


def read_thumbnails(index: pd.DataFrame) -> np.ndarray:
    return np.frombuffer(b"".join(index["thumbnail"]), np.uint8).reshape(-1, 32, 32)


def test_thumbnails_are_the_picture_averaged_over_cells_whatever_decodes_it(make_zip):
    image = draw_image(1, 640)
    members = {
        "real/a.jpg": encode(image, quality=95),
        "real/b.jpg": encode(image, quality=95, progressive=True),
        "real/c.png": encode(image, "PNG"),
        "real/d.webp": encode(image, "WEBP", lossless=True),
        "real/e.jpg": encode(image.resize((480, 480), Image.Resampling.BOX), quality=95),
        "real/f.jpg": encode(image.resize((67, 67), Image.Resampling.BOX), "PNG"),
    }
    thumbnails = read_thumbnails(index_of(make_zip(members))).astype(int)
    expected = np.asarray(image.convert("L")).reshape(32, 20, 32, 20).mean((1, 3))
    assert np.abs(thumbnails - expected).max() <= 3


def test_a_jpeg_turned_by_exif_is_upright(make_zip):
    image = draw_image(1, 128).crop((0, 0, 128, 96))
    exif = Image.Exif()
    exif[274] = 6
    upright = image.transpose(Image.Transpose.ROTATE_270)
    members = {"real/a.jpg": encode(image, quality=95, exif=exif), "real/b.jpg": encode(upright, quality=95)}
    index = index_of(make_zip(members))
    assert index[["width", "height"]].to_numpy().tolist() == [[96, 128]] * 2
    assert index["jpeg_table"].nunique() == 1
    first, second = read_thumbnails(index).astype(int)
    assert np.abs(first - second).max() <= 2


def test_quantisation_tables_are_named_by_quality_and_digest(make_zip):
    image = draw_image(1)
    exif = Image.Exif()
    exif[271] = "a camera that leaves a thumbnail \xff\xda"
    members = {f"real/{quality}.jpg": encode(image, quality=quality) for quality in (30, 50, 75, 95)}
    members["real/exif.jpg"] = encode(image, quality=75, exif=exif)
    members["real/none.png"] = encode(image, "PNG")
    tables = index_of(make_zip(members))["jpeg_table"]
    for quality in (30, 50, 75, 95):
        assert tables[f"real/{quality}.jpg"].startswith(f"q{quality}-")
    assert tables["real/exif.jpg"] == tables["real/75.jpg"]
    assert tables["real/none.png"] == ""
    assert tables.nunique() == 5


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (31, 33), (2000, 300), (70, 9000)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_images_of_any_shape_are_kept_small_until_they_are_shrunk(size, form):
    wide = draw_image(1, 64).resize(size, Image.Resampling.BILINEAR)
    data = encode(wide, form)
    content, pixels = decode(data)
    assert (content.width, content.height) == size
    assert max(pixels.shape) <= 256
    thumbnail = shrink_images(pixels[None])[0].astype(int)
    expected = np.asarray(wide.convert("L").resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(thumbnail - expected).mean() < 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.booleans())
def test_a_jpeg_cut_anywhere_is_no_usable_image(cut, progressive):
    data = encode(draw_image(1, 200), quality=90, progressive=progressive)
    cut = min(cut, len(data) - 3)  # without the end marker's two bytes alone, the picture is whole
    content, _ = decode(data[:cut])
    assert content.reason in ("truncated", "not_an_image")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(0, 255))
def test_a_damaged_header_raises_nothing(position, value):
    data = bytearray(jpeg(1))
    data[position] = value
    content, _ = decode(bytes(data))
    assert content.reason in ("", "truncated", "not_an_image", "too_large")


def test_shards_of_any_size_on_any_number_of_threads_give_the_same_index(make_zip, monkeypatch):
    members = faces(30) | {f"real/png{i}.png": encode(draw_image(i, 50 + i), "PNG") for i in range(10)}
    path = make_zip(members)
    expected = index_of(path)
    for number, (shard, at_once, cores) in enumerate([(1, 1, 1), (7, 3, 5), (1000, 128, 2)]):
        monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", shard)
        monkeypatch.setattr("deepfake_core.data.index.DECODED_AT_ONCE", at_once)
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        archive = fetch_archive(Source(name=str(path)), open_store(path.parent))
        again = build_index(archive, open_store(path.parent / str(number))).set_index("member")
        pd.testing.assert_frame_equal(again, expected)


@pytest.fixture
def decoded(monkeypatch):
    """Count what is decoded."""
    sizes = []
    monkeypatch.setattr("deepfake_core.data.index.decode", lambda data: sizes.append(len(data)) or decode(data))
    return sizes


def test_equal_bytes_are_decoded_once(make_zip, decoded):
    copies = {f"again/{name}": data for name, data in faces(5).items()}
    index = index_of(make_zip(faces(5) | copies))
    assert len(decoded) == 10
    assert index.loc["real/3.jpg", "hash"] == index.loc["again/real/3.jpg", "hash"]


def test_of_a_grown_archive_only_new_images_are_decoded(make_zip, decoded, caplog):
    index_of(make_zip(faces(100)))
    assert len(decoded) == 200
    path = make_zip(faces(101) | {"readme.txt": b"hello"})
    with caplog.at_level("INFO", "deepfake_core"):
        grown = index_of(path)
    assert len(decoded) == 203
    assert "203 files, 3 decoded now" in caplog.text
    path.rename(path.with_name("other.zip"))  # a source that is new here
    fresh = index_of(path.with_name("other.zip"))
    pd.testing.assert_frame_equal(grown.drop(columns="source"), fresh.drop(columns="source"))


def test_compressed_and_stored_members_read_the_same(tmp_path):
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in faces(3).items():
            archive.writestr(name, data)
    stored = index_of(write_zip(tmp_path / "stored.zip", faces(3)))
    deflated = index_of(tmp_path / "deflated.zip")
    pd.testing.assert_frame_equal(stored.drop(columns="source"), deflated.drop(columns="source"))


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
    forbid(monkeypatch, "deepfake_core.data.index.decode")
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


def test_16_bit_greys_keep_their_shades():
    greys = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(detector.decode_image(encode(Image.fromarray(greys), "PNG")))
    assert (decoded == (greys >> 8)[..., None]).all()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_images_are_decoded_in_bounded_memory_on_any_number_of_cores(tmp_path, orientation):
    """Six images of 36 million pixels on 16 cores; decoded all at once, they would take 2 to 4 GB."""
    exif = Image.Exif()
    exif[274] = orientation
    options = {"exif": exif} if orientation > 1 else {}
    whole = encode(Image.new("RGB", (6000, 6000), "teal"), progressive=True, subsampling=0, **options)
    members = {f"real/{i}.jpg": whole[:2] + b"\xff\xfe\0\3%d" % i + whole[2:] for i in range(6)}
    path = write_zip(tmp_path / "large.zip", members)
    code = (
        "import os, resource, sys; os.cpu_count = lambda: 16\n"
        "from deepfake_core.config import Source; from deepfake_core.data import index\n"
        "from deepfake_core.data.kaggle import fetch_archive; from deepfake_core.storage.store import open_store\n"
        "index.DECODED_AT_ONCE = 1; store = open_store(sys.argv[2])\n"
        "measure = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = measure()\n"
        "rows = index.build_index(fetch_archive(Source(name=sys.argv[1]), store), store)\n"
        "assert (rows['reason'] == '').sum() == 6; print(measure() - before)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "data")]
    used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert used < 1.1 * decoding.MAX_DECODING_BYTES


@pytest.mark.process
@pytest.mark.parametrize(("renamed", "left"), [("/0000000010-", 10), (r"\.partial$", 0)])
def test_an_index_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch, decoded, renamed, left):
    """It is killed when it is about to name its third shard, or to remove all shards. None is made again."""
    path = write_zip(tmp_path / "a.zip", faces(10))
    (tmp_path / "whole").mkdir()
    whole = index_of(write_zip(tmp_path / "whole" / "a.zip", faces(10)))
    code = (
        "import os, re, sys; from deepfake_core.config import Source; from deepfake_core.data import index\n"
        "from deepfake_core.data.kaggle import fetch_archive; from deepfake_core.storage.store import open_store\n"
        "is_it = re.compile(sys.argv[3]).search\n"
        "die = lambda event, what: event == 'os.rename' and is_it(str(what[1])) and os.kill(os.getpid(), 9)\n"
        "index.SHARD_SIZE = 5; store = open_store(sys.argv[2]); sys.addaudithook(die)\n"
        "index.build_index(fetch_archive(Source(name=sys.argv[1]), store), store)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "data"), renamed]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", 5)
    decoded.clear()
    pd.testing.assert_frame_equal(index_of(path), whole)
    assert len(decoded) == left
    (one,), (other,) = [(folder / "data" / "indexes").glob("*.parquet") for folder in (tmp_path, tmp_path / "whole")]
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()
    assert not list(one.parent.glob(".*"))


def test_a_shard_with_a_file_that_could_not_be_read_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", 3)
    for name, data in faces(3).items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    store = open_store(tmp_path / "data")
    archive = fetch_archive(Source(name=str(tmp_path / "a")), store)
    shards = list_shards([archive], store)
    away = (tmp_path / "a" / "real" / "1.jpg").rename(tmp_path / "away.jpg")
    for shard in shards:
        index_shard(shard, threads=1)
    assert list_shards([archive], store) == shards[1:]
    away.rename(tmp_path / "a" / "real" / "1.jpg")
    assert build_index(archive, store)["reason"].eq("").all()


def test_a_machine_that_does_not_see_the_data_folder_is_named(make_zip, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", 3)
    path = make_zip(faces(3))
    store = open_store(path.parent / "data")
    shard = list_shards([fetch_archive(Source(name=str(path)), store)], store)[0]
    store.folder.rename(path.parent / "elsewhere")
    with pytest.raises(SourceError, match=f"{socket.gethostname()}, which has no {store.folder}"):
        index_shard(shard, threads=1)


def test_archives_of_one_shard_need_no_tasks(make_zip):
    path = make_zip(faces(3))
    store = open_store(path.parent / "data")
    assert list_shards([fetch_archive(Source(name=str(path)), store)], store) == []


def test_an_archive_whose_index_is_there_is_not_opened_for_shards(make_zip, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", 3)
    path = make_zip(faces(3))
    store = open_store(path.parent / "data")
    archive = fetch_archive(Source(name=str(path)), store)
    build_index(archive, store)
    forbid(monkeypatch, "deepfake_core.data.shards.open_members")
    assert list_shards([archive], store) == []


def test_an_archive_that_was_replaced_by_one_as_large_is_refused_and_nothing_of_it_is_kept(make_zip, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", 3)
    first, second = (make_zip(faces(3, start=start), name) for start, name in ((0, "faces.zip"), (10, "others.zip")))
    size = max(path.stat().st_size for path in (first, second))
    for path in (first, second):
        with zipfile.ZipFile(path, "a") as opened:  # a comment fills the smaller one up
            opened.comment = b" " * (size + 10 - path.stat().st_size)
    assert first.stat().st_size == second.stat().st_size
    store = open_store(first.parent / "data")
    archive = fetch_archive(Source(name=str(first)), store)
    index_shard(list_shards([archive], store)[0], 1)
    second.replace(first)
    with pytest.raises(ArchiveError, match=r"must not change during a run.*written to since it was hashed"):
        build_index(archive, store)
    assert not list(store.indexes().rglob("*.parquet"))
    build_index(fetch_archive(Source(name=str(first)), store), store)


def test_an_archive_that_was_replaced_while_shards_read_it_is_refused(make_zip):
    path = make_zip(faces(3))
    store = open_store(path.parent / "data")
    archive = fetch_archive(Source(name=str(path)), store)
    make_zip(faces(4))
    with pytest.raises(ArchiveError, match=r"must not change during a run.*bytes, now it has"):
        build_index(archive, store)
    path.unlink()
    with pytest.raises(SourceError, match="must have it at the same path"):
        build_index(archive, store)
