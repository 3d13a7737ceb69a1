"""The images that a command's arguments name: files, folders, globs and standard input."""

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ConfigurationError
from deepfake_core.serving.file_kinds import IMAGE_HEAD, find_files
from deepfake_core.serving.predictor import Encoded
from deepfake_core.storage.files import show_name

STANDARD_INPUT = "standard input"

NamedImage = tuple[str, Encoded]


def find_images(arguments: Sequence[str]) -> tuple[list[NamedImage], list[Path]]:
    """Return what was named, each with its name, and the files in folders that are neither image nor clip.

    Raises:
        ConfigurationError: if a name is empty, a glob or a folder yields nothing, or no image is named.
    """
    named: list[NamedImage] = []
    skipped: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if not argument:  # as a path, this is the current folder
            raise ConfigurationError("An image must have a name. Received: an empty one. Pass files, folders or globs.")
        if argument == "-":
            named += _read_standard_input()
        elif path.is_dir():
            known, others = find_files(path)
            skipped += others
            named += [(str(file), file) for file in known]
        elif not path.exists() and glob.has_magic(argument):
            found = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - absolute patterns too
            if not found:
                raise ConfigurationError(f"A glob must match files. Received: {argument}, which matches none.")
            named += [(file, Path(file)) for file in found if not Path(file).is_dir()]
            if "**" not in argument:  # which opens folders, as others don't
                skipped += [Path(file) for file in found if Path(file).is_dir()]
        else:
            named.append((argument, path))
    if not named:
        raise ConfigurationError(f"No images given. Received: {' '.join(arguments)}. Pass files, folders or globs.")
    return [(show_name(name), image) for name, image in named], skipped


def _read_standard_input() -> list[NamedImage]:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if b"\0" in data or IMAGE_HEAD.match(data):  # no name holds a zero byte
        return [(STANDARD_INPUT, data)]
    return [(name, Path(name)) for name in map(os.fsdecode, data.splitlines()) if name.strip()]
