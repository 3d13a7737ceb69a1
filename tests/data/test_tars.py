"""`data.layout: shards`: the same data set, its images in tars."""

import hashlib
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from deepfake_core.config import DataParameters, Source
from deepfake_core.data.dataset import open_dataset
from deepfake_core.data.images import load_images, measure_files
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.errors import ArchiveError
from deepfake_core.storage import tars
from deepfake_core.storage.store import open_store
from deepfake_core.storage.tars import PLACES, check_tars
from tests.builders import faces, forbid, jpeg, prepare, write_zip
from tests.split_laws import split


@pytest.fixture(autouse=True)
def small_tars(monkeypatch):
    monkeypatch.setattr(tars, "TAR_IMAGES", 7)


@pytest.fixture
def zips(tmp_path):
    return [write_zip(tmp_path / "a.zip", faces(20)), write_zip(tmp_path / "b.zip", faces(10, 500))]


@pytest.fixture
def both(tmp_path, zips):
    return [prepare(tmp_path / layout, *zips, layout=layout) for layout in ("files", "shards")]


@pytest.mark.parametrize("normalise", ["none", "reencode"])
def test_a_data_set_in_tars_is_the_same(tmp_path, zips, normalise):
    files, shards = (
        prepare(tmp_path / layout, *zips, layout=layout, normalise=normalise) for layout in ("files", "shards")
    )
    assert shards.version == files.version
    for name in ("manifest.parquet", "dataset.json"):
        assert (shards.path / name).read_bytes() == (files.path / name).read_bytes()
    assert not list(shards.path.rglob("*.jpg"))
    paths = files.manifest.loc[files.manifest["kept"], "path"]
    assert len(paths) == 60
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(shards.read, paths)) == [(files.path / path).read_bytes() for path in paths]
    for name in files.splits:
        one, other = (load_images(dataset, name, 32) for dataset in (files, shards))
        assert np.array_equal(one.pixels, other.pixels)
        assert measure_files(one, files) == measure_files(other, shards)


def test_any_reader_of_tars_finds_image_and_label_side_by_side_in_mixed_order(both):
    files, shards = both
    found = {}
    for file in sorted(shards.path.rglob("*.tar")):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
            assert len(members) <= 2 * 7
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name.split(".")[0] == label.name.split(".")[0]
                data = tar.extractfile(image).read()
                assert hashlib.sha256(data).hexdigest() == image.name.split(".")[0]
                found[image.name] = (file.parent.name, tar.extractfile(label).read())
            if len(members) == 14:
                assert len({found[image.name] for image in members[::2]}) == 2
    kept = files.manifest[files.manifest["kept"]]
    assert found == {
        path.rpartition("/")[2]: (split, b"1" if label == "fake" else b"0")
        for path, split, label in zip(kept["path"], kept["split"], kept["label"], strict=True)
    }


def test_the_same_images_give_the_same_tars_whatever_the_order_of_sources(tmp_path, zips, both):
    again = prepare(tmp_path / "again", *reversed(zips), layout="shards")
    for file in both[1].path.rglob("*.tar"):
        assert file.read_bytes() == (again.path / file.relative_to(both[1].path)).read_bytes()


def test_a_published_data_set_is_not_written_again_in_another_layout(tmp_path, zips, monkeypatch):
    first = prepare(tmp_path / "data", *zips)
    forbid(monkeypatch, "deepfake_core.data.publishing._pack_images")
    second = prepare(tmp_path / "data", *zips, layout="shards")
    assert second.path == first.path
    assert second.read(second.split("test")["path"].iloc[0])


def test_a_failure_while_packing_leaves_nothing(tmp_path, zips):
    store = open_store(tmp_path / "data")
    archive = fetch_archive(Source(name=str(zips[0])), store)
    rows = split(build_index(archive, store), val=0.25, test=0.25)
    write_zip(zips[0], faces(20) | {"fake/3.jpg": jpeg(77)})  # changed behind our back
    with pytest.raises(ArchiveError, match="must not change during a run"):
        publish_dataset(rows, [archive], store, DataParameters(layout="shards"))
    assert [path.name for path in store.splits().iterdir()] == ["memory.parquet"]


def test_damage_is_named(both):
    shards = open_dataset(both[1].path)
    last = pd.read_parquet(shards.path / PLACES).query("tar == 'train/000000.tar'").iloc[-1]
    file = shards.path / last["tar"]
    whole = file.read_bytes()
    members = {path: path.split("/")[2].split(".")[0] for path in shards.manifest.query("kept")["path"]}
    check_tars(shards.path, members)

    file.write_bytes(whole[: last["offset"] + 10])
    with pytest.raises(ArchiveError, match=rf"{last['tar']}, which ends within {last['path']}"):
        shards.read(last["path"])
    damaged = bytearray(whole)
    damaged[last["offset"] + 10] ^= 255
    file.write_bytes(damaged)
    with pytest.raises(ArchiveError, match=rf"must have the bytes that the manifest names. Received: {last['path']}"):
        check_tars(shards.path, members)
    file.write_bytes(whole)
    with pytest.raises(ArchiveError, match=r"must list the images of the manifest.*none/real/0.jpg"):
        check_tars(shards.path, members | {"none/real/0.jpg": ""})
    with pytest.raises(ArchiveError, match="must list each image"):
        shards.read("train/real/none.jpg")


@pytest.mark.parametrize(
    "change",
    [
        {"tar": "../000000.tar"},
        {"tar": "/etc/passwd"},
        {"bytes": 1 << 40},
        {"bytes": -1},
        {"offset": -1},
        {"offset": (1 << 63) - 1},
        {"tar": None},
        {"path": "train/real/twice.jpg"},
    ],
)
def test_a_hostile_index_is_refused(both, change):
    ((name, value),), shards = change.items(), both[1]
    places = pd.read_parquet(shards.path / PLACES)
    places.loc[: 1 if name == "path" else 0, name] = value
    places.to_parquet(shards.path / PLACES)
    with pytest.raises(ArchiveError, match="must list the images in tars, each once, in at most"):
        open_dataset(shards.path).read(places["path"].iloc[-1])
    (shards.path / PLACES).write_bytes(b"no Parquet")
    with pytest.raises(ArchiveError, match="a file that can't be read"):
        open_dataset(shards.path).read(places["path"].iloc[-1])


@pytest.mark.parametrize("values", [[None], ["a"], [[1]], [1 << 63]], ids=str)
@pytest.mark.parametrize("column", ["offset", "bytes"])
def test_an_index_of_other_types_is_refused(both, column, values):
    shards = both[1]
    places = pd.read_parquet(shards.path / PLACES)
    places[column] = pd.Series(values * len(places), dtype="uint64" if values == [1 << 63] else object)
    places.to_parquet(shards.path / PLACES)
    with pytest.raises(ArchiveError, match="must list the images in tars, each once"):
        shards.read(places["path"].iloc[0])


def test_a_tar_that_is_cut_or_missing_is_named_before_any_image_is_read(both):
    first, shards = both[1], open_dataset(both[1].path)
    last = pd.read_parquet(first.path / PLACES).query("tar == 'test/000000.tar'").iloc[-1]
    file = first.path / last["tar"]
    with file.open("r+b") as tar:
        tar.truncate(int(last["offset"]) + 10)
    with pytest.raises(ArchiveError, match=rf"{last['tar']}, which ends within {last['path']}"):
        load_images(first, "train", 32)
    file.unlink()
    with pytest.raises(ArchiveError, match=rf"{last['tar']}, which is missing"):
        load_images(shards, "train", 32)


def test_an_index_that_leads_beyond_its_tar_is_refused(both):
    shards = both[1]
    places = pd.read_parquet(shards.path / PLACES)
    places.loc[3, "offset"] = 1 << 62
    places.to_parquet(shards.path / PLACES)
    with pytest.raises(ArchiveError, match=f"which ends within {places['path'][3]}"):
        shards.read(places["path"].iloc[0])


@pytest.mark.parametrize("path", ["", "a", "zzz", "train/real/none.jpg", "train/real/" + "é" * 99, "x" * 500])
def test_a_path_that_is_not_listed_is_refused(both, path):
    with pytest.raises(ArchiveError, match=r"must list each image\. Received: none at"):
        both[1].read(path)


def test_the_folder_can_be_moved(both, tmp_path):
    moved = shutil.copytree(both[1].path, tmp_path / "elsewhere" / both[1].path.name)
    dataset = open_dataset(moved)
    assert dataset.read(dataset.split("val")["path"].iloc[0])
