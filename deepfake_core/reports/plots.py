"""Figures of data, training and evaluation; each function returns a figure and keeps no state."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay, average_precision_score, roc_auc_score

from deepfake_core.config import CLASS_COLOURS, CLASS_NAMES, Recipe
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import Images, load_images
from deepfake_core.detector import call_fake
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.training.batches import Batches
from deepfake_core.training.fit import Training

CHANCE = {"color": "grey", "linestyle": ":", "label": "chance"}


def plot_class_histogram(rows: pd.DataFrame, split: str) -> Figure:
    """Draw the images per class and source of one split's manifest rows."""
    counts = rows.groupby(["source", "label"]).size().unstack(fill_value=0).reindex(columns=CLASS_NAMES, fill_value=0)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(counts))
    for offset, label in zip((-0.2, 0.2), CLASS_NAMES, strict=True):
        bars = axes.bar(positions + offset, counts[label], width=0.4, label=label, color=CLASS_COLOURS[label])
        axes.bar_label(bars)
    axes.set_xticks(positions, [textwrap.fill(source, 18) for source in counts.index])
    axes.set(title=f"{split}: {len(rows)} images", ylabel="images")
    axes.margins(y=0.2)
    axes.legend(loc="upper center", ncols=2)
    return figure


def plot_image_grid(pixels: np.ndarray, titles: Sequence[str], heading: str) -> Figure:
    """Draw up to 16 images, four a row.

    Args:
        pixels: array of shape (n, size, size, 3), 0 to 255.
        titles: one line per image.
    """
    figure = Figure(figsize=(8, 8.8), layout="constrained")
    figure.suptitle(heading)
    for position, axes in enumerate(figure.subplots(4, 4).flat):
        axes.axis("off")
        if position < len(pixels):
            axes.imshow(np.clip(pixels[position], 0, 255).astype(np.uint8))
            axes.set_title(titles[position], fontsize=9)
    return figure


def plot_training_batch(images: Images, recipe: Recipe, seed: int) -> Figure:
    """Draw 16 training images as the network sees them: augmented, with their labels."""
    pixels, labels = Batches(images, 16, recipe.augmentation, seed)[0]
    return plot_image_grid(pixels, [CLASS_NAMES[int(label)] for label in labels], "A training batch, augmented")


def choose_worst_mistakes(labels: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Return the positions of the 16 images whose scores are furthest on the wrong side of the threshold."""
    error = np.where(labels == 1, threshold - scores, scores - threshold)
    wrong = np.flatnonzero(call_fake(scores, threshold) != (labels == 1))
    return wrong[np.argsort(-error[wrong], kind="stable")][:16]


def choose_typical(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the positions of 16 images in the middle of their class's scores, half of them fake."""
    chosen = []
    for label in (1, 0):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(scores[mine], kind="stable")]
        chosen.append(mine[np.linspace(0, len(mine) - 1, 10).astype(int)[1:-1]] if len(mine) else mine)
    return np.concatenate(chosen)


def plot_explained(pixels: np.ndarray, heat: np.ndarray, titles: list[str], heading: str) -> Figure:
    """Draw up to 16 images, each beside itself under the heat map of its verdict (Grad-CAM).

    Args:
        pixels: uint8 array of shape (n, size, size, 3).
        heat: float array of shape (n, height, width), 0 to 1, from `Detector.explain`.
        titles: one line per image.
    """
    lines = max(1, -(-len(pixels) // 4))
    figure = Figure(figsize=(12, 1.75 * lines + 0.5), layout="constrained")
    figure.suptitle(heading)
    cells = figure.subplots(lines, 8, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for position, title in enumerate(titles):
        plain, explained = cells[position // 4, 2 * (position % 4) : 2 * (position % 4) + 2]
        side = pixels.shape[1]
        plain.imshow(pixels[position])
        plain.set_title(title, fontsize=8, loc="left")
        explained.imshow(pixels[position])
        explained.imshow(
            heat[position], cmap="inferno", vmin=0, vmax=1, alpha=0.5, interpolation="bilinear",
            extent=(-0.5, side - 0.5, side - 0.5, -0.5),
        )  # fmt: skip
    return figure


def plot_reliability(labels: np.ndarray, scores: np.ndarray) -> Figure:
    """Draw how often images of a score are fake, and how many there are of it, in ten bins of equal width."""
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot((0, 1), (0, 1), color="grey", linestyle=":", label="a score means its share")
    CalibrationDisplay.from_predictions(
        labels, scores, n_bins=10, name="test images", ax=axes, ref_line=False, color=CLASS_COLOURS["fake"]
    )
    axes.set(title="What a score means", xlabel="", ylabel="share that is fake")
    below.hist(scores, bins=np.linspace(0, 1, 11), color="#bbbbbb")
    below.set(xlabel="P(fake)", ylabel="images")
    return figure


def plot_scores(labels: np.ndarray, scores: np.ndarray, sources: np.ndarray, threshold: float) -> Figure:
    """Draw the scores of each source's real and fake images."""
    names = sorted(set(sources))
    figure = Figure(figsize=(8, 1.3 + 1.7 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0], names, strict=True):
        for label, class_name in enumerate(CLASS_NAMES):
            axes.hist(
                scores[(sources == name) & (labels == label)], bins=np.linspace(0, 1, 41).tolist(), alpha=0.6,
                color=CLASS_COLOURS[class_name], label=class_name,
            )  # fmt: skip
        axes.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:.2f}")
        axes.set(title=name, ylabel="images")
    axes.set(xlabel="P(fake)")
    axes.legend(loc="upper center")  # a place is named, as Matplotlib's search for the best one takes long
    return figure


def plot_measured(measured: Measured, robustness: pd.DataFrame) -> dict[str, Figure]:
    """Draw all figures of the test split, by name.

    Args:
        robustness: from `measure_robustness`; may be empty.
    """
    labels, scores, threshold = measured.images.labels, measured.scores, measured.threshold
    figures = {
        "confusion_matrix": plot_confusion(measured.evaluation.confusion, threshold),
        "roc_and_precision_recall": plot_curves(labels, scores, threshold),
        "scores": plot_scores(labels, scores, measured.images.rows["source"].to_numpy(), threshold),
        "reliability": plot_reliability(labels, scores),
    }
    if len(robustness):
        figures["robustness"] = plot_robustness(robustness)
    return figures


def plot_data(dataset: Dataset, training: Training) -> dict[str, Figure]:
    """Draw what a retrain is about to learn from: images per class and source, and an augmented batch."""
    train = load_images(dataset, "train", training.recipe.image_size, decode="never")
    return {
        "classes_train": plot_class_histogram(dataset.split("train"), "train"),
        "classes_test": plot_class_histogram(dataset.split("test"), "test"),
        "training_batch": plot_training_batch(train, training.recipe, training.seed),
    }


def plot_robustness(table: pd.DataFrame) -> Figure:
    """Draw AUC and false alarms after each change of the images, by strength, and without one as dotted lines.

    Args:
        table: from `measure_robustness`, at least one row.
    """
    changes = list(dict.fromkeys(table["change"]))
    figure = Figure(figsize=(11, 2.9 * -(-len(changes) // 4)), layout="constrained")
    cells = figure.subplots(-(-len(changes) // 4), min(4, len(changes)), squeeze=False, sharey=True)
    for axes in cells.flat[len(changes) :]:
        axes.axis("off")
    unchanged = table.iloc[0]
    measures = (
        ("auc", "AUC", CLASS_COLOURS["fake"], unchanged["auc"] + unchanged["auc_lost"]),
        (
            "false_alarm_rate",
            "false alarms",
            CLASS_COLOURS["real"],
            unchanged["false_alarm_rate"] - unchanged["false_alarms_added"],
        ),
    )
    for axes, change in zip(cells.flat, changes, strict=False):
        rows = table[table["change"] == change]
        for column, label, colour, before in measures:
            axes.axhline(before, color=colour, linestyle=":")
            axes.plot(
                [f"{strength:g}" for strength in rows["strength"]], rows[column], marker="o", color=colour, label=label
            )
        axes.set(title=change, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    handles, labels = cells[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, title="dotted: without the change")
    return figure


def plot_history(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Draw loss and accuracy by epoch, training against validation, side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(history["epoch"], history[name], marker=".", label="training")
        axes.plot(history["epoch"], history[f"val_{name}"], marker=".", label="validation")
        axes.axvline(best_epoch, color="grey", linestyle=":", label="checkpoint kept")
        axes.set(title=name, xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right" if name == "loss" else "lower right")
    return figure


def plot_confusion(confusion: Confusion, threshold: float) -> Figure:
    """Draw the four counts at the threshold."""
    counts = np.array(
        [
            [confusion.true_negatives, confusion.false_positives],
            [confusion.false_negatives, confusion.true_positives],
        ]
    )
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(2, 2):
        share = shares[row, column]
        axes.text(
            column, row, f"{counts[row, column]}\n{share:.0%}", ha="center", va="center",
            color="white" if share > 0.5 else "black", fontsize=13,
        )  # fmt: skip
    axes.set_xticks((0, 1), [f"said {name}" for name in CLASS_NAMES])
    axes.set_yticks((0, 1), [f"is {name}" for name in CLASS_NAMES])
    axes.set_title(f"Test images, threshold {threshold:.3f}")
    return figure


def plot_curves(labels: np.ndarray, scores: np.ndarray, threshold: float) -> Figure:
    """Draw the ROC and the precision-recall curve, the threshold marked."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    at = Confusion.count(labels, scores, threshold)
    false_alarms = at.false_positives / (at.false_positives + at.true_negatives)
    auc = f"AUC {roc_auc_score(labels, scores):.3f}"  # the Displays' own labels have two places
    average = f"average precision {average_precision_score(labels, scores):.3f}"
    for axes, display, title, name, place in (
        (roc, RocCurveDisplay, "ROC", auc, (false_alarms, at.recall)),
        (pr, PrecisionRecallDisplay, "Precision and recall", average, (at.recall, at.precision)),
    ):
        display.from_predictions(
            labels, scores, ax=axes, curve_kwargs={"label": name}, plot_chance_level=True, chance_level_kw=CHANCE
        )
        axes.scatter(*place, color="black", zorder=3, clip_on=False, label=f"threshold {threshold:.3f}")
        axes.set(title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is roc else "lower left")
    roc.set(xlabel="false alarms (real called fake)", ylabel="recall (fake called fake)")
    pr.set(xlabel="recall", ylabel="precision")
    return figure
