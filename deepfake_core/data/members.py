"""The members of an archive: what a zip or a folder holds, by name, and what of it is not read."""

import os
import re
import stat
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepfake_core.decoding import MAX_BYTES
from deepfake_core.storage.files import show_name

UNREADABLE = "unreadable"
"""The reason of files that are gone by now, or that the disk or its permissions don't let be read."""

_SYSTEM_FILE = re.compile(r"(^|/)(\._[^/]*|__MACOSX/.*)$")
"""What macOS writes beside files: on disks without its attributes, and into zips."""


@dataclass(frozen=True)
class Member:
    """One file of an archive, under a name that no other has, with / between folders.

    `problem` is a reason not to read it, or empty. `modified` is when a file of a folder was, in nanoseconds.
    """

    name: str
    size: int
    problem: str = ""
    handle: Any = None
    modified: int = 0


def list_zip(infos: Sequence[zipfile.ZipInfo]) -> list[Member]:
    """Return a zip's files."""
    named = ((info.filename.replace("\\", "/"), info) for info in infos)  # Windows' separator
    return _tell_apart(
        Member(name, info.file_size, _find_problem(name, info), info)
        for name, info in named
        if not name.endswith("/") or info.file_size  # else a folder
    )


def _tell_apart(members: Iterable[Member]) -> list[Member]:
    """Number those that share a name but for the first, since each has its bytes."""
    found: dict[str, Member] = {}
    for member in members:
        unique, number = member.name, 1
        while unique in found:
            number += 1
            unique = f"{member.name} ({number})"
        found[unique] = member if number == 1 else replace(member, name=unique)
    return list(found.values())


def _find_problem(name: str, info: zipfile.ZipInfo) -> str:
    parts = name.split("/")
    if not parts[0] or parts[0].endswith(":") or ".." in parts:
        return "unsafe_name"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "symlink"
    if not parts[-1]:
        return "not_a_file"
    return _find_common_problem(name, info.file_size)


def _find_common_problem(name: str, size: int) -> str:
    if _SYSTEM_FILE.search(name):
        return "system_file"
    return "too_large" if size > MAX_BYTES else ""


def list_folder(path: Path, follow_links: bool = False) -> list[Member]:
    """Return a folder's files in order of names, and what else is there with the reason not to read it.

    Links to what is in the folder are followed, and with `follow_links` all; but no link to a folder around it, and of
    those that lead to one folder only the first.
    """
    root = path.resolve()
    return _tell_apart(_list_below(root, "", Path(root.anchor) if follow_links else root, (), set()))


def _list_below(
    folder: Path, prefix: str, allowed: Path, around: tuple[Path, ...], followed: set[Path]
) -> Iterator[Member]:
    """List a folder, then those in it.

    Args:
        prefix: of the members' names.
        allowed: links may lead below this folder.
        around: the folders through which this one was reached, by their real paths.
        followed: the folders that links led to so far, by their real paths; is added to.
    """
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - quicker: most are files
    except OSError:
        yield Member(prefix.rstrip("/"), 0, UNREADABLE, folder)
        return
    folders = []
    for each in names:
        file, name = folder / each, prefix + show_name(each)
        try:
            info = file.lstat()
            if stat.S_ISLNK(info.st_mode):
                target = _follow(file, allowed, (*around, *folder.parents, folder))
                if target and target not in followed:
                    file, info = target, target.lstat()
                    if stat.S_ISDIR(info.st_mode):
                        followed.add(target)
        except OSError:  # gone by now
            yield Member(name, 0, UNREADABLE, file)
            continue
        if stat.S_ISDIR(info.st_mode):
            folders.append((file, f"{name}/"))
            continue
        problem = _find_common_problem(name, info.st_size)
        if not stat.S_ISREG(info.st_mode):
            problem = "symlink" if stat.S_ISLNK(info.st_mode) else "not_a_file"
        yield Member(name, info.st_size, problem, file, info.st_mtime_ns)
    for below, name in folders:
        yield from _list_below(below, name, allowed, (*around, folder), followed)


def _follow(link: Path, allowed: Path, around: Collection[Path]) -> Path | None:
    """Return what a link leads to; None if that is not allowed, not there, or around the link."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return None
    return target if target.is_relative_to(allowed) and target not in around else None
