"""Two registered versions, compared on a folder of labelled images."""

from pathlib import Path

import numpy as np

from deepfake_core.config import CLASS_NAMES
from deepfake_core.errors import ConfigurationError
from deepfake_core.evaluation.promotion import Comparison, Scored, compare_scores
from deepfake_core.registry.versions import ModelVersion
from deepfake_core.serving.load_versions import load_version
from deepfake_core.serving.predictor import Predictor


def compare_on_folder(first: ModelVersion, second: ModelVersion, folder: Path) -> tuple[Comparison, int]:
    """Compare two versions on a folder's images, each judged as a whole.

    Args:
        folder: holds images in `real/` and `fake/`.

    Returns:
        The comparison, and how many files could not be read and are left out.

    Raises:
        ConfigurationError: if a class has no images.
    """
    files = [(file, label) for label, name in enumerate(CLASS_NAMES) for file in sorted((folder / name).rglob("*"))]
    images = [(file, label) for file, label in files if file.is_file()]
    if {label for _, label in images} != {0, 1}:
        raise ConfigurationError(f"--split must be a folder with images in real/ and in fake/. Received: {folder}")
    named = [(str(file), file) for file, _ in images]
    scored, readable = [], np.ones(len(images), bool)
    detectors = [load_version(version.name, version.version) for version in (first, second)]
    for detector in detectors:
        judged = Predictor(detector, detect=False).judge(named)
        scores = np.array([one.verdicts[0].fake_probability for one in judged], np.float64)  # None becomes NaN
        readable &= ~np.isnan(scores)
        scored.append(Scored(scores, detector.threshold))
    names = [name for name, _ in named]
    rows = {"source": [folder.name] * len(images), "member": names, "group": names}
    labels = np.array([label for _, label in images])
    comparison = compare_scores(labels, rows, scored[0], scored[1], left_out=~readable)
    return comparison, int((~readable).sum())
