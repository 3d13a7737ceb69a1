"""A whole folder at the store's URL: its images in one zip, or in its tars; the files beside them each on its own.

`SHA256SUMS` is published last: without it, nothing of the folder counts as published.
"""

import contextlib
import hashlib
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock

from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ArchiveError
from deepfake_core.storage.files import hash_file, require_space, translate_disk_errors, write_beside
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.store import Store
from deepfake_core.storage.tars import PLACES, TAR_NAME, Places, check_tars

log = logging.getLogger(__name__)

SUMS, PACKED = "SHA256SUMS", "images.zip"


def publish_folder(store: Store, folder: Path, members: Mapping[str, str], on_progress: Progress | None = None) -> None:
    """Publish a folder of the store; what is there already is not written again.

    Args:
        members: the images, each with its SHA-256, or "" if it is not known.

    Raises:
        ArchiveError: if a member has other bytes.
    """
    beside = sorted(file.name for file in folder.iterdir() if file.is_file() and _is_plain(file.name))
    sums = {file: hash_file(folder / file) for file in beside}
    published = _parse_sums(store.read(folder / SUMS) or b"")
    holding = Places(folder).tars if PLACES in beside else [PACKED]
    if published == sums | {file: published.get(file, "") for file in holding}:
        log.info("%s is published already", store.address_of(folder))
        _write_sums(folder, published)
        return
    if published:  # so that a fetch meanwhile does not mistake a mixture of old and new for a whole folder
        store.remove(folder / SUMS)
    for file in beside:
        store.publish(folder / file)
    if holding != [PACKED]:
        sums |= _publish_tars(store, folder, members, holding, published, on_progress)
    elif PACKED not in published:
        packed = folder.with_name(f".{folder.name}.{PACKED}")
        try:
            _pack(folder, members, packed)
            published[PACKED] = hash_file(packed)
            store.publish(folder / PACKED, packed, on_progress)
        finally:
            packed.unlink(missing_ok=True)
    _write_sums(folder, sums | {file: published[file] for file in holding if file == PACKED})
    store.publish(folder / SUMS)
    for file in published.keys() - sums.keys() - set(holding):  # of another layout
        store.remove(folder / file)
    log.info("%s is published: %d images", store.address_of(folder), len(members))


def fetch_folder(
    store: Store,
    folder: Path,
    list_members: Callable[[Path], Mapping[str, str]],
    on_progress: Progress | None = None,
) -> bool:
    """Bring a published folder to its path on this disk, whole or not at all; return whether it was published.

    What is here already is not fetched again.

    Args:
        list_members: called with a folder that holds the files beside the members, verified; returns the members that
            belong there, each with its SHA-256, or "" if it is not known. Only these names are written to, whatever the
            store says.

    Raises:
        ArchiveError: if an object or a member is damaged, or a member has a name that does not belong there.
        DiskError: if it does not fit on the disk.
    """
    content, marker = store.read(folder / SUMS), folder / SUMS
    if content is None:
        return False
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    with translate_disk_errors(folder), lock:  # of two trainings, one fetches
        if marker.exists() and marker.read_bytes() == content:
            return True
        sums = _parse_sums(content)
        small = sorted(file for file in sums if _is_plain(file))
        large = sorted(sums.keys() - set(small))
        in_tars = PLACES in small and large != [] and PACKED not in large
        if not in_tars and (large != [PACKED] or PLACES in small):
            raise ArchiveError(
                f"{store.address_of(marker)} must list {PACKED}, or {PLACES} and tars. Received: {sorted(sums)}. "
                "Publish it again."
            )
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed: the lock is ours
        try:
            for file in small:
                store.fetch(folder / file, sums[file], marker, target=partial / file)
            members = list_members(partial)
            if folder.is_dir():  # the same members, and something new about them
                marker.unlink(missing_ok=True)
                for file in set(small) - {PLACES}:  # the images stay as they are
                    (partial / file).replace(folder / file)
                _write_sums(folder, sums)
                return True
            for file in large:
                (partial / file).parent.mkdir(exist_ok=True)
                store.fetch(folder / file, sums[file], marker, on_progress, target=partial / file)
            if in_tars:
                check_tars(partial, members)
            else:
                _unpack(partial / PACKED, members, partial)
                (partial / PACKED).unlink()
            _write_sums(partial, sums)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    log.info("%s is on this disk and verified: %d images", store.address_of(folder), len(members))
    return True


def _publish_tars(
    store: Store,
    folder: Path,
    members: Mapping[str, str],
    tars: Sequence[str],
    published: Mapping[str, str],
    on_progress: Progress | None,
) -> dict[str, str]:
    """Publish the tars that are not there yet; return the SHA-256 of each."""
    check_tars(folder, members)
    sums = {tar: hash_file(folder / tar) for tar in tars}
    for tar in tars:
        if published.get(tar) != sums[tar]:
            store.publish(folder / tar, on_progress=on_progress)
    return sums


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*", name) is not None and name not in (SUMS, PACKED)


def _parse_sums(content: bytes) -> dict[str, str]:
    """Read what `sha256sum` writes; lines of another form, or with a name that leads elsewhere, don't count."""
    lines = re.findall(r"^([0-9a-f]{64})  (\w[\w./-]*)$", content.decode(errors="replace"), re.MULTILINE | re.ASCII)
    return {name: sha256 for sha256, name in lines if name == PACKED or TAR_NAME.fullmatch(name) or _is_plain(name)}


def _write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    with write_beside(folder / SUMS) as beside:
        beside.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))


def _pack(folder: Path, members: Mapping[str, str], file: Path) -> None:
    needed = sum((folder / name).stat().st_size for name in members)
    require_space(folder, needed, f"{file}, which is published,", "set `data.data_dir` to another disk")
    with zipfile.ZipFile(file, "w") as packed:
        for name in sorted(members):
            data = (folder / name).read_bytes()
            _check_member(name, data, members[name], folder)
            packed.writestr(zipfile.ZipInfo(name), data)  # a fixed date, no compression: same images, same bytes


def _unpack(file: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write the members of a zip; their names must be exactly those of `members`."""
    with _open_zip(file) as packed:
        infos = packed.infolist()
        names = [info.filename for info in infos]
        if sorted(names) != sorted(members):
            odd = sorted(set(names) ^ set(members)) or "repeated names"
            raise ArchiveError(
                f"The images of a published data set must be those of its manifest, each once. Received: {odd[:3]} in "
                f"one alone, {len(names)} images instead of {len(members)}. Nothing was written; publish it again."
            )
        require_space(folder, sum(info.file_size for info in infos), str(folder), "set XDG_CACHE_HOME to another disk")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_BYTES:
                raise ArchiveError(
                    f"An image must be stored as it is, in at most {MAX_BYTES:,} bytes. Received: {info.filename!r} of "
                    f"{info.file_size:,} bytes. Nothing was written; publish the data set again."
                )
            data = packed.read(info)
            _check_member(info.filename, data, members[info.filename], file)
            target = folder / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


@contextlib.contextmanager
def _open_zip(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as packed:
            yield packed
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as exc:
        raise ArchiveError(f"{PACKED} must be a whole zip. Received: one that can't be read ({exc}).") from exc


def _check_member(name: str, data: bytes, sha256: str, place: Path) -> None:
    received = hashlib.sha256(data).hexdigest()
    if sha256 and received != sha256:
        raise ArchiveError(
            f"An image must have the bytes that the manifest names. Received: {name} in {place} with the SHA-256 "
            f"{received}. Remove the data set and run `prepare` again."
        )
