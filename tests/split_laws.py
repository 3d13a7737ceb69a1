"""Pictures and links between them, without files; their splits, and the laws that every split keeps."""

import hashlib
from collections.abc import Iterable, Sequence
from random import Random

import pandas as pd
import pytest
from hypothesis import strategies as st

from deepfake_core.config import SPLITS
from deepfake_core.data import groups
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.links import LINK_COLUMNS
from deepfake_core.data.reported_images import WHOLE_IMAGE
from deepfake_core.data.splits import assign_splits


def pictures(count: int) -> pd.DataFrame:
    """Make index rows of distinct pictures, without the pictures."""
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]
    labels = [("real", "fake")[i % 2] for i in range(count)]
    members = [f"{label}/{i}.jpg" for i, label in enumerate(labels)]
    frame = pd.DataFrame({"source": "s", "member": members, "sha256": names, "label": labels})
    return frame.assign(width=range(count), height=1, bytes=1, format="JPEG", jpeg_table="", reason="")


def link(names: Sequence[str], pairs: Iterable[tuple[int, int, bool]]) -> pd.DataFrame:
    """Link pictures by their positions."""
    rows = {(*sorted((names[one], names[other])), 10, 0.9, 20.0, same) for one, other, same in pairs if one != other}
    frame = pd.DataFrame(sorted(rows), columns=LINK_COLUMNS).drop_duplicates(["image", "other"], ignore_index=True)
    return frame.astype({"same_picture": bool})


NO_LINKS = link([], [])


def split(
    index: pd.DataFrame, links: pd.DataFrame = NO_LINKS, memory: dict | None = None, val=0.2, test=0.2, most: int = 50
):
    """Group and split pictures; a group may hold `most`, or 2 % of all where that is more and `most` is 50."""
    present = links["image"].isin(index["sha256"]) & links["other"].isin(index["sha256"])
    links = links[present].reset_index(drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MAX_GROUP_IMAGES", most)
        patch.setattr(groups, "MAX_GROUP_SHARE", groups.MAX_GROUP_SHARE if most == 50 else 0)
        return assign_splits(mark_duplicates(index, links), links, memory or {}, val, test)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame, int, int]:
    """Draw pictures, links between some of them, how many were there at first, and how many a group may hold.

    The links come from a seed: a drawn list would seldom hold more than three.
    """
    count = draw(st.integers(150, 250))
    random = Random(draw(st.integers(0, 2**32)))
    pairs = [
        (random.randrange(count), random.randrange(count), random.random() < 0.5)
        for _ in range(draw(st.integers(0, 80)))
    ]
    index = pictures(count)
    links, first = link(index["sha256"].tolist(), pairs), draw(st.integers(120, count))
    return index, links, first, draw(st.sampled_from([2, 4, 50]))


def check_laws(index: pd.DataFrame, links: pd.DataFrame, rows: pd.DataFrame) -> None:
    """No group and no link crosses splits, no label is changed, every file is accounted for."""
    kept = rows[rows["kept"]].set_index("sha256")
    assert (kept.groupby("group")["split"].nunique() == 1).all()
    inside = links[links["image"].isin(kept.index) & links["other"].isin(kept.index)]
    assert (kept["split"].loc[inside["image"]].to_numpy() == kept["split"].loc[inside["other"]].to_numpy()).all()
    assert sorted(rows["member"]) == sorted(index["member"])
    assert rows.set_index("member")["label"].equals(index.set_index("member")["label"].loc[rows["member"]])
    assert set(rows["reason"]) <= {"kept", "copy", "split_conflict", WHOLE_IMAGE}
    assert ((rows["reason"] == "kept") == rows["kept"]).all()
    assert (rows["split"].isin(SPLITS) == rows["kept"]).all()
    copies = rows[rows["reason"] == "copy"]
    assert (copies["copy_of"] != "").all()
