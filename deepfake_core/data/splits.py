"""Kept images are divided into train, validation, test and regression, groups of near copies as a whole."""

import hashlib
import logging
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from deepfake_core.config import CLASS_NAMES, FEEDBACK, REGRESSION, SPLITS
from deepfake_core.data.groups import find_components, find_ends
from deepfake_core.data.reported_images import find_linkable, link_faces, name_pictures
from deepfake_core.errors import DatasetError

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 10_000
REGRESSION_SHARE = 0.3
"""Share of the new groups with a confirmed report that no model ever learns from."""


def assign_splits(
    rows: pd.DataFrame, links: pd.DataFrame, memory: Mapping[str, str], val_fraction: float, test_fraction: float
) -> pd.DataFrame:
    """Put each kept image into train, val, test or regression; all of a group go to one split.

    A group whose images an earlier version held stays in that version's split. A new group's split is a function
    of the group alone: the hash of its name, read as a number between 0 and 1, falls below `test_fraction` (test),
    below `test_fraction + val_fraction` (val), or above (train). So every source and label is divided by the same
    fractions, up to chance. Before that, a new group that holds an image of the source `feedback` goes to regression
    where other digits of the same hash fall below `REGRESSION_SHARE`: both choices are independent.

    Where new images would join groups of different splits, they are left out; where old ones would, the smaller part
    is. Where a group was full, images of other groups may still be near copies of its own: of two in different splits,
    the new one is left out. The reason is then `split_conflict`.

    Args:
        rows: from `mark_duplicates`.
        links: from `find_links`.
        memory: splits of images that earlier versions held, by SHA-256; see `read_memory`.

    Returns:
        The same rows with `split` (empty where not kept), and the `group` of the remaining images.

    Raises:
        DatasetError: if a class has no image in train, val or test.
    """
    links = link_faces(rows[(rows["group"] != "") & find_linkable(rows, links)], links)
    memory = _recall_reported(rows, memory)
    rows = _resolve_conflicts(rows, links, memory)
    split = _draw_splits(rows, val_fraction, test_fraction)
    if memory:
        remembered = rows["sha256"].map(memory).groupby(rows["group"]).transform("first")
        split = remembered.where(remembered.notna(), split).astype(split.dtype)  # the same manifest as without
    rows = _leave_out_across(rows.assign(split=split), links, memory)
    split = rows["split"].where(rows["kept"], "")
    rows = rows.assign(split=split)
    for name in (one for one in SPLITS if one != REGRESSION):
        for label in CLASS_NAMES:
            if not ((split == name) & (rows["label"] == label)).any():
                kept = rows.loc[rows["kept"], "label"].value_counts().to_dict()
                raise DatasetError(
                    f"Each split but {REGRESSION} must hold images of both classes. Received: no {label} image in "
                    f"{name}; kept images in all: {kept}, left out: {count_reasons(rows)}. Add a source with {label} "
                    "images, or raise `data.test_fraction` or `data.val_fraction`."
                )
    return rows


def _recall_reported(rows: pd.DataFrame, memory: Mapping[str, str]) -> Mapping[str, str]:
    """Return `memory` with the reported images too, by the SHA-256 of what was sent."""
    reported = rows[rows["source"] == FEEDBACK]
    sent = zip(reported["sha256"], name_pictures(reported), strict=True)
    return {image: memory[name] for image, name in sent if name in memory} | dict(memory)


def _draw_splits(rows: pd.DataFrame, val_fraction: float, test_fraction: float) -> pd.Series:
    """Return the split of each row's group, from the hash of its name."""
    position, second = np.empty((2, len(rows)))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        names = rows["group"].iloc[start : start + ROWS_AT_ONCE]
        digests = np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest()[:16] for name in names), ">u8")
        position[start : start + len(names)], second[start : start + len(names)] = digests.reshape(-1, 2).T / 2**64
    split = np.full(len(rows), SPLITS.index("train"), np.int8)
    split[position < test_fraction + val_fraction] = SPLITS.index("val")
    split[position < test_fraction] = SPLITS.index("test")
    reported = rows["group"].isin(rows.loc[rows["source"] == FEEDBACK, "group"]).to_numpy()
    split[reported & (second < REGRESSION_SHARE)] = SPLITS.index(REGRESSION)
    names = pa.DictionaryArray.from_arrays(split, pa.array(SPLITS, pa.large_string())).dictionary_decode()
    return names.to_pandas().set_axis(rows.index)


def _resolve_conflicts(rows: pd.DataFrame, links: pd.DataFrame, memory: Mapping[str, str]) -> pd.DataFrame:
    """Leave out what joins images of different splits, and rename the groups of the others."""
    if not memory:
        return rows
    grouped = rows[rows["group"] != ""]
    remembered = grouped["sha256"].map(memory)
    torn = set(grouped["group"][remembered.groupby(grouped["group"]).transform("nunique") > 1])
    if not torn:
        return rows
    images = grouped[grouped["group"].isin(torn)].drop_duplicates("sha256").set_index("sha256")
    names = images.index.sort_values()
    split = names.map(lambda name: memory.get(name, "")).to_numpy(object)
    inside = links[links["image"].isin(names) & links["other"].isin(names)]
    ends = find_ends(names, inside)

    # Parts are linked images of one split, or linked new ones. The largest are kept, old ones first.
    part = find_components(names, inside[split[ends[0]] == split[ends[1]]])
    sides = pd.Series(split).groupby(part).first()
    beside: dict[int, set[int]] = {number: set() for number in sides.index}
    for one, other in zip(part[ends[0]], part[ends[1]], strict=True):
        beside[one].add(other)
        beside[other].add(one)
    side: dict[int, str] = {}
    for number in sorted(beside, key=lambda number: (not sides[number], -(part == number).sum(), number)):
        allowed = {side[other] for other in beside[number] if other in side} | ({sides[number]} - {""})
        if len(allowed) == 1:
            (side[number],) = allowed
    kept = np.isin(part, list(side))
    together = find_components(names, inside[kept[ends[0]] & kept[ends[1]]])
    group = pd.Series(names, index=names).groupby(together).transform("first")
    left_out = set(names[~kept])

    rows = rows.copy()
    rows["group"] = rows["sha256"].map(group).where(rows["group"] != "").fillna(rows["group"])
    return _leave_out(rows, left_out)


def _leave_out_across(rows: pd.DataFrame, links: pd.DataFrame, memory: Mapping[str, str]) -> pd.DataFrame:
    """Leave out what is linked to an image of another split, whose group was full; known images stay before new ones.

    Args:
        rows: with the `split` of each group.
    """
    linked = rows["sha256"].isin(pd.concat([links["image"], links["other"]])) & (rows["group"] != "")
    columns = ["sha256", "group", "kept", "split"]
    some = rows.loc[rows["group"].isin(rows.loc[linked, "group"]), columns]
    held = some[some["kept"].groupby(some["group"]).transform("any")]
    split = held.drop_duplicates("sha256").set_index("sha256")["split"]
    one, other = links["image"].map(split), links["other"].map(split)
    across = links[one.notna() & other.notna() & (one != other)]
    if across.empty:
        return rows
    beside: dict[str, set[str]] = {name: set() for name in (*across["image"], *across["other"])}
    for name, linked in zip(across["image"], across["other"], strict=True):
        beside[name].add(linked)
        beside[linked].add(name)
    stays = set[str]()
    for name in sorted(beside, key=lambda name: (name not in memory, name)):
        if stays.isdisjoint(beside[name]):
            stays.add(name)
    left_out = set(beside) - stays
    goes, names = some["sha256"].isin(left_out), some["sha256"]
    rows = rows.copy()
    rows.loc[some.index, "group"] = names.mask(goes).groupby(some["group"]).transform("min").mask(goes, names)
    return _leave_out(rows, left_out)


def _leave_out(rows: pd.DataFrame, left_out: Collection[str]) -> pd.DataFrame:
    """Mark the images of these SHA-256, each of a group of its own by now, as `split_conflict`."""
    conflict = rows["sha256"].isin(left_out) & rows["kept"]
    if not conflict.any():
        return rows
    rows = rows.copy()
    rows.loc[conflict, "reason"] = "split_conflict"
    instead = rows[rows["copy_of"].isin(left_out) & ~rows["sha256"].isin(left_out)]  # a smaller copy takes its place
    instead = instead.sort_values(["width", "bytes"], ascending=False, kind="stable").drop_duplicates("copy_of")
    rows.loc[instead.index, "reason"] = "kept"
    rows.loc[instead.index, "copy_of"] = ""
    rows["kept"] = rows["reason"] == "kept"
    log.warning("%d images left out, which are near copies of images in another split", int(conflict.sum()))
    return rows


def count_reasons(rows: pd.DataFrame) -> dict[str, int]:
    """Count rows by `reason`."""
    return {str(reason): int(count) for reason, count in rows["reason"].value_counts().sort_index().items()}
