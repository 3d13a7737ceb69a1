"""A zip or a folder on this disk as an archive. A zip is hashed and verified once, and again where it has changed."""

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepfake_core.config import Source
from deepfake_core.data.archive import Archive, verify_zip
from deepfake_core.data.members import list_folder
from deepfake_core.errors import SourceError
from deepfake_core.storage.files import hash_file, write_json
from deepfake_core.storage.store import Store


def open_local(source: Source, store: Store) -> Archive:
    """Return the archive of a source that is a zip, which is verified, or a folder on this disk.

    Raises:
        SourceError: if it does not exist.
        ArchiveError: if it is a zip and damaged.
    """
    path = Path(source.name).expanduser()
    if path.is_dir():
        members = list_folder(path, source.follow_links)
        listing = [f"{member.name}\0{member.size}\0{member.modified}" for member in members]
        digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()
        return Archive(source, path.absolute(), digest, sum(member.size for member in members))
    if not path.is_file():
        raise SourceError(
            f"A local source must be an existing zip or folder. Received: {source.name!r} "
            f"(looked at {path.absolute()}). Correct `data.sources`."
        )
    found = path.stat()
    return Archive(source, path.absolute(), hash_zip(path, store), found.st_size, modified=found.st_mtime_ns)


def hash_zip(path: Path, store: Store) -> str:
    """Return the SHA-256 of a zip on this disk, which is verified.

    It is read whole once; after that, only if its size, its time of modification or its inode has changed.

    Raises:
        ArchiveError: if it is damaged.
    """
    found = path.stat()
    state = {"size": found.st_size, "modified_ns": found.st_mtime_ns, "inode": found.st_ino}
    known = store.local_archive(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(known.read_text())
        if kept["state"] == state:
            return str(kept["sha256"])
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(hash_file, path)
        verify_zip(path)
    digest = hashed.result()
    write_json(known, {"path": str(path.absolute()), "state": state, "sha256": digest})
    return digest
