"""The images of confirmed reports in an index: the faces, and the whole images that they were cut out of."""

from collections.abc import Hashable

import numpy as np
import pandas as pd

from deepfake_core.config import FEEDBACK

WHOLE = "whole"
"""Folder of the whole images, beside those of the faces. They are searched for near copies, and never kept."""

WHOLE_IMAGE = "whole_image"
"""Why they are left out."""


def name_pictures(rows: pd.DataFrame) -> pd.Series:
    """Return the SHA-256 of each row's image; of a report, that of what was sent: its face may be cut out in new bytes.

    Args:
        rows: with `source`, `member` and `sha256`.
    """
    names, reported = rows["sha256"].copy(), rows["source"] == FEEDBACK
    sent = rows.loc[reported, "member"].str.extract(r"([0-9a-f]{64})\.\w+$", expand=False)
    names[reported] = sent.fillna(names[reported])
    return names


def find_whole_images(rows: pd.DataFrame) -> pd.Series:
    """Return whether each row is a whole image of which only the face is used.

    Args:
        rows: with `source` and `member`.
    """
    found = rows["source"] == FEEDBACK
    found[found] = rows.loc[found, "member"].str.startswith(f"{WHOLE}/")
    return found


def find_linkable(rows: pd.DataFrame, links: pd.DataFrame) -> pd.Series:
    """Return whether each row is at an end of a link, reported, or what was sent: all that `link_faces` needs."""
    reported = rows["source"] == FEEDBACK
    named = pd.concat([links["image"], links["other"], name_pictures(rows[reported])])
    return rows["sha256"].isin(named) | reported


def link_faces(rows: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Give each face the links of the image that it was cut out of, and link it to that image's own bytes.

    A photograph and a crop of it have different hashes, so a face is seldom linked to a copy of its photograph.

    Args:
        rows: those that can be kept, with `source`, `member` and `sha256`.
        links: from `find_links`.

    Returns:
        The links between images of `rows`.
    """
    names = name_pictures(rows)
    cut = names != rows["sha256"]
    faces: dict[Hashable, str] = dict(zip(names[cut], rows.loc[cut, "sha256"], strict=True))
    if faces:
        one, other = (links[end].map(faces).fillna(links[end]) for end in ("image", "other"))
        own = pd.DataFrame(list(faces.items()), columns=["image", "other"])
        own = own.assign(distance=0, likeness=1.0, difference=0.0)
        given = [own, links.assign(image=one), links.assign(other=other), links.assign(image=one, other=other)]
        links = pd.concat([links, *(some.assign(same_picture=False) for some in given)], ignore_index=True)
        links[["image", "other"]] = np.sort(links[["image", "other"]].to_numpy(str).astype(object), axis=1)
        links = links[links["image"] != links["other"]].drop_duplicates(["image", "other"])
    ends = rows.loc[rows["sha256"].isin(pd.concat([links["image"], links["other"]])), "sha256"]
    return links[links["image"].isin(ends) & links["other"].isin(ends)].reset_index(drop=True)
