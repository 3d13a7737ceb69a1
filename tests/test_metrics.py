import numpy as np
import pandas as pd
import pytest

from deepfake_core.metrics import Confusion, evaluate_scores

LABELS = np.array([1, 1, 1, 0, 0, 0, 0])
SCORES = np.array([0.9, 0.6, 0.2, 0.7, 0.5, 0.1, 0.0])


def test_fake_is_the_positive_class():
    confusion = Confusion.count(LABELS, SCORES, threshold=0.5)
    assert confusion == Confusion(true_positives=2, false_positives=2, true_negatives=2, false_negatives=1)
    assert confusion.precision == 2 / 4
    assert confusion.recall == 2 / 3
    assert confusion.accuracy == 4 / 7
    assert confusion.f1 == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_rates_exist_when_nothing_was_called_fake():
    confusion = Confusion.count(LABELS, SCORES, threshold=1.0)
    assert (confusion.precision, confusion.recall, confusion.f1) == (0, 0, 0)


def test_auc_counts_the_pairs_in_the_right_order():
    pairs = [fake > real for fake in SCORES[LABELS == 1] for real in SCORES[LABELS == 0]]
    assert evaluate_scores(LABELS, SCORES, 0.5).auc == pytest.approx(np.mean(pairs))


def test_figures_are_named_by_source():
    sources = pd.Series(["a", "a", "b", "a", "a", "c", "c"])
    flat = evaluate_scores(LABELS, SCORES, 0.5, sources).flatten("test")
    assert flat["test/precision"] == 0.5
    assert flat["test/a/auc"] == 0.75
    assert flat["test/c/false_positives"] == 0
    assert "test/c/auc" not in flat  # a source with one class has none


def test_sources_add_up_to_the_whole():
    sources = pd.Series(["a", "b", "a", "b", "a", "b", "a"])
    whole = evaluate_scores(LABELS, SCORES, 0.5, sources)
    for name in ("true_positives", "false_positives", "true_negatives", "false_negatives"):
        parts = [getattr(part.confusion, name) for part in whole.sources.values()]
        assert sum(parts) == getattr(whole.confusion, name)
