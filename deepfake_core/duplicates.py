"""One copy is kept per picture, and the manifest lists every other."""

import logging

import pandas as pd

log = logging.getLogger(__name__)


def mark_duplicates(index: pd.DataFrame) -> pd.DataFrame:
    """Decide which images are kept.

    Pictures are equal if their decoded pixels are (`group`), whatever their bytes. The copy kept is
    the first by order of sources, then by member name. A picture under both labels is dropped
    on both sides, since one of them is wrong.

    Args:
        index: image indexes of all sources, concatenated in the order of `data.sources`.

    Returns:
        The same rows with `kept` (bool), and `reason` filled in: `kept`, `duplicate`,
        `label_conflict`, or what the index said.
    """
    rows = index.reset_index(drop=True)
    usable = rows[rows["reason"] == ""]
    order = {source: position for position, source in enumerate(dict.fromkeys(index["source"]))}
    ranked = usable.assign(rank=usable["source"].map(order)).sort_values(["rank", "member"], kind="stable")
    labels_per_group = ranked.groupby("group")["label"].transform("nunique")
    conflicting = labels_per_group.index[labels_per_group > 1]
    duplicate = ranked.index[ranked.duplicated("group")]

    reason = rows["reason"].mask(rows["reason"] == "", "kept")
    reason.loc[duplicate] = "duplicate"
    reason.loc[conflicting] = "label_conflict"
    rows["reason"], rows["kept"] = reason, reason == "kept"
    log.info(
        "%d usable images: %d kept, %d duplicates, %d under both labels",
        len(usable),
        int(rows["kept"].sum()),
        int((reason == "duplicate").sum()),
        len(conflicting),
    )
    return rows
