"""The parts of a set of images that are worth metrics of their own, as sources and file names define them."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Rows: TypeAlias = "Mapping[str, Sequence[str]] | pd.DataFrame"
"""Columns of the manifest by name: a table, or lists where pandas is not installed."""

EDITED_PARTS = ("left eye", "right eye", "nose", "mouth")
EDIT_NAME = re.compile(r"(easy|mid|hard)_\d+_([01]{3,4})\.\w+$")
"""How ciplab names a fake: its difficulty, its number, and a bit for each of `EDITED_PARTS`."""

ORIGIN_NAME = re.compile(r"(?:^|/)(train|valid|validation|val|test)/")


def find_parts(labels: np.ndarray, rows: Rows) -> dict[str, dict[str, np.ndarray]]:
    """Find the parts that are worth metrics of their own.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        rows: columns `source` and `member` of the manifest, as a table or a mapping, n long.

    Returns:
        By kind and name, a mask of shape (n,): `source`; `origin`, the split that the source itself has an image in;
        `edit`, from ciplab's names of fakes (easy, mid, hard; the parts replaced), with the reals of their source.
        Kinds with less than two names are left out, except sources.
    """
    source = np.asarray(rows["source"])
    parts: dict[str, dict[str, np.ndarray]] = {"source": {name: source == name for name in sorted(set(source))}}
    origin = np.array([match[1] if (match := ORIGIN_NAME.search(member)) else "" for member in rows["member"]])
    names = [f"{one}/{split}" for one, split in zip(source, origin, strict=True)]
    named = {name: np.array([other == name for other in names]) for name in sorted(set(names)) if name[-1] != "/"}
    if len(named) > 1:
        parts["origin"] = named
    edits: dict[str, np.ndarray] = {}
    for position, (member, label) in enumerate(zip(rows["member"], labels, strict=True)):
        match = EDIT_NAME.search(member) if label == 1 else None
        replaced = [part for part, bit in zip(EDITED_PARTS, match[2], strict=False) if bit == "1"] if match else []
        for name in [match[1], *replaced] if match else ():
            edits.setdefault(name, np.zeros(len(labels), bool))[position] = True
    for fakes in edits.values():
        fakes |= (labels == 0) & np.isin(source, np.unique(source[fakes]))
    if edits:
        order = ("easy", "mid", "hard", *EDITED_PARTS)
        parts["edit"] = {name: edits[name] for name in order if name in edits}
    return parts
