"""Which pictures belong together, and which copy is kept."""

import logging

import numpy as np
import pandas as pd

from deepfake_core.data.groups import find_components, find_repeated, join_groups, replace_some
from deepfake_core.data.reported_images import WHOLE_IMAGE, find_linkable, find_whole_images, link_faces

log = logging.getLogger(__name__)

RANKED_BY = ["sha256", "label", "source", "member", "width", "height", "bytes"]
"""What decides which of several copies is kept."""


def mark_duplicates(index: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Name the group of each usable image, and decide which images are kept.

    Groups are the connected components of the links. Inside a group, of the images of one label that show the same
    picture the largest is kept (pixels, then bytes, then the source listed first, then the member's name). Other
    near copies are all kept, and so are images of different labels: an edit and its source belong to the most valuable
    pairs there are. Only where the same bytes have both labels, both are dropped: one label is wrong.

    Args:
        index: image indexes of all sources, concatenated in the order of `data.sources`.
        links: from `find_links`.

    Returns:
        The same rows without `hash` and `thumbnail`, with `group` (its smallest SHA-256), `kept` (bool), `copy_of`
        (SHA-256 of the image kept instead), and `reason` filled in: `kept`, `duplicate` (same bytes), `copy` (same
        picture), `label_conflict`, `whole_image` (only its face is used, which has its links), or what the index said.
    """
    rows = index.drop(columns=["hash", "thumbnail"], errors="ignore").reset_index(drop=True)
    del index  # so that columns which are replaced take no memory, if the caller has none
    rows.loc[find_whole_images(rows) & (rows["reason"] == ""), "reason"] = WHOLE_IMAGE
    usable = rows["reason"] == ""
    links = link_faces(rows[usable & find_linkable(rows, links)], links)
    rows["copy_of"] = ""
    rows.loc[usable, "reason"] = "kept"
    is_several = find_repeated(rows["sha256"]) | rows["sha256"].isin(pd.concat([links["image"], links["other"]]))
    several = rows.loc[usable & is_several, RANKED_BY]  # all others are alone, and kept
    order = {source: position for position, source in enumerate(rows["source"].unique())}
    rank = several["source"].astype("str").map(order)
    ranked = several.assign(rank=rank, pixels=several["width"] * several["height"])
    ranked = ranked.sort_values(
        ["pixels", "bytes", "rank", "member"], ascending=[False, False, True, True], kind="stable"
    )[["sha256", "label"]]
    conflicting = ranked.groupby("sha256")["label"].transform("nunique") > 1
    names = pd.Index(sorted(set(several["sha256"])))
    ranked["picture"] = _find_same_pictures(names, links, ranked[~conflicting])[names.get_indexer(ranked["sha256"])]
    candidates = ranked[~conflicting]
    best = candidates.groupby("picture")["sha256"].transform("first")
    again = candidates.index[candidates.duplicated("picture")]
    count = int((usable & ~is_several).sum()) + len(names)
    group = names[join_groups(links, names, count)]
    others = rows.index[~usable | is_several]
    groups = pd.Series(group[names.get_indexer(several["sha256"])], several.index).reindex(others, fill_value="")
    rows["group"] = replace_some(rows["sha256"], others, groups)
    rows.loc[again, "copy_of"] = best[again]
    rows.loc[again, "reason"] = np.where(rows.loc[again, "sha256"] == best[again], "duplicate", "copy")
    rows.loc[ranked.index[conflicting], "reason"] = "label_conflict"
    rows["kept"] = rows["reason"] == "kept"
    counts = rows.loc[usable, "reason"].value_counts().sort_index()
    kept_groups = rows.loc[several.index, ["group", "kept"]].query("kept").groupby("group").size()
    log.info(
        "%d usable images: %s; %d groups of more than one kept image, the largest of %d",
        int(usable.sum()),
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        int((kept_groups > 1).sum()),
        int(kept_groups.max() if len(kept_groups) else rows["kept"].any()),
    )
    return rows


def _find_same_pictures(names: pd.Index, links: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Number the pictures: images of one label that are linked as the same picture share a number."""
    label = rows.drop_duplicates("sha256").set_index("sha256")["label"]
    same = links[links["same_picture"].astype(bool)]
    one, other = same["image"].map(label), same["other"].map(label)
    return find_components(names, same[one.notna() & (one == other)])
