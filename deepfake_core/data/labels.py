"""Labels by folder, and whether a source's csv files agree with them."""

import io
import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from deepfake_core.config import CLASS_NAMES, Source
from deepfake_core.data.archive import ArchiveReader
from deepfake_core.data.members import UNREADABLE, Member
from deepfake_core.errors import ArchiveError, DatasetError

log = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def name_label(source: Source, folder: str) -> str:
    """Return the class of a folder's images, by the innermost of its parts that names one; empty if none does.

    Raises:
        DatasetError: if that part names both.
    """
    for part in reversed(PurePosixPath(folder).parts):
        named = [label for label, names in source.folder_names.items() if any(_matches(part, name) for name in names)]
        if len(named) > 1:
            raise DatasetError(
                f"A folder's images must be of one class. Received: {source.name}, where {part!r} fits `real_folder` "
                f"{source.real_folder!r} and `fake_folder` {source.fake_folder!r}. Correct one of them."
            )
        if named:
            return named[0]
    return ""


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def check_labels(source: Source, index: pd.DataFrame, members: list[Member]) -> None:
    """Refuse a source of which no image has a label.

    Raises:
        DatasetError: with the folders that are there.
    """
    if (index["reason"] == "").any():
        return
    folders = sorted({str(PurePosixPath(member.name).parent) for member in members})
    raise DatasetError(
        f"A source must hold images in folders named {source.real_folder!r} or {source.fake_folder!r}. "
        f"Received: {source.name}, {len(index)} files, reasons "
        f"{index['reason'].value_counts().to_dict()}, folders {folders[:10]}. {_advise(index)}"
    )


def _advise(index: pd.DataFrame) -> str:
    """Say what to do about a source of which no image can be used."""
    reasons, nested = set(index["reason"]), index["member"][index["member"].str.lower().str.endswith(ARCHIVE_SUFFIXES)]
    advice = []
    if "symlink" in reasons:
        advice.append(
            "Its links lead out of the source, or to nothing: set `follow_links: true` where it is a folder, or put "
            "the files there that they lead to."
        )
    if UNREADABLE in reasons:
        advice.append("This user can't read some of its files and folders: grant access, such as by `chmod -R u+rX`.")
    if "heic" in reasons:
        advice.append("HEIC and AVIF images are not read: convert them to JPEG, for example with `heif-convert`.")
    if len(nested):
        advice.append(f"Archives inside a source are not read: unpack {', '.join(nested[:3])}, and name the result.")
    if "no_label" in reasons or not advice:
        advice.append("Correct `real_folder` and `fake_folder` of the source, or the source.")
    return " ".join(advice)


def check_csv_files(source: Source, reader: ArchiveReader, index: pd.DataFrame) -> None:
    """Compare the csv files' labels with the folders'.

    Raises:
        DatasetError: if they disagree on an image, or no csv file names one.
    """
    usable = index.loc[index["reason"] == "", ["member", "label"]]
    images = usable.assign(tail=_cut_tails(usable["member"])).drop_duplicates("tail", keep="last")
    checked = 0
    for member in reader.members:
        if not member.name.endswith(".csv") or member.problem:
            continue
        table = _read_csv(source, reader, member)
        if not {"path", "label"} <= set(table.columns):
            continue
        stated = np.where(table["label"] == source.csv_real_label, *CLASS_NAMES)
        rows = pd.DataFrame({"tail": _cut_tails(table["path"].astype(str)), "value": table["label"], "stated": stated})
        rows = rows.merge(images, on="tail")
        for row in rows[rows["stated"] != rows["label"]].itertuples():
            raise DatasetError(
                f"Folders and csv files must agree on every label. Received: {source.name}, {row.member!r} is "
                f"in a folder of {row.label} images, but {member.name} has label {row.value}, which means "
                f"{row.stated} (`csv_real_label` is {source.csv_real_label}). Nothing was written. Correct the "
                "source's label rule, or leave the source out."
            )
        checked += len(rows)
    if not checked:
        raise DatasetError(
            f"`csv_real_label` needs csv files with columns `path` and `label` that name the source's images. "
            f"Received: {source.name}, where none does. Leave `csv_real_label` empty for this source."
        )
    log.info("%s: %d labels agree with the csv files", source.short_name, checked)


def _cut_tails(paths: Iterable[str]) -> list[str]:
    """Return the last three parts of each path."""
    return ["/".join([part for part in path.split("/") if part not in ("", ".")][-3:]) for path in paths]


def _read_csv(source: Source, reader: ArchiveReader, member: Member) -> pd.DataFrame:
    try:
        return pd.read_csv(io.BytesIO(reader.read(member)))
    except (ValueError, ArchiveError) as exc:
        raise DatasetError(f"{source.name}: {member.name} must be a csv file ({exc}).") from exc
