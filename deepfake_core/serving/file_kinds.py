"""Which files are images and which are clips: by their first bytes, and by their names only where those say nothing."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepfake_core.decoding import HEIF_BRANDS
from deepfake_core.errors import ConfigurationError
from deepfake_core.storage.files import show_name

HEAD_BYTES = 4096

MAX_FILES_NAMED = 20
"""Files that a message names."""

IMAGE_HEAD = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|GIF8[79]a|BM.{4}(?:\0{4}|.{8}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3})"
    rb"|II[*+U]\0|MM\0[*+]|IIR[OS]|MMOR|II\xbc|FUJIFILM|8BPS|qoif|icns|DDS \x7c\0|v/1\x01|\x01\xda[\0\1][\1\2]"
    rb"|\n[\0\2-\5]\x01[\1\2\4\x08]|P[1-6]\s(?:#[^\n]*\n)*\s*\d+\s+\d+\s|P7\nWIDTH|\0\0\x01\0[^\0]\0"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP  |\xff\x0a|\0\0\0\x0cJXL |.{4}ftyp(?:crx |jxl |" + HEIF_BRANDS + rb")",
    re.DOTALL,
)
"""JPEG, PNG, WebP; and what is an image, though of a kind that is not judged: GIF, BMP, TIFF, HEIC, RAW and so on."""

OTHER_HEAD = re.compile(rb"ID3|fLaC|OggS|RIFF|%PDF|%!PS|PK|\xd0\xcf\x11\xe0|.{4}ftyp", re.DOTALL)
"""Sound and documents, whose first bytes may hold a JPEG, such as a cover."""

CLIP_HEAD = re.compile(
    rb"\0.{3}(?:ftyp(?!M4[ABP])|moov|wide|free|skip|moof|styp)|.{4}mdat|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|OggS.*?(?:\x80theora|OVP80|BBCD|\x01video)|\0\0\x01[\xb3\xba]"
    rb"|.{0,203}?(?:(?:G.{187}){5}|(?:G.{191}){5}|(?:G.{203}){5})",
    re.DOTALL,
)
"""MP4 and its kin, Matroska, AVI, FLV, ASF; Ogg with pictures, MPEG; MPEG-TS, which may begin within a packet."""

IMAGE_NAME = re.compile(
    r"\.(3fr|arw|avif|bmp|cr[23w]|dcr|dds|dng|erf|exr|gif|hei[cf]|hif|icns|ico|j2k|jfif|jp2|jpe|jpe?g|jxl|jxr|kdc|mrw|nef"
    r"|nrw|orf|p[abgnp]m|pcx|pef|png|psd|qoi|raf|rw[2l]|sgi|srw|tga|tiff?|wdp|webp|x3f)",
    re.IGNORECASE,
)
CLIP_NAME = re.compile(
    r"\.(3g[2p]|asf|avi|f4v|flv|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|og[mv]|ts|vob|webm|wmv)", re.IGNORECASE
)
"""Of files that are what their names say, though nothing in them tells: damaged ones, mostly."""


def is_clip(file: Path) -> bool:
    """Whether a file is a clip rather than an image; if it can't be told by its content, its name decides."""
    return _name_kind(file) == "clip"


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a folder's images and clips, and its other files, each in order; folders below are searched too.

    A linked folder is searched once, and not at all where it leads to a folder that holds this one. What should be an
    image but can't be read is among the images, so that it is missed by nobody.

    Raises:
        ConfigurationError: if the folder holds neither image nor clip.
    """
    known: list[Path] = []
    others: list[Path] = []
    for file in _walk(folder, folder.resolve(), set(), known):
        (known if _name_kind(file) else others).append(file)
    if not known:
        raise ConfigurationError(f"A folder must hold images or clips. Received: {folder}, which holds none.")
    return sorted(known), sorted(others)


def list_names(files: Sequence[Path]) -> str:
    """Return the files' names as a line: the first of them, where there are many."""
    more = f" and {len(files) - MAX_FILES_NAMED:,} more" if len(files) > MAX_FILES_NAMED else ""
    return ", ".join(map(show_name, files[:MAX_FILES_NAMED])) + more


def _name_kind(file: Path) -> str:
    """Return `image`, `clip`, or nothing where a file is neither."""
    try:
        if file.exists() and not file.is_file():
            return ""
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
    except OSError:
        return "clip" if CLIP_NAME.fullmatch(file.suffix) else "image"  # it is judged, and found unreadable
    if IMAGE_HEAD.match(head):
        return "image"
    if CLIP_HEAD.match(head):
        return "clip"
    if file.name.startswith("._"):
        return ""  # what macOS leaves beside a file of that name on other systems' disks
    if b"\xff\xd8\xff" in head and not OTHER_HEAD.match(head):
        return "image"  # a JPEG behind what a download or a mail has put before it
    return "image" if IMAGE_NAME.fullmatch(file.suffix) else "clip" if CLIP_NAME.fullmatch(file.suffix) else ""


def _walk(folder: Path, top: Path, seen: set[Path], failed: list[Path]) -> Iterator[Path]:
    """Yield files, and linked folders that are not followed; add folders that can't be listed to `failed`."""
    links: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: failed.append(Path(error.filename))):
        here = Path(parent)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        links += [here / name for name in sorted(folders) if (here / name).is_symlink()]
        yield from (here / name for name in files)
    for link in links:
        if top.is_relative_to(link.resolve()):
            yield link
        else:
            yield from _walk(link, top, seen, failed)
