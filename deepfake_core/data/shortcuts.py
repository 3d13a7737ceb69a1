"""Shortcuts: what a model could learn instead of forgery, such as a quantisation table that only fakes have."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from deepfake_core.config import CLASS_NAMES

MIN_AUC = 0.55
MIN_STANDARD_ERRORS = 4.0
"""How far from 0.5 an AUC must be to be more than chance, in its standard errors (Hanley and McNeil 1982, at 0.5)."""

NUMBERS = {
    "width": ("wider images", "narrower images"),
    "height": ("taller images", "less tall images"),
    "bytes": ("larger files", "smaller files"),
    "bytes_per_pixel": ("more bytes per pixel", "fewer bytes per pixel"),
}
CATEGORIES = {"format": "format", "jpeg_table": "JPEG table"}
SHORTCUT_COLUMNS = ["scope", "shortcut", "auc", "real", "fake"]


def score_file_facts(
    train: pd.DataFrame, train_colours: np.ndarray, test: pd.DataFrame, test_colours: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Call images fake by what can be known without looking at the face, as a small classifier learned it.

    Gradient-boosted trees (scikit-learn's) on width, height, bytes, bytes per pixel, format, JPEG table and mean
    colour.

    Args:
        train: manifest rows; likewise `test`.
        train_colours: mean red, green and blue per image, shape (n, 3); likewise `test_colours`.

    Returns:
        P(fake) per test image, float64 of shape (n,).
    """
    kinds = {name: {value: code for code, value in enumerate(sorted(set(train[name])))} for name in CATEGORIES}

    def collect(rows: pd.DataFrame, colours: np.ndarray) -> np.ndarray:
        numbers = rows.assign(bytes_per_pixel=rows["bytes"] / (rows["width"] * rows["height"]))[list(NUMBERS)]
        codes = np.column_stack([rows[name].map(kinds[name]).fillna(-1) for name in CATEGORIES])
        return np.column_stack([numbers.to_numpy(np.float64), codes, colours])

    trees = HistGradientBoostingClassifier(max_iter=50, max_leaf_nodes=8, random_state=seed)
    trees.fit(collect(train, train_colours), train["label"] == CLASS_NAMES[1])
    return trees.predict_proba(collect(test, test_colours))[:, 1]


def find_shortcuts(kept: pd.DataFrame) -> pd.DataFrame:
    """Find facts about files that reveal the label without a look at the picture.

    Args:
        kept: manifest rows of kept images.

    Returns:
        One row per shortcut, the strongest first: `scope` (a source, or all), `shortcut` (what fakes have), `auc` (of
        calling fake what has it, 0.5 to 1), and what the images of each label have, as text. Facts that reveal the
        label no better than chance are left out.
    """
    scopes = {str(source): rows for source, rows in kept.groupby("source")}
    if len(scopes) > 1:
        scopes["all"] = kept
    found = [
        (scope, *shortcut)
        for scope, rows in scopes.items()
        for shortcut in [*_compare_numbers(rows), *_compare_kinds(rows)]
    ]
    return pd.DataFrame(found, columns=SHORTCUT_COLUMNS).sort_values(
        "auc", ascending=False, kind="stable", ignore_index=True
    )


def _compare_numbers(rows: pd.DataFrame) -> Iterator[tuple[str, float, str, str]]:
    values = rows.assign(bytes_per_pixel=rows["bytes"] / (rows["width"] * rows["height"]))
    for name, (more, less) in NUMBERS.items():
        auc = _measure(rows["label"], values[name])
        if auc is not None:
            medians = values.groupby("label")[name].median()
            real, fake = (f"median {medians[label]:,.{0 if medians[label] > 10 else 3}f}" for label in CLASS_NAMES)
            yield more if auc > 0.5 else less, max(auc, 1 - auc), real, fake


def _compare_kinds(rows: pd.DataFrame) -> Iterator[tuple[str, float, str, str]]:
    for name, title in CATEGORIES.items():
        for value in sorted(set(rows[name]) - {""}):
            has = rows[name] == value
            auc = _measure(rows["label"], has)
            if auc is not None:
                shares = has.groupby(rows["label"]).mean()
                real, fake = (f"{shares[label]:.1%} have {value}" for label in CLASS_NAMES)
                yield f"{title} {value}" if auc > 0.5 else f"{title} other than {value}", max(auc, 1 - auc), real, fake


def _measure(labels: pd.Series, values: pd.Series) -> float | None:
    """Return the AUC of larger values for fake; None if it may be chance, or a class is missing."""
    fake = labels == CLASS_NAMES[1]
    fakes, reals = int(fake.sum()), int((~fake).sum())
    if not fakes or not reals:
        return None
    if values.dtype == bool:
        auc = float(0.5 + (values[fake].mean() - values[~fake].mean()) / 2)  # the same, without sorting
    else:
        auc = float(roc_auc_score(fake, values))
    error = np.sqrt((1 / fakes + 1 / reals) / 12)
    distance = abs(auc - 0.5)
    return auc if distance >= max(MIN_AUC - 0.5, MIN_STANDARD_ERRORS * error) else None
