"""What is measured of a trained detector on the test split, the only time that any candidate sees it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import Images, load_images, load_seen, measure_files
from deepfake_core.data.shortcuts import score_file_facts
from deepfake_core.detector import Detector
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.evaluation import Evaluation, cross_sources, evaluate_detector, evaluate_scores, find_sure

log = logging.getLogger(__name__)

MAX_FACTS_IMAGES = 5000
"""Training images, at most, from which file facts are learned."""

MIN_AUC_STRONG_FACTS = 0.7
"""From this AUC on the report warns that file facts alone reveal the label."""


@dataclass(frozen=True)
class Measured:
    """A detector on the test split.

    Attributes:
        images: the test split, without sources that were held out.
        scores: P(fake) per image, float32 of shape (n,).
        cross_sources: AUC of one source's fakes against another's reals.
        file_facts: a classifier that sees no face, on the same images.
        unseen: the detector on each source that was held out.
    """

    images: Images
    scores: np.ndarray
    threshold: float
    evaluation: Evaluation
    cross_sources: dict[str, dict[str, float]]
    file_facts: Evaluation
    unseen: dict[str, Evaluation]

    @property
    def facts_are_strong(self) -> bool:
        return (self.file_facts.auc or 0) >= MIN_AUC_STRONG_FACTS


def tabulate_rates(measured: Measured, drawn: bool) -> dict[str, Any]:
    """Return the false alarms and the recall on the test split at each threshold, which `detector.json` then holds.

    Args:
        drawn: whether the images are drawn, so that the rates say nothing about real faces.

    Returns:
        `drawn`, and `parts`: first all images, with an empty `name`, then each source where there are several. Each
        has its number of `reals` and `fakes`, and a `table` of rows: threshold, false alarm rate, recall.
    """
    labels, sources = measured.images.labels, measured.images.rows["source"].to_numpy()
    thresholds = sorted({*np.round(np.arange(0, 1.005, 0.01), 2).tolist(), measured.threshold})
    names = sorted(set(sources)) if len(set(sources)) > 1 else []
    parts = []
    for name in ("", *names):
        chosen = sources == name if name else np.ones(len(labels), bool)
        counts = [Confusion.count(labels[chosen], measured.scores[chosen], one) for one in thresholds]
        table = [
            [threshold, round(one.false_alarm_rate, 4), round(one.recall, 4)]
            for threshold, one in zip(thresholds, counts, strict=True)
        ]
        parts.append({"name": name, "reals": counts[0].reals, "fakes": counts[0].fakes, "table": table})
    return {"drawn": drawn, "parts": parts}


def evaluate_unseen(detector: Detector, dataset: Dataset, source: str) -> Evaluation:
    """Evaluate all images of a source that was held out, except those with a near copy in another source."""
    manifest = dataset.manifest[dataset.manifest["kept"]]
    elsewhere = set(manifest.loc[manifest["source"] != source, "group"])
    parts = []
    for split in dataset.splits:
        images = load_images(dataset, split, detector.image_size)
        mine = (images.rows["source"] == source) & ~images.rows["group"].isin(elsewhere)
        parts.append(images.select(mine.to_numpy()))
    labels, scores = (
        np.concatenate(one)
        for one in ([part.labels for part in parts], [detector.score(part.pixels) for part in parts])
    )
    rows = pd.concat([part.rows for part in parts], ignore_index=True)
    sure = find_sure(detector, scores, [one for part in parts for one in measure_files(part, dataset)])
    evaluation = evaluate_scores(labels, scores, detector.threshold, rows, sure=sure)
    log.info("%s was never trained on: on its %d images, %s", source, len(labels), evaluation.in_words)
    return evaluation


def evaluate_on_test(folder: Path, dataset: Dataset, holdout: Sequence[str] = ()) -> Measured:
    """Score the test split, and the sources that were held out, with a calibrated detector.

    Args:
        folder: the detector's.
    """
    detector = Detector(folder)
    test = load_seen(dataset, "test", detector.image_size, holdout)
    evaluation, scores = evaluate_detector(detector, test, measure_files(test, dataset))
    train = load_seen(dataset, "train", detector.image_size, holdout)
    return Measured(
        images=test,
        scores=scores,
        threshold=detector.threshold,
        evaluation=evaluation,
        cross_sources=cross_sources(test.labels, scores, test.rows["source"].to_numpy()),
        file_facts=_evaluate_file_facts(train, test, dataset),
        unseen={source: evaluate_unseen(detector, dataset, source) for source in holdout},
    )


def _evaluate_file_facts(train: Images, test: Images, dataset: Dataset) -> Evaluation:
    chosen = np.zeros(len(train), bool)
    chosen[np.random.default_rng(0).permutation(len(train))[:MAX_FACTS_IMAGES]] = True
    train = train.select(chosen)
    rows = [images.rows for images in (train, test)]
    if dataset.description["parameters"]["normalise"] != "none":  # then the files are not those of the manifest
        rows = [_read_facts(one, dataset) for one in rows]
    scores = score_file_facts(rows[0], _average_colours(train), rows[1], _average_colours(test))
    return evaluate_scores(test.labels, scores, 0.5, test.rows)


def _read_facts(rows: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    sizes = [len(dataset.read(path)) for path in rows["path"]]
    return rows.assign(bytes=sizes, width=1, height=1, format="JPEG", jpeg_table="")


def _average_colours(images: Images) -> np.ndarray:
    return np.array([images.pixels[position].mean(axis=(0, 1)) for position in range(len(images))])


def find_trained_on(rows: pd.DataFrame, manifest: pd.DataFrame, other: pd.DataFrame) -> np.ndarray:
    """Find images that a model which was trained on another data set has seen, or seen near copies of.

    Args:
        rows: the images in question, of `manifest`.
        manifest: of the data set that holds them.
        other: of the data set that the model was trained on; its validation images chose its checkpoint.

    Returns:
        Mask of shape (len(rows),).
    """
    learned = set(other.loc[other["split"].isin(("train", "val")), "group"]) - {""}
    seen = set(other.loc[other["group"].isin(learned), "sha256"])
    groups = set(manifest.loc[manifest["sha256"].isin(seen), "group"]) - {""}
    return (rows["group"].isin(groups) | rows["sha256"].isin(seen)).to_numpy()
