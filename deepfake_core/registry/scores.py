"""The scores on the test split that each version's run holds, image by image."""

import csv

import numpy as np

from deepfake_core.config import CLASS_NAMES, FEEDBACK
from deepfake_core.errors import ModelError
from deepfake_core.evaluation.promotion import Comparison, Scored, compare_scores
from deepfake_core.registry import names
from deepfake_core.registry.runs import read_parameters, read_text
from deepfake_core.registry.versions import ModelVersion


def compare_logged_scores(first: ModelVersion, second: ModelVersion) -> Comparison:
    """Compare two versions on the test images that both were scored on, less those that a version's mistakes chose.

    Raises:
        ModelError: if a run holds no scores, or they share no image.
    """
    tables = [_read_scores(version) for version in (first, second)]
    common = sorted(
        sha256 for sha256, image in tables[0][0].items() if sha256 in tables[1][0] and image["source"] != FEEDBACK
    )
    if not common:
        raise ModelError(
            f"Two versions must share test images. Received: {first.version} and {second.version}, which have none in "
            "common. Name a folder of labelled images with --split."
        )
    images = [tables[0][0][sha256] for sha256 in common]
    labels = np.array([CLASS_NAMES.index(image["label"]) for image in images])
    rows = {name: [image[name] for image in images] for name in ("source", "member", "group")}
    ours, theirs = (
        Scored(np.array([table[sha256]["score"] for sha256 in common], np.float32), threshold)
        for table, threshold in tables
    )
    return compare_scores(labels, rows, ours, theirs)


def _read_scores(version: ModelVersion) -> tuple[dict[str, dict[str, str]], float]:
    """Return the rows of a version's logged test scores by SHA-256, and its threshold."""
    text = read_text(version.run_id, names.SCORES)
    if text is None:
        raise ModelError(
            f"A version's run must hold its test scores. Received: version {version.version}, run {version.run_id}, "
            "which does not. Name a folder of labelled images with --split."
        )
    threshold = float(read_parameters(version.run_id)[names.THRESHOLD])
    return {row["sha256"]: row for row in csv.DictReader(text.splitlines())}, threshold
