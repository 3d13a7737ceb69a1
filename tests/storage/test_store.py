"""Data that crosses machines: the real s3fs, and an S3 server on loopback. A machine is a cache folder of its own."""

import hashlib
import io
import json
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import requests

from deepfake_core.config import DataParameters, EvaluationParameters, PromotionParameters, Source, TrainingParameters
from deepfake_core.data.dataset import open_dataset, share_dataset
from deepfake_core.data.kaggle import fetch_archive, find_new_version, share_archive
from deepfake_core.data.split_memory import read_memory
from deepfake_core.errors import ArchiveError, ConfigurationError, CredentialsError, DatasetError, DownloadError
from deepfake_core.registry import connection, versions
from deepfake_core.storage import tars
from deepfake_core.storage.shared_folder import PACKED, SUMS
from deepfake_core.storage.store import Store, open_store
from deepfake_core.storage.tars import PLACES
from tests.builders import faces, forbid, free_port, jpeg, prepare, write_zip

SOURCE = Source(name="owner/some-faces")


@pytest.fixture
def go_to(s3_url, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Move to another machine; return its cache folder."""

    def go(machine: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        return open_store(s3_url).folder

    return go


@pytest.fixture
def kaggle(kaggle, tmp_path):
    kaggle.add(SOURCE.name, write_zip(tmp_path / "faces.zip", faces(20)))
    return kaggle


def share(url: str, *zips: Path, **more: object):
    dataset = prepare(url, *zips, **more)
    share_dataset(dataset)
    return dataset


def read_object(url: str) -> bytes:
    return fsspec.filesystem("s3").cat_file(url)


def write_object(url: str, content: bytes) -> None:
    fsspec.filesystem("s3").pipe_file(url, content)


def replace_object(address: str, name: str, content: bytes) -> None:
    """Replace an object of a data set, and its SHA-256 in the sums, as one who can write to the store may."""
    write_object(f"{address}/{name}", content)
    lines = read_object(f"{address}/{SUMS}").decode().splitlines()
    lines = [line for line in lines if not line.endswith(f"  {name}")]
    lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}")
    write_object(f"{address}/{SUMS}", "".join(f"{line}\n" for line in lines).encode())


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def list_visible(folder: Path) -> list[str]:
    """Return the files below a folder, less those of locks."""
    return [name for name in read_folder(folder) if not name.endswith(".lock")]


@pytest.mark.slow
@pytest.mark.parametrize("normalise", ["none", "reencode"])
def test_another_machine_gets_the_same_bytes_once(s3_url, go_to, tmp_path, monkeypatch, normalise):
    first = share(s3_url, write_zip(tmp_path / "a.zip", faces(20)), normalise=normalise)
    here = go_to("b")
    seen = []
    second = open_dataset(first.address, lambda done, total: seen.append((done, total)))
    assert second.address == f"{s3_url}/splits/{first.version}"
    assert second.path == here / "splits" / first.version
    assert read_folder(second.path) == read_folder(first.path)
    assert seen[-1] == (len(read_object(f"{second.address}/{PACKED}")),) * 2
    pd.testing.assert_frame_equal(second.manifest, first.manifest)
    forbid(monkeypatch, "deepfake_core.storage.store.Store.fetch")
    assert open_dataset(first.address) == second


@pytest.mark.slow
def test_what_is_published_is_not_published_again_and_news_about_it_are_fetched(s3_url, go_to, tmp_path, monkeypatch):
    first = share(s3_url, write_zip(tmp_path / "a.zip", faces(20)))
    go_to("b")
    open_dataset(first.address)
    forbid(monkeypatch, "deepfake_core.storage.shared_folder._pack", "deepfake_core.storage.shared_folder._unpack")
    go_to("a")
    again = write_zip(tmp_path / "b.zip", {"real/again.jpg": faces(1)["real/0.jpg"]})
    second = share(s3_url, tmp_path / "a.zip", again)
    assert second.version == first.version
    go_to("b")
    assert open_dataset(first.address).manifest["reason"].value_counts()["duplicate"] == 1


def test_an_archive_is_downloaded_from_kaggle_once(s3_url, go_to, kaggle):
    first = fetch_archive(SOURCE, open_store(s3_url))
    share_archive(first, open_store(s3_url))
    here = go_to("b")
    assert find_new_version(SOURCE, open_store(s3_url)) is None
    assert not here.exists()
    second = fetch_archive(SOURCE, open_store(s3_url))
    assert len(kaggle.downloads) == 1
    assert second.path == here / "archives" / "owner" / "some-faces" / "1.zip"
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.describe() == first.describe()
    go_to("c")
    kaggle.requests.clear()
    assert fetch_archive(Source(name=SOURCE.name, version=1), open_store(s3_url)).sha256 == first.sha256
    assert kaggle.requests == []  # a fixed version that is shared needs no Kaggle at all


@pytest.mark.slow
@pytest.mark.parametrize("name", [PACKED, "manifest.parquet", "dataset.json"])
def test_a_damaged_object_is_refused_and_published_anew_once_the_sums_are_deleted(s3_url, go_to, tmp_path, name):
    first = share(s3_url, write_zip(tmp_path / "a.zip", faces(20)))
    content = bytearray(read_object(f"{first.address}/{name}"))
    content[len(content) // 2] ^= 1
    write_object(f"{first.address}/{name}", bytes(content))
    here = go_to("b")
    with pytest.raises(ArchiveError, match=f"{name} must be there with the SHA-256.*Delete {first.address}/{SUMS} and"):
        open_dataset(first.address)
    assert list_visible(here) == []
    fsspec.filesystem("s3").rm_file(f"{first.address}/{SUMS}")
    go_to("a")
    share_dataset(first)
    go_to("b")
    assert len(open_dataset(first.address).split("train")) == len(first.split("train"))


@pytest.mark.slow
@pytest.mark.usefixtures("kaggle")
def test_a_damaged_archive_is_refused(s3_url, go_to):
    share_archive(fetch_archive(SOURCE, open_store(s3_url)), open_store(s3_url))
    shared = f"{s3_url}/archives/owner/some-faces/1.zip"
    content = bytearray(read_object(shared))
    content[100] ^= 1
    write_object(shared, bytes(content))
    here = go_to("b")
    with pytest.raises(ArchiveError, match=r"1\.zip must be there with the SHA-256.*Delete .*1\.json"):
        fetch_archive(SOURCE, open_store(s3_url))
    assert list_visible(here) == []
    write_object(shared.replace(".zip", ".json"), b'{"sha256": "half')
    with pytest.raises(ArchiveError, match=r"1\.json must hold sha256, bytes"):
        fetch_archive(SOURCE, open_store(s3_url))
    assert list_visible(here) == []


@pytest.mark.slow
@pytest.mark.parametrize("hostile", ["../../../evil.jpg", "/tmp/evil.jpg", "train/real/evil.jpg"])
def test_a_name_that_leads_elsewhere_is_refused(s3_url, go_to, tmp_path, hostile):
    first = share(s3_url, write_zip(tmp_path / "a.zip", faces(20)))
    with zipfile.ZipFile(io.BytesIO(read_object(f"{first.address}/{PACKED}"))) as packed:
        images = {name: packed.read(name) for name in packed.namelist()}
    images[hostile] = images.pop(next(iter(images)))
    replace_object(first.address, PACKED, write_zip(tmp_path / "hostile.zip", images).read_bytes())
    before = read_folder(tmp_path)
    here = go_to("b")
    with pytest.raises(ArchiveError, match=r"must be those of its manifest.*evil"):
        open_dataset(first.address)
    assert list_visible(here) == []
    assert {name for name in read_folder(tmp_path) if not name.endswith(".lock")} == set(before)

    manifest = first.manifest
    manifest.loc[manifest["kept"].idxmax(), "path"] = hostile
    manifest.to_parquet(tmp_path / "manifest.parquet")
    replace_object(first.address, "manifest.parquet", (tmp_path / "manifest.parquet").read_bytes())
    with pytest.raises(ArchiveError, match="must list the images that its version is the hash of"):
        open_dataset(first.address)
    assert list_visible(here) == []


@pytest.mark.slow
def test_another_machine_gets_the_same_tars_once(s3_url, go_to, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "TAR_IMAGES", 7)
    zips = [write_zip(tmp_path / "a.zip", faces(20))]
    first = share(s3_url, *zips, layout="shards")
    go_to("b")
    second = open_dataset(first.address)
    assert read_folder(second.path) == read_folder(first.path)
    assert second.read(second.split("train")["path"].iloc[0])
    go_to("a")
    share(s3_url, *zips, write_zip(tmp_path / "b.zip", {"real/again.jpg": jpeg(0)}), layout="shards")
    go_to("b")
    forbid(monkeypatch, "deepfake_core.storage.shared_folder.check_tars")  # the images are here already
    assert open_dataset(first.address).manifest["reason"].value_counts()["duplicate"] == 1
    assert PACKED not in read_object(f"{first.address}/{SUMS}").decode()


@pytest.mark.slow
def test_a_data_set_that_is_here_in_another_layout_stays_as_it_is(s3_url, go_to, tmp_path):
    zips = [write_zip(tmp_path / "a.zip", faces(20))]
    first = share(s3_url, *zips)
    go_to("b")
    share(s3_url, *zips, layout="shards")
    go_to("a")
    again = open_dataset(first.address)
    assert not (again.path / PLACES).exists()
    assert again.read(again.split("train")["path"].iloc[0])
    assert not fsspec.filesystem("s3").exists(f"{first.address}/{PACKED}")
    go_to("c")
    assert (open_dataset(first.address).path / PLACES).exists()


@pytest.mark.slow
def test_tars_that_are_not_the_manifests_are_refused(s3_url, go_to, tmp_path):
    first = share(s3_url, write_zip(tmp_path / "a.zip", faces(20)), layout="shards")
    tar = "train/000000.tar"
    whole = read_object(f"{first.address}/{tar}")
    here = go_to("b")
    damaged = bytearray(whole)
    damaged[1000] ^= 255
    replace_object(first.address, tar, bytes(damaged))
    with pytest.raises(ArchiveError, match="must have the bytes that the manifest names"):
        open_dataset(first.address)
    replace_object(first.address, tar, whole[:5000])
    with pytest.raises(ArchiveError, match="which ends within"):
        open_dataset(first.address)
    lines = read_object(f"{first.address}/{SUMS}").decode().splitlines(keepends=True)
    write_object(f"{first.address}/{SUMS}", "".join(line for line in lines if tar not in line).encode())
    with pytest.raises(ArchiveError, match=f"{tar}, which is missing"):
        open_dataset(first.address)
    write_object(f"{first.address}/{SUMS}", "".join(line for line in lines if ".tar" not in line).encode())
    with pytest.raises(ArchiveError, match=f"must list {PACKED}, or {PLACES} and tars"):
        open_dataset(first.address)
    assert list_visible(here) == []


@pytest.mark.slow
def test_an_image_that_is_not_the_manifests_is_refused(s3_url, go_to, tmp_path):
    first = share(s3_url, write_zip(tmp_path / "a.zip", faces(20)))
    with zipfile.ZipFile(io.BytesIO(read_object(f"{first.address}/{PACKED}"))) as packed:
        images = {name: packed.read(name) for name in packed.namelist()}
    one, other = list(images)[:2]
    images[one] = images[other]
    replace_object(first.address, PACKED, write_zip(tmp_path / "swapped.zip", images).read_bytes())
    here = go_to("b")
    with pytest.raises(ArchiveError, match=f"must have the bytes that the manifest names. Received: {one}"):
        open_dataset(first.address)
    replace_object(first.address, PACKED, b"no zip")
    with pytest.raises(ArchiveError, match="must be a whole zip"):
        open_dataset(first.address)
    assert list_visible(here) == []


@pytest.mark.slow
def test_an_upload_that_was_killed_is_not_taken_for_whole(s3_url, go_to, tmp_path, monkeypatch, kaggle):
    """Whatever the object before which it is killed; the next one publishes the rest."""
    dataset = prepare(s3_url, write_zip(tmp_path / "a.zip", faces(20)))
    archive = fetch_archive(SOURCE, open_store(s3_url))
    publish = Store.publish

    def kill_at(last: str):
        def publish_until(store, path, *arguments, **named):
            if path.name.endswith(last):
                raise KeyboardInterrupt
            publish(store, path, *arguments, **named)

        return publish_until

    for last in ("dataset.json", PACKED, SUMS):
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(Store, "publish", kill_at(last))
            share_dataset(dataset)
        here = go_to("b")
        with pytest.raises(DatasetError, match="published whole"):
            open_dataset(dataset.address)
        assert list_visible(here) == []
        go_to("a")
    share_dataset(dataset)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Store, "publish", kill_at("1.json"))
        share_archive(archive, open_store(s3_url))
    go_to("b")
    assert len(open_dataset(dataset.address).manifest) == len(dataset.manifest)
    assert find_new_version(SOURCE, open_store(s3_url)) == 1
    assert fetch_archive(SOURCE, open_store(s3_url)) != archive
    assert len(kaggle.downloads) == 2


@pytest.mark.slow
def test_memory_loses_nothing_when_two_machines_publish_at_once(s3_url, go_to, tmp_path):
    """Both split before either publishes; some images are in both, and with other shares, in another split."""
    zips = [write_zip(tmp_path / name / "a.zip", faces(40, start)) for name, start in (("x", 0), ("y", 20))]
    datasets, memories = {}, {}
    for machine, path, test_fraction in (("a", zips[0], 0.25), ("b", zips[1], 0.5)):
        here = go_to(machine)
        datasets[machine] = prepare(s3_url, path, test_fraction=test_fraction)
        memories[machine] = read_memory(open_store(here))
    both = memories["a"].keys() & memories["b"].keys()
    assert any(memories["a"][image] != memories["b"][image] for image in both)
    for machine in ("b", "a"):
        go_to(machine)
        share_dataset(datasets[machine])
    go_to("c")
    union = read_memory(open_store(s3_url))
    assert union == memories["a"] | memories["b"]  # b was first
    for machine in ("a", "b"):
        go_to(machine)
        assert read_memory(open_store(s3_url)) == union
    assert len(open_store(s3_url).list_names(open_store(s3_url).shared_memory())) == 2

    go_to("a")
    again = share(s3_url, zips[0])
    assert dict(again.manifest.set_index("sha256")["split"].items()).items() <= union.items()
    assert len(open_store(s3_url).list_names(open_store(s3_url).shared_memory())) == 2  # nothing new was learned


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://AKIA:sec/ret@bucket/x", r"Received: s3://\[removed\]@bucket/x\. Set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?secret=sec/ret", r"Received: s3://bucket/x\. Set AWS_ACCESS_KEY_ID"),
        ("s3:/bucket/x", "such as s3://bucket/deepfake"),
        ("simplecache::s3://bucket/x", "such as s3://bucket/deepfake"),
        ("s3://", "such as s3://bucket/deepfake"),
        ("nothing://bucket/x", "a kind that fsspec knows"),
    ],
)
def test_urls_that_are_refused(address, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        open_store(address).check()
    assert "sec/ret" not in str(caught.value)


@pytest.mark.slow
def test_a_store_that_can_not_be_used_is_said_before_any_work(s3_url, s3_endpoint, tmp_path, monkeypatch):
    s3 = fsspec.get_filesystem_class("s3")
    with pytest.raises(ConfigurationError, match=f"bucket .* must exist.*s3://nothing/x at {s3_endpoint}"):
        open_store("s3://nothing/x").check()
    for login, found in (("", "EndpointConn"), ("me:5ecre7f0a1b2@", "HTTPClient")):
        with monkeypatch.context() as elsewhere, pytest.raises(DownloadError, match=f"must answer.*{found}") as caught:
            elsewhere.setenv("AWS_ENDPOINT_URL", f"http://{login}127.0.0.1:{free_port()}")
            s3.clear_instance_cache()
            open_store(s3_url).check()
        assert "5ecre7" not in "".join(traceback.format_exception(caught.value))
    s3.clear_instance_cache()
    requests.post(f"{s3_endpoint}/moto-api/reset-auth", data=b"0", timeout=10)  # from now on it wants to know who asks
    try:
        with pytest.raises(CredentialsError, match=r"must let this account in.*AWS_ACCESS_KEY_ID"):
            open_store(s3_url).check()
    finally:
        requests.post(f"{s3_endpoint}/moto-api/reset-auth", data=b"1000000000", timeout=10)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3.clear_instance_cache()
    with pytest.raises(CredentialsError, match="needs credentials"):
        open_store(s3_url).check()
    assert list_visible(tmp_path) == []


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api", "tracking")
def test_one_machine_prepares_and_another_trains(s3_url, go_to, kaggle):
    from flows.check_sources import check_sources  # Prefect takes seconds to import
    from flows.prepare import prepare as prepare_flow
    from flows.train import train

    data = DataParameters(sources=(SOURCE,), data_dir=s3_url, test_fraction=0.25, val_fraction=0.25)
    address = prepare_flow(data)
    assert address.startswith(f"{s3_url}/splits/")
    assert check_sources(data, deployment="") == {}
    here = go_to("b")
    version = train(
        address,
        TrainingParameters(candidates=("cnn",), image_size=32, epochs=1),
        EvaluationParameters(robustness_images=0),
        PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1),
    )
    assert {path.name for path in here.iterdir()} == {"splits", "batches", "training"}
    tags = versions.read_version("deepfake-detector", version).tags
    assert tags["dataset_version"] == open_dataset(address).version
    run = connection.connect().get_run(versions.read_version("deepfake-detector", version).run_id)
    parent = connection.connect().get_run(run.data.tags["mlflow.parentRunId"])
    (logged,) = parent.inputs.dataset_inputs
    assert json.loads(logged.dataset.source) == {"uri": f"{address}/manifest.parquet"}
    assert prepare_flow(data) == address  # on a machine that only fetched
    assert len(kaggle.downloads) == 1
