import csv
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deepfake_core.config import KAGGLE_SOURCES
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_links
from deepfake_core.demo import archives, faces, forgeries
from deepfake_core.demo.archives import draw_archives
from deepfake_core.detector import UnreadableImageError, decode_image
from deepfake_core.storage.store import open_store

PER_CLASS = 6
CIPLAB, REUPLOAD, FACES_140K = (f"{source.short_name}.zip" for source in KAGGLE_SOURCES)
ROOT_140K = "real_vs_fake/real-vs-fake/"
EVEN = np.array((0.5, 1, 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "drawn"
    draw_archives(path, PER_CLASS)
    return path


@pytest.fixture(scope="module")
def zips(folder) -> dict[str, dict[str, bytes]]:
    return {path.name: read_zip(path) for path in folder.glob("*.zip")}


def read_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def read_csv_files(members: dict[str, bytes]) -> list[dict[str, str]]:
    names = ("train.csv", "valid.csv", "test.csv")
    return [row for name in names for row in csv.DictReader(io.StringIO(members[name].decode()))]


def read_usable(members: dict[str, bytes], label: str) -> list[np.ndarray]:
    """Decode a class of the 140k-like archive, without the odd ones."""
    times = Counter(members.values())
    pictures = []
    for name, data in members.items():
        if PurePosixPath(name).parent.name == label and b"copied" not in data and times[data] == 1:
            try:
                pictures.append(np.asarray(decode_image(data), dtype=np.float64))
            except UnreadableImageError:
                continue
    assert len(pictures) == PER_CLASS
    return pictures


def measure_grid(picture: np.ndarray) -> float:
    """Return how far the spectrum stands out at period 4, across the rows."""
    spectrum = np.abs(np.fft.rfft(picture.mean(axis=2) - picture.mean(), axis=1)).mean(axis=0)
    at = picture.shape[1] // 4
    return float(spectrum[at] / np.median(np.r_[spectrum[at - 6 : at - 1], spectrum[at + 2 : at + 7]]))


def measure_coldness(picture: np.ndarray) -> float:
    return float(picture[..., 2].mean() / picture[..., 0].mean())


def modified_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
def test_photographs_lie_as_in_the_first_two_archives(zips):
    folders = Counter(str(PurePosixPath(name).parent) for name in zips[CIPLAB])
    tops = ("real_and_fake_face", "real_and_fake_face_detection/real_and_fake_face")
    assert folders == {f"{top}/training_{label}": PER_CLASS for top in tops for label in ("real", "fake")}
    once = {name: data for name, data in zips[CIPLAB].items() if name.startswith(f"{tops[0]}/")}
    assert {name.replace(tops[0], tops[1], 1): data for name, data in once.items()}.items() <= zips[CIPLAB].items()
    assert zips[REUPLOAD] == {name.removeprefix(f"{tops[0]}/training_"): data for name, data in once.items()}
    assert len(set(zips[REUPLOAD].values())) == 2 * PER_CLASS
    for name, data in zips[REUPLOAD].items():
        assert re.fullmatch(r"real/real_\d{5}\.jpg|fake/(easy|mid|hard)_\d+_(?!0000)[01]{4}\.jpg", name)
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size, image.info.get("progressive")) == ("JPEG", (256, 256), 1)


@pytest.mark.slow
def test_portraits_lie_as_in_the_third_archive(zips):
    members = zips[FACES_140K]
    images = [name for name in members if name.endswith(".jpg")]
    labels = Counter(PurePosixPath(name).parent.name for name in images)
    assert labels == {"real": PER_CLASS + 4, "fake": PER_CLASS + 4}
    assert {name for name in members if name not in images} == {"train.csv", "valid.csv", "test.csv"}
    for name in images:
        pattern = rf"{ROOT_140K}(train|valid|test)/(real/\d{{5}}|fake/[A-Z0-9]{{10}})\.jpg"
        assert re.fullmatch(pattern, name)
    assert {picture.shape for picture in read_usable(members, "real")} == {(160, 160, 3)}


def test_csv_files_name_every_image_with_its_folders_label(zips):
    rows = read_csv_files(zips[FACES_140K])
    assert sorted(ROOT_140K + row["path"] for row in rows) == sorted(
        name for name in zips[FACES_140K] if name.endswith(".jpg")
    )
    for row in rows:
        folder = PurePosixPath(row["path"]).parent.name
        assert (row["label"], row["label_str"]) == ({"real": "1", "fake": "0"}[folder], folder)
        assert row["id"] == PurePosixPath(row["path"]).stem


def test_sources_are_local_with_the_rules_of_kaggles(folder):
    sources = draw_archives(folder, PER_CLASS)
    assert [source.name for source in sources] == [str(folder / name) for name in (CIPLAB, REUPLOAD, FACES_140K)]
    for source, original in zip(sources, KAGGLE_SOURCES, strict=True):
        rules = {"real_folder", "fake_folder", "csv_real_label"}
        assert source.is_local and source.drawn
        assert source.model_dump(include=rules) == original.model_dump(include=rules)


def test_pipeline_leaves_out_the_odd_files_with_every_reason(folder, tmp_path):
    archives = [fetch_archive(source, open_store(tmp_path)) for source in draw_archives(folder, PER_CLASS)]
    index = pd.concat([build_index(archive, open_store(tmp_path)) for archive in archives])
    rows = mark_duplicates(index, find_links(index))
    kept = rows[rows["kept"]]
    assert kept.groupby(["source", "label"]).size().to_dict() == {
        (FACES_140K.removesuffix(".zip"), "fake"): PER_CLASS,
        (FACES_140K.removesuffix(".zip"), "real"): PER_CLASS,
        (CIPLAB.removesuffix(".zip"), "fake"): PER_CLASS,
        (CIPLAB.removesuffix(".zip"), "real"): PER_CLASS,
    }
    reasons = rows[rows["source"] == FACES_140K.removesuffix(".zip")]
    reasons = reasons[reasons["member"].str.endswith(".jpg")]["reason"].value_counts().to_dict()
    expected = {"copy": 4, "label_conflict": 2, "truncated": 1, "not_an_image": 1}
    assert reasons == {"kept": 2 * PER_CLASS, **expected}


def test_copies_cross_from_train_to_test_with_other_bytes(zips):
    members = zips[FACES_140K]
    copies = {name: data for name, data in members.items() if b"copied" in data}
    assert Counter(PurePosixPath(name).parts[-3:-1] for name in copies) == {
        ("test", "real"): 2,
        ("test", "fake"): 2,
    }
    pixels = {decode_image(data).tobytes() for data in copies.values()}
    originals = {name for name in members if "/train/" in name and name not in copies}
    decoded = Counter()
    for name in originals:
        try:
            decoded[decode_image(members[name]).tobytes()] += 1
        except UnreadableImageError:
            continue
    assert len(pixels) == 4 and all(decoded[copy] == 1 for copy in pixels)


def test_zips_are_stored_without_times_of_their_own(folder):
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        assert {(info.compress_type, info.date_time) for info in infos} == {(zipfile.ZIP_STORED, (2020, 1, 1, 0, 0, 0))}


@pytest.mark.slow
def test_same_arguments_draw_the_same_bytes(folder, tmp_path):
    draw_archives(tmp_path, PER_CLASS)
    assert {path.name for path in tmp_path.iterdir()} == {CIPLAB, REUPLOAD, FACES_140K, "sample.json"}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.slow
def test_another_seed_draws_other_faces(zips, tmp_path):
    draw_archives(tmp_path, PER_CLASS, seed=1)
    for name in (REUPLOAD, FACES_140K):
        drawn = {data for data in read_zip(tmp_path / name).values() if data != archives.SAVED_PAGE}
        assert len(drawn) >= 2 * PER_CLASS
        assert not drawn & set(zips[name].values())


@pytest.mark.slow
def test_more_pictures_leave_the_first_ones_as_they_were(zips, tmp_path):
    draw_archives(tmp_path, PER_CLASS + 1)
    assert zips[REUPLOAD].items() < read_zip(tmp_path / REUPLOAD).items()


def test_second_call_draws_nothing(folder):
    before = modified_times(folder)
    draw_archives(folder, PER_CLASS)
    assert modified_times(folder) == before


@pytest.mark.parametrize("missing", [CIPLAB, REUPLOAD, FACES_140K, "sample.json"])
def test_draws_again_what_is_not_whole(missing, tmp_path):
    draw_archives(tmp_path, 1)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / missing).unlink()
    draw_archives(tmp_path, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"per_class": 2}, {"per_class": 1, "seed": 1}])
def test_other_arguments_draw_again(other, tmp_path):
    draw_archives(tmp_path, 1)
    before = read_zip(tmp_path / REUPLOAD)
    draw_archives(tmp_path, **other)
    assert read_zip(tmp_path / REUPLOAD) != before
    assert json.loads((tmp_path / "sample.json").read_text()).items() >= other.items()


@pytest.mark.slow
def test_a_draw_that_is_interrupted_is_not_taken_for_whole(tmp_path, monkeypatch):
    draw_archives(tmp_path, 1)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pack = archives._pack

    def interrupt_the_second(members):
        if any(name.startswith("real_and_fake_face/") for name in members):
            return pack(members)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archives, "_pack", interrupt_the_second)
        draw_archives(tmp_path, 2)
    assert (tmp_path / CIPLAB).read_bytes() != whole[CIPLAB]
    draw_archives(tmp_path, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


@pytest.mark.parametrize(("per_class", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_refuses_impossible_arguments(per_class, seed, tmp_path):
    with pytest.raises(ValueError, match=f"Received: {per_class}, {seed}"):
        draw_archives(tmp_path / "new", per_class, seed)
    assert not (tmp_path / "new").exists()


def test_generated_fakes_carry_a_grid_and_reals_none(zips):
    fakes = [measure_grid(picture) for picture in read_usable(zips[FACES_140K], "fake")]
    reals = [measure_grid(picture) for picture in read_usable(zips[FACES_140K], "real")]
    assert min(fakes) > 2 > max(reals)


def draw_pairs(draw: Callable[..., Image.Image]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield eight persons without noise, and what `draw` makes of the same persons in the same poses."""
    for number in range(8):
        pose = faces.Pose.draw(np.random.default_rng(number))
        both = (each(np.random.default_rng(number), pose, 64) for each in (faces.draw_face, draw))
        plain, drawn = (np.asarray(image, dtype=np.float64) for image in both)
        yield plain, drawn


@pytest.mark.slow
def test_generated_fakes_are_colder_than_photographs():
    for plain, drawn in draw_pairs(forgeries.generate_face):
        assert measure_coldness(drawn) > measure_coldness(plain) * 1.1
    for plain, drawn in draw_pairs(forgeries.take_photograph):
        assert measure_coldness(drawn) == pytest.approx(measure_coldness(plain), rel=0.02)


@pytest.mark.slow
def test_generated_fakes_keep_the_face_and_lack_noise(monkeypatch):
    monkeypatch.setattr(forgeries, "UNEVENNESS", (0, 0))
    monkeypatch.setattr(forgeries, "GENERATOR_TONE", (0, 0))
    fakes = [np.std(drawn - plain) for plain, drawn in draw_pairs(forgeries.generate_face)]
    photographs = [np.std(drawn - plain) for plain, drawn in draw_pairs(forgeries.take_photograph)]
    assert max(fakes) < 2.1
    assert np.mean(photographs) > 1.5 * np.mean(fakes)


@pytest.mark.parametrize("part", range(4))
def test_spliced_fakes_differ_in_the_parts_that_the_bits_name(part):
    bits = "".join("1" if position == part else "0" for position in range(4))
    whole = forgeries.splice_face(np.random.default_rng(3), "easy", "0000")
    spliced = forgeries.splice_face(np.random.default_rng(3), "easy", bits)
    before, after = np.asarray(whole, dtype=np.float64), np.asarray(spliced, dtype=np.float64)
    changed = np.abs(before - after).max(axis=2) > 0
    rows, columns = np.nonzero(changed)
    centre, extents = (np.array(pair) for pair in forgeries.PARTS[part])
    pose = faces.Pose.draw(np.random.default_rng(3))
    middle, reach = pose.place(centre[None], 256)[0], extents * pose.scale * 128 + 2
    assert (np.abs(np.stack([columns, rows], axis=1) - middle) <= reach).all()
    assert changed.sum() > 0.5 * 4 * reach.prod()
    assert measure_coldness(after[changed]) > measure_coldness(before[changed]) + 0.2


def test_upsampling_leaves_a_grid_only_if_the_kernel_is_uneven():
    flat = np.full((8, 8, 3), 100.0)
    assert np.allclose(forgeries.upsample(flat, EVEN), 100) and forgeries.upsample(flat, EVEN).shape == (16, 16, 3)
    uneven = forgeries.upsample(flat, EVEN + np.array((-0.05, 0.1, -0.05)))
    assert np.allclose(uneven[::2, ::2], 121) and np.allclose(uneven[1::2, 1::2], 81)


def test_faces_are_placed_where_the_pose_says():
    pose = faces.Pose(angle=0.0, scale=1.0, x=0.5, y=0.0, turn=0.0)
    assert np.allclose(pose.place(np.array([[0.0, 0.0], [0.5, -1.0]]), 200), [[150, 100], [200, 0]])
