"""What was observed of production, as Markdown and a figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deepfake_core.monitoring.drift import (
    COMPARED_COLUMNS,
    JUDGED_KINDS,
    MIN_OBSERVATIONS,
    Agreement,
    Drift,
    Shift,
    select_kind,
)
from deepfake_core.monitoring.reported import Reported
from deepfake_core.registry.versions import ModelVersion
from deepfake_core.reports.pages import encode_figure

BINS = 30


def describe_drift(
    version: ModelVersion, drift: Drift, agreements: Sequence[Agreement], reported: Reported, days: int
) -> str:
    """Return what was found, in a sentence for each column."""
    which = f"{drift.observations:,} observations of {version.name} version {version.version} in {days} day(s)"
    if drift.drifted is None:
        headline = f"Too few to compare: {which}; {MIN_OBSERVATIONS} images with a face, or whole images, are needed."
    elif drift.drifted:
        headline = f"What production sees has changed: {which} differ from its test split."
    else:
        headline = f"No drift: {which} are like its test split."
    shifts = sorted(drift.shifts, key=lambda one: not one.drifted)
    lines = [*(one.describe() for one in shifts), *(one.describe() for one in agreements), *reported.describe()]
    return "\n".join([headline, "", *(f"- {line}" for line in lines)]).rstrip()


def name_metrics(drift: Drift, agreements: Sequence[Agreement]) -> dict[str, float]:
    """Return a window's metrics by their names in MLflow."""
    metrics = {f"drift/{one.kind}/{one.column}": one.distance for one in drift.shifts}
    for one in agreements:
        metrics |= {
            f"shadow/{one.version}/agreement": one.share,
            f"shadow/{one.version}/images": float(one.observations),
        }
    return metrics | {"drift/observations": float(drift.observations)}


def add_figure(text: str, figure: Figure | None) -> str:
    """Return Markdown that shows a figure below a text."""
    return f"{text}\n\n![distributions]({encode_figure(figure)})\n" if figure else text


def plot_drift(reference: pd.DataFrame, window: pd.DataFrame, drift: Drift) -> Figure | None:
    """Draw the distribution of each column that was compared, in the test split and in the window."""
    if not drift.shifts:
        return None
    figure = Figure(figsize=(11, 2.4 * -(-len(drift.shifts) // 4)), layout="constrained")
    cells = figure.subplots(-(-len(drift.shifts) // 4), 4, squeeze=False).flat
    for shift, axes in zip(drift.shifts, cells, strict=False):
        _plot_column(axes, reference, window, shift)
    for axes in list(cells):
        axes.axis("off")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _plot_column(axes: "object", reference: pd.DataFrame, window: pd.DataFrame, shift: Shift) -> None:
    parts = [select_kind(rows, shift.kind)[shift.column] for rows in (reference, window)]
    values = [part.astype("float64").fillna(0).to_numpy() for part in parts]
    edges = np.histogram_bin_edges(np.concatenate(values), BINS)
    for one, label, colour in zip(values, ("test split", "production"), ("#bbbbbb", "#756bb1"), strict=True):
        axes.hist(  # type: ignore[attr-defined]
            one, bins=edges, weights=np.full(len(one), 1 / len(one)), color=colour, alpha=0.6, label=label
        )
    title = f"{COMPARED_COLUMNS[shift.column]}\nof {JUDGED_KINDS[shift.kind]}{': changed' if shift.drifted else ''}"
    axes.set_title(title, fontsize=9)  # type: ignore[attr-defined]
