"""Figures of data, training and evaluation; each function returns a figure and keeps no state."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn import metrics as sklearn_metrics

from deepfake_core.batches import Batches, Images
from deepfake_core.config import CLASS_COLOURS, CLASS_NAMES, Recipe
from deepfake_core.metrics import Confusion


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


def plot_worst_mistakes(images: Images, scores: np.ndarray, threshold: float) -> Figure:
    """Draw the 16 images whose scores are furthest on the wrong side of the threshold."""
    error = np.where(images.labels == 1, threshold - scores, scores - threshold)
    wrong = (scores >= threshold) != (images.labels == 1)
    worst = [int(i) for i in np.argsort(-error) if wrong[i]][:16]
    titles = [f"{CLASS_NAMES[images.labels[i]]}, P(fake) = {scores[i]:.2f}" for i in worst]
    which = "All" if len(worst) == wrong.sum() else f"The {len(worst)} worst of"
    heading = f"{which} {int(wrong.sum())} mistakes on {len(images)} test images, the worst first"
    return plot_image_grid(images.pixels[worst], titles, heading)


def plot_history(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Draw loss and accuracy by epoch, training against validation, side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(history["epoch"], history[name], marker=".", label="training")
        axes.plot(history["epoch"], history[f"val_{name}"], marker=".", label="validation")
        axes.axvline(best_epoch, color="grey", linestyle=":", label="checkpoint kept")
        axes.set(title=name, xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
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
    axes.set_title(f"Test images, threshold {threshold:g}")
    return figure


def plot_curves(labels: np.ndarray, scores: np.ndarray, threshold: float) -> Figure:
    """Draw the ROC and the precision-recall curve, the threshold marked."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    at = Confusion.count(labels, scores, threshold)

    false_alarms, recall, _ = sklearn_metrics.roc_curve(labels, scores)
    roc.plot(false_alarms, recall, label=f"AUC {sklearn_metrics.roc_auc_score(labels, scores):.3f}")
    roc.plot((0, 1), (0, 1), color="grey", linestyle=":", label="chance")
    roc.scatter(
        at.false_positives / (at.false_positives + at.true_negatives), at.recall, color="black", zorder=3,
        label=f"threshold {threshold:g}",
    )  # fmt: skip
    roc.set(title="ROC", xlabel="false alarms (real called fake)", ylabel="recall (fake called fake)")

    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    average = sklearn_metrics.average_precision_score(labels, scores)
    pr.plot(recall, precision, label=f"average precision {average:.3f}")
    pr.axhline(float(np.mean(labels)), color="grey", linestyle=":", label="chance")
    pr.scatter(at.recall, at.precision, color="black", zorder=3, label=f"threshold {threshold:g}")
    pr.set(title="Precision and recall", xlabel="recall", ylabel="precision", ylim=(-0.03, 1.03))
    for axes in (roc, pr):
        axes.legend(loc="lower right" if axes is roc else "lower left")
        axes.grid(alpha=0.3)
    return figure
