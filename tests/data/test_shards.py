"""What a node of a cluster does where the store is at a URL: the real s3fs, and an S3 server on loopback.

A node is this process, while the driver's cache is elsewhere, and with what `pickle` gives it.
"""

import pickle
import random
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import fsspec
import pytest

from deepfake_core.config import Source
from deepfake_core.data.archive import Archive
from deepfake_core.data.index import build_index, index_shard, list_shards
from deepfake_core.data.kaggle import fetch_archive, share_archive
from deepfake_core.data.shards import Shard, list_abandoned, open_members
from deepfake_core.errors import ArchiveError, CredentialsError, DownloadError, SourceError
from deepfake_core.storage.ranges import RangeFile
from deepfake_core.storage.store import Store, open_store
from tests.builders import faces, forbid, free_port, keep_download, write_zip

SOURCE = Source(name="owner/some-faces", version=1)
SHARD_SIZE = 20
METHODS = pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])

OnNode = Callable[[Shard], AbstractContextManager[Shard]]


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", SHARD_SIZE)
    yield
    open_members.cache_clear()


@pytest.fixture
def store(s3_url) -> Store:
    return open_store(s3_url)


def write_archive(path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Write 200 members of some 20 kB, of which 20 are images, and one is empty."""
    noise = random.Random(1)
    members = faces(10) | {f"real/{i:03}.bin": noise.randbytes(noise.randint(15_000, 25_000)) for i in range(179)}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in ({"real/empty.jpg": b""} | members).items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def share(store, tmp_path) -> Callable[..., Archive]:
    """Let the driver have an archive, and share it."""

    def share(method: int = zipfile.ZIP_STORED) -> Archive:
        archive = keep_download(write_archive(tmp_path / "a.zip", method), SOURCE, store)
        share_archive(archive, store)
        return archive

    return share


@pytest.fixture
def on_node(store, monkeypatch, tmp_path) -> OnNode:
    """Return a context in which the driver's cache is elsewhere; it gives what a node receives."""

    @contextmanager
    def go(shard: Shard) -> Iterator[Shard]:
        aside = store.folder.with_name("driver")
        store.folder.rename(aside)
        open_members.cache_clear()
        received = pickle.loads(pickle.dumps(shard))  # noqa: S301 - its own
        with monkeypatch.context() as node:
            node.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
            yield received
        assert not store.folder.exists()
        assert not (tmp_path / "node").exists()
        aside.rename(store.folder)
        open_members.cache_clear()

    return go


@pytest.fixture
def received(monkeypatch) -> list[int]:
    """Return the sizes of what is read from the store, a number for each request."""
    sizes: list[int] = []
    files = fsspec.get_filesystem_class("s3")
    read = files._cat_file

    async def read_and_note(*arguments, **options):
        data = await read(*arguments, **options)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(files, "_cat_file", read_and_note)
    forbid(monkeypatch, "s3fs.core.S3FileSystem._get_file", "s3fs.core.S3FileSystem._open")
    return sizes


@METHODS
def test_a_node_reads_its_members_and_the_directory_alone(share, store, on_node, received, method):
    archive = share(method)
    shards = list_shards([archive], store)
    members = open_members(archive, store)[1][60:80]
    with on_node(shards[3]) as shard:
        received.clear()
        index_shard(shard, threads=1)
    needed = sum(member.handle.compress_size + 150 for member in members)
    directory = 200 * 70
    assert len(received) <= len(members) + 5
    assert needed * 0.99 < sum(received) < needed + 3 * directory
    assert sum(received) < archive.bytes / 5
    assert list_shards([archive], store) == [*shards[:3], *shards[4:]]


@METHODS
def test_members_have_the_same_bytes_from_the_url_as_from_disk(share, store, method):
    archive = share(method)
    reader, members = open_members(archive, store)
    here = [reader.read(member) for member in members]
    archive.path.unlink()
    open_members.cache_clear()
    reader, members = open_members(archive, store)
    assert isinstance(reader.place, RangeFile)
    assert [reader.read(member) for member in members] == here
    assert here[members.index(next(member for member in members if member.size == 0))] == b""


def test_a_member_whose_header_is_longer_than_expected_is_read_too(store, tmp_path):
    path = tmp_path / "padded.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("real/a.jpg")
        info.extra = b"\xfe\xca" + (4000).to_bytes(2, "little") + bytes(4000)
        archive.writestr(info, faces(1)["real/0.jpg"])
    kept = keep_download(path, SOURCE, store)
    share_archive(kept, store)
    kept.path.unlink()
    reader, (member,) = open_members(kept, store)
    assert reader.read(member) == faces(1)["real/0.jpg"]


def test_an_index_of_shards_that_nodes_made_is_that_of_one_machine(share, store, on_node, tmp_path, monkeypatch):
    archive = share()
    for shard in list_shards([archive], store)[1:]:
        with on_node(shard) as there:
            index_shard(there, threads=1)
    names = store.list_names(store.indexes())
    assert len(store.list_names(store.indexes() / names[0])) == 9
    with monkeypatch.context() as driver:
        made = []
        driver.setattr("deepfake_core.data.index.index_members", spy(made))
        build_index(archive, store)
    assert len(made) == 1
    alone = open_store(tmp_path / "alone")
    build_index(keep_download(tmp_path / "a.zip", SOURCE, alone), alone)
    assert read_indexes(store) == read_indexes(alone)
    assert store.list_names(store.indexes()) == []
    assert not list(store.indexes().glob(".*"))


def test_a_node_that_was_a_driver_before_writes_at_the_url_too(share, store):
    """What it left on its disk then, the driver of today does not see."""
    (shard, *_) = list_shards([share()], store)
    index_shard(pickle.loads(pickle.dumps(shard)), threads=1)  # noqa: S301 - its own
    assert list(shard.file.parent.iterdir()) == []
    assert len(store.list_names(shard.file.parent)) == 1


def spy(made: list[int]) -> Callable[..., list[tuple]]:
    from deepfake_core.data.index import index_members

    def index_and_note(source, reader, members, known):
        made.append(len(members))
        return index_members(source, reader, members, known)

    return index_and_note


def read_indexes(store: Store) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.indexes().glob("*.parquet")}


def test_a_shard_that_is_not_whole_at_the_url_is_made_again(share, store, on_node, caplog):
    archive = share()
    shards = list_shards([archive], store)
    with on_node(shards[0]) as there:
        index_shard(there, threads=1)
    folder = store.shards(shards[0].index)
    (name,) = store.list_names(folder)
    whole = store.read(folder / name)
    store.write(folder / name, whole[: len(whole) // 2])
    store.write(folder / "notes.txt", b"something else")
    assert list_shards([archive], store) == shards
    assert f"{store.url}/indexes/{folder.name}/{name} is not whole: made again" in caplog.text
    assert len(build_index(archive, store)) == 200
    assert store.list_names(store.indexes()) == []


@METHODS
def test_a_member_that_is_damaged_at_the_url_is_named(share, store, on_node, method):
    archive = share(method)
    shards = list_shards([archive], store)
    content = bytearray(archive.path.read_bytes())
    damaged = open_members(archive, store)[1][65]
    content[damaged.handle.header_offset + 1000] ^= 255
    store.write(archive.path, bytes(content))
    with (
        on_node(shards[3]) as shard,
        pytest.raises(ArchiveError, match=rf"{damaged.name!r} of {store.url}/.*/1.zip is damaged"),
    ):
        index_shard(shard, threads=1)
    with on_node(shards[4]) as shard:
        index_shard(shard, threads=1)


def test_an_archive_that_is_another_at_the_url_is_refused(share, store, on_node, tmp_path):
    archive = share()
    (shard, *_) = list_shards([archive], store)
    other = write_zip(tmp_path / "other.zip", faces(3)).read_bytes()
    store.write(archive.path, other)
    address = store.address_of(archive.path)
    with (
        on_node(shard) as there,
        pytest.raises(
            ArchiveError,
            match=rf"must not change during a run. {address} had {archive.bytes:,} bytes, now it has {len(other):,}. "
            rf"Delete {address.replace('.zip', '.json')} and run `prepare` again",
        ),
    ):
        index_shard(there, threads=1)
    store.write(archive.path, b"no zip")
    with on_node(shard) as there, pytest.raises(ArchiveError, match=f"must be a whole zip file. Received: {address}"):
        index_shard(there, threads=1)


def test_an_archive_that_is_gone_from_the_url_is_no_list_of_unreadable_files(share, store, on_node):
    archive = share()
    (shard, *_) = list_shards([archive], store)
    with on_node(shard) as there:
        open_members(there.archive, there.store)
        store.remove(archive.path)
        with pytest.raises(ArchiveError, match=r"1.zip must be there as long as it is read. Received: nothing"):
            index_shard(there, threads=1)


def test_a_node_that_can_not_reach_the_store_is_named(share, store, on_node, monkeypatch):
    (shard, *_) = list_shards([share()], store)
    s3 = fsspec.get_filesystem_class("s3")
    nowhere = f"http://127.0.0.1:{free_port()}"
    with on_node(shard) as there, monkeypatch.context() as node:
        node.setenv("AWS_ENDPOINT_URL", nowhere)
        s3.clear_instance_cache()
        with pytest.raises(DownloadError, match=rf"on {socket.gethostname()}: The store must answer. s3:.*{nowhere}"):
            index_shard(there, threads=1)
    s3.clear_instance_cache()
    with on_node(shard) as there, monkeypatch.context() as node:
        node.delenv("AWS_ACCESS_KEY_ID")
        s3.clear_instance_cache()
        with pytest.raises(CredentialsError, match=rf"on {socket.gethostname()}: The store needs credentials"):
            index_shard(there, threads=1)
    s3.clear_instance_cache()


def test_a_local_source_is_not_looked_for_at_the_url(store, tmp_path):
    path = write_zip(tmp_path / "a.zip", faces(20))
    (shard, *_) = list_shards([fetch_archive(Source(name=str(path)), store)], store)
    open_members.cache_clear()
    path.rename(tmp_path / "b.zip")
    with pytest.raises(SourceError, match=f"{socket.gethostname()}, which has no {path}"):
        index_shard(pickle.loads(pickle.dumps(shard)), threads=1)  # noqa: S301 - its own


def test_shards_at_the_url_are_abandoned_a_day_after_the_last(share, store, on_node, monkeypatch):
    shards = list_shards([share()], store)
    with on_node(shards[0]) as there:
        index_shard(there, threads=1)
    assert list_abandoned(store) == []
    monkeypatch.setattr("deepfake_core.data.shards.MAX_WRITING_SECONDS", -1)
    assert list_abandoned(store) == [shards[0].index]
