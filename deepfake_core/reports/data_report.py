"""A data set's report: one page that says what was found, what was left out, and what a model could cheat by."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deepfake_core.config import CLASS_COLOURS, CLASS_NAMES
from deepfake_core.data.archive import Archive
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.shortcuts import find_shortcuts
from deepfake_core.decoding import decode_image
from deepfake_core.reports.pages import encode_figure, encode_picture, render_page
from deepfake_core.storage.files import write_beside

log = logging.getLogger(__name__)

MAX_GROUPS, MAX_SHOWN_OF_GROUP, MAX_PAIRS, MAX_CONFLICTS_LISTED = 60, 8, 1000, 200
SHOWN_PIXELS = 160
MAX_BARS = 12


class GalleryPicture(NamedTuple):
    """A picture in the gallery."""

    source: str
    label: str
    title: str
    text: str
    data: str


def write_report(dataset: Dataset, links: pd.DataFrame, archives: Sequence[Archive]) -> Path:
    """Write `report.html`, self-contained, and `links.parquet` into the split folder; return the report's path.

    A report that is there already, and not older than the manifest, is left as it is.

    Args:
        links: from `find_links`.
        archives: the data set's; the gallery also shows copies that were left out, which are only there.
    """
    path = dataset.report
    if path.exists() and path.stat().st_mtime >= (dataset.path / "manifest.parquet").stat().st_mtime:
        return path
    with write_beside(dataset.path / "links.parquet") as beside:
        links.to_parquet(beside, index=False)
    found = collect_report_values(dataset, links, archives)
    with write_beside(path) as beside:
        beside.write_text(render_page("data_report.html.jinja", **found))
    log.info(
        "report of data set %s: %d shortcuts, %d groups, %d pairs across labels",
        dataset.version,
        len(found["shortcuts"]),
        found["group_count"],
        found["pair_count"],
    )
    return path


def collect_report_values(dataset: Dataset, links: pd.DataFrame, archives: Sequence[Archive]) -> dict[str, Any]:
    """Return what the page shows, by the names that its template uses."""
    manifest = dataset.manifest
    kept = manifest[manifest["kept"]]
    pictures = (
        manifest.sort_values("kept", ascending=False, kind="stable").drop_duplicates("sha256").set_index("sha256")
    )
    groups, pairs = _list_groups(pictures), _list_pairs(pictures, links)
    group_rows = [pictures[pictures["group"] == name] for name in groups.index[:MAX_GROUPS]]
    pair_rows = [
        pictures.loc[[pair.image, pair.other]].sort_values("label", ascending=False)  # the real one to the left
        for pair in pairs[:MAX_PAIRS].itertuples()
    ]
    shown = _read_pictures([rows[:MAX_SHOWN_OF_GROUP] for rows in group_rows] + pair_rows, dataset, archives)
    return {
        "dataset": dataset,
        "counts": dataset.description["counts"],
        "class_names": CLASS_NAMES,
        "splits": dataset.splits,
        "reasons": _list_reasons(dataset.description["counts"]["reasons"]),
        "by_source": kept.value_counts(["source", "label"]).to_dict(),
        "shortcuts": find_shortcuts(kept).to_dict("records"),
        "figure": encode_figure(plot_file_facts(kept)),
        "torn": int((kept.groupby("group")["split"].nunique() > 1).sum()),
        "group_count": len(groups),
        "groups": [([shown[sha256] for sha256 in rows.index[:MAX_SHOWN_OF_GROUP]], len(rows)) for rows in group_rows],
        "pair_count": len(pairs),
        "pairs": [
            ([shown[sha256] for sha256 in rows.index], pair)
            for rows, pair in zip(pair_rows, pairs[:MAX_PAIRS].itertuples(), strict=True)
        ],
        "conflicts": manifest[manifest["reason"] == "split_conflict"][:MAX_CONFLICTS_LISTED].to_dict("records"),
    }


def _list_groups(pictures: pd.DataFrame) -> pd.Series:
    """Return the sizes of groups of more than one picture by name, the largest first."""
    sizes = pictures[pictures["group"] != ""].groupby("group").size().sort_values(ascending=False, kind="stable")
    return sizes[sizes > 1]


def _list_pairs(pictures: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Return the links between pictures of different labels, the most alike first."""
    ends = [pictures.index.get_indexer(pd.Index(links[end])) for end in ("image", "other")]
    labels = [pictures["label"].to_numpy()[end] for end in ends]
    return links[(ends[0] >= 0) & (ends[1] >= 0) & (labels[0] != labels[1])].sort_values(
        ["likeness", "image"], ascending=[False, True]
    )


def plot_file_facts(kept: pd.DataFrame) -> Figure:
    """Draw sizes, bytes per pixel and quantisation tables of the kept images, per label."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    sizes, density, tables = figure.subplot_mosaic([["sizes", "density"], ["tables", "tables"]]).values()
    _plot_bars(sizes, kept["width"].astype(str) + " x " + kept["height"].astype(str), kept["label"], 6)
    sizes.set(title="Size in pixels", ylabel="images")
    _plot_bars(tables, kept["jpeg_table"].replace("", "no JPEG"), kept["label"], MAX_BARS)
    tables.set(title="JPEG quantisation tables (libjpeg's quality, digest)", ylabel="images")
    per_pixel = kept["bytes"] / (kept["width"] * kept["height"])
    bins = np.linspace(0, per_pixel.quantile(0.999), 40).tolist()
    for label in CLASS_NAMES:
        values = per_pixel[kept["label"] == label]
        density.hist(values, bins=bins, alpha=0.6, color=CLASS_COLOURS[label], label=label)
    density.set(title="Bytes per pixel", ylabel="images")
    density.legend(loc="upper right")
    return figure


def _plot_bars(axes: Any, values: pd.Series, labels: pd.Series, most: int) -> None:
    counts = pd.crosstab(values, labels).reindex(columns=CLASS_NAMES, fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    if len(counts) > most:
        counts = pd.concat(
            [counts[: most - 1], counts[most - 1 :].sum().to_frame(f"{len(counts) - most + 1} others").T]
        )
    positions = np.arange(len(counts))
    for offset, label in zip((-0.2, 0.2), CLASS_NAMES, strict=True):
        bars = axes.bar(positions + offset, counts[label], width=0.4, label=label, color=CLASS_COLOURS[label])
        axes.bar_label(bars, fontsize=7)
    axes.set_xticks(positions, counts.index, fontsize=7)
    axes.margins(y=0.3)
    axes.legend(loc="upper right")


def _list_reasons(reasons: dict[str, int]) -> list[str]:
    return ["kept", *sorted(set(reasons) - {"kept"})]


def _read_pictures(
    rows: Sequence[pd.DataFrame], dataset: Dataset, archives: Sequence[Archive]
) -> dict[str, GalleryPicture]:
    """Read pictures, as small JPEGs in data URLs, by SHA-256: from the archives those that are not in the data set."""
    if not rows:
        return {}
    wanted = pd.concat(rows)
    wanted = wanted[~wanted.index.duplicated()]
    is_here = wanted["kept"] & (dataset.description["parameters"]["normalise"] == "none")
    shown = {str(row.Index): _show(row, dataset.read(str(row.path))) for row in wanted[is_here].itertuples()}
    for archive in archives:
        mine = wanted[~is_here & (wanted["source"] == archive.source.short_name)]
        if mine.empty:
            continue
        with archive.open() as reader:
            for row in mine.itertuples():
                shown[str(row.Index)] = _show(row, reader.read_again(str(row.member), str(row.Index)))
    return shown


def _show(row: Any, data: bytes) -> GalleryPicture:
    place = row.split if row.kept else row.reason.replace("_", " ")
    text = f"{row.label}, {place}, {row.width} x {row.height}, {row.bytes / 1000:,.0f}\N{NO-BREAK SPACE}kB"
    return GalleryPicture(row.source, row.label, row.member, text, encode_picture(decode_image(data), SHOWN_PIXELS))
