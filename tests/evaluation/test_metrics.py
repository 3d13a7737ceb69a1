import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from deepfake_core.evaluation.bootstrap import draw_resamples, resample_metrics
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.evaluation import Estimate, Evaluation, cross_sources, evaluate_scores, per_100
from deepfake_core.evaluation.metrics import FALSE_ALARM_RATES, METRIC_TITLES, compute_metrics
from deepfake_core.evaluation.parts import find_parts
from tests.builders import draw_scores

LABELS = np.array([1, 1, 1, 0, 0, 0, 0])
SCORES = np.array([0.9, 0.6, 0.2, 0.7, 0.5, 0.1, 0.0])


def rows(sources, members=None, groups=None):
    count = len(sources)
    return pd.DataFrame(
        {"source": sources, "member": members or [f"{i}.jpg" for i in range(count)], "group": groups or range(count)}
    )


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


@pytest.mark.parametrize("seed", range(5))
def test_what_is_sure_is_counted_alike_in_resamples(seed):
    labels, scores = draw_scores(80, seed)
    random = np.random.default_rng(seed)
    sure, weights = random.random(80) < 0.6, draw_resamples(np.arange(80), count=20, seed=seed)
    ours = resample_metrics(labels, scores, 0.5, weights, sure)
    for position, weight in enumerate(weights):
        drawn = np.repeat(np.arange(80), weight)
        wrong, known, fake = (scores[drawn] >= 0.5) != (labels[drawn] == 1), sure[drawn], labels[drawn] == 1
        expected = {
            "sure_share": known.mean(),
            "error_when_sure": wrong[known].mean(),
            "reals_surely_fake": (wrong & known)[~fake].mean(),
            "fakes_surely_real": (wrong & known)[fake].mean(),
            "false_alarm_rate": wrong[~fake].mean(),
        }
        for name, value in expected.items():
            assert ours[name][position] == pytest.approx(value), name
    assert np.isnan(resample_metrics(labels, scores, 0.5, weights)["sure_share"]).all()


def test_a_rate_of_none_or_all_still_has_an_interval():
    """Of n images none, of all such images at most 1 - 0.025 ** (1 / n), by Clopper and Pearson."""
    metrics = evaluate_scores(np.repeat([0, 1], 30), np.repeat([0.1, 0.9], 30), 0.5, sure=np.arange(60) < 10).metrics
    none, everything = metrics["false_alarm_rate"], metrics["recall"]
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(0.1157, abs=1e-4))
    assert (everything.value, everything.low, everything.high) == (1, pytest.approx(0.8843, abs=1e-4), 1)
    assert metrics["error_when_sure"].high == pytest.approx(0.3085, abs=1e-4)


def test_rates_are_said_as_a_person_would():
    said = evaluate_scores(LABELS, SCORES, 0.5).in_words
    assert said.startswith("of 100 real images about 50 (")
    assert "are called fake, of 100 fakes about 67 (" in said
    assert per_100(Estimate(0.004, 0.0, 0.0123)) == "about 0.4 (0 to 1)"
    assert evaluate_scores(LABELS[:3], SCORES[:3], 0.5).in_words.startswith("of 100 fakes about 67 (")


@pytest.mark.parametrize("seed", range(5))
def test_every_metric_of_every_resample_is_scikit_learns(seed):
    labels, scores = draw_scores(80, seed)
    scores = np.round(scores, 1 + seed % 2)  # with ties
    weights = draw_resamples(np.arange(80) // 2, count=20, seed=seed)
    ours = resample_metrics(labels, scores, 0.5, weights)
    for position, weight in enumerate(weights):
        said = scores >= 0.5
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(labels, said, sample_weight=weight),
            "precision": sklearn_metrics.precision_score(labels, said, sample_weight=weight),
            "recall": sklearn_metrics.recall_score(labels, said, sample_weight=weight),
            "f1": sklearn_metrics.f1_score(labels, said, sample_weight=weight),
            "auc": sklearn_metrics.roc_auc_score(labels, scores, sample_weight=weight),
            "average_precision": sklearn_metrics.average_precision_score(labels, scores, sample_weight=weight),
            "brier": sklearn_metrics.brier_score_loss(labels, scores, sample_weight=weight),
        }
        false_alarms, recall, _ = sklearn_metrics.roc_curve(
            labels, scores, sample_weight=weight, drop_intermediate=False
        )
        expected |= {name: recall[false_alarms <= rate + 1e-9].max() for name, rate in FALSE_ALARM_RATES.items()}
        for name, value in expected.items():
            assert ours[name][position] == pytest.approx(value), name


def test_calibration_error_is_the_distance_between_score_and_share():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    scores = np.array([0.3, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9, 0.9])
    metrics = evaluate_scores(labels, scores, 0.5).metrics
    assert metrics["ece"].value == pytest.approx((4 * abs(0.3 - 0.25) + 4 * abs(0.9 - 1)) / 8)


def test_resamples_keep_groups_together_and_draw_as_many_groups_as_there_are():
    groups = np.array(["a", "b", "a", "c", "c", "c"])
    weights = draw_resamples(groups, count=50)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3:] == weights[:, 3:4]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()
    assert np.array_equal(weights, draw_resamples(groups, count=50))
    assert not np.array_equal(weights, draw_resamples(groups, count=50, seed=1))


@pytest.mark.sweep
def test_95_of_100_intervals_hold_the_truth():
    labels, scores = draw_scores(400_000)
    truth = compute_metrics(labels, scores, 0.5)
    names = ("auc", "recall", "accuracy", "brier")
    held = dict.fromkeys(names, 0)
    for seed in range(200):
        sample = draw_scores(300, seed + 1)
        metrics = evaluate_scores(*sample, 0.5).metrics
        for name in names:
            held[name] += metrics[name].low <= truth[name] <= metrics[name].high
    assert all(180 <= count <= 200 for count in held.values()), held


def test_near_copies_widen_the_interval():
    labels, scores = draw_scores(60)
    once = evaluate_scores(labels, scores, 0.5).metrics["auc"]
    tenfold = rows(["a"] * 600, groups=list(np.tile(np.arange(60), 10)))
    copied = evaluate_scores(np.tile(labels, 10), np.tile(scores, 10), 0.5, tenfold).metrics["auc"]
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.15)


def test_metrics_are_named_by_source():
    evaluation = evaluate_scores(LABELS, SCORES, 0.5, rows(["a", "a", "b", "a", "a", "c", "c"]))
    flat = evaluation.flatten("test")
    assert flat["test/precision"] == 0.5
    assert flat["test/a/auc"] == 0.75
    assert flat["test/auc_low"] <= flat["test/auc"] <= flat["test/auc_high"]
    assert flat["test/c/false_positives"] == 0
    assert "test/c/auc" not in flat  # a source with one class has none
    assert Evaluation.unflatten("test", flat).flatten("test") == flat
    assert Evaluation.unflatten("test", flat).mean_source_auc == evaluation.mean_source_auc == 0.75


def test_sources_add_up_to_the_whole():
    whole = evaluate_scores(LABELS, SCORES, 0.5, rows(["a", "b", "a", "b", "a", "b", "a"]))
    for name in ("true_positives", "false_positives", "true_negatives", "false_negatives"):
        parts = [getattr(part.confusion, name) for part in whole.sources.values()]
        assert sum(parts) == getattr(whole.confusion, name)


def test_file_names_tell_origin_and_edit():
    members = [
        "real_and_fake_face/training_fake/easy_1_1000.jpg",
        "real_and_fake_face/training_fake/hard_2_0011.jpg",
        "real_and_fake_face/training_fake/mid_3_111.jpg",  # the one with three digits
        "real_and_fake_face/training_real/real_00001.jpg",
        "real_vs_fake/real-vs-fake/train/fake/A.jpg",
        "real_vs_fake/real-vs-fake/test/real/easy_9_1111.jpg",
    ]
    labels = np.array([1, 1, 1, 0, 1, 0])
    parts = find_parts(labels, rows(["c", "c", "c", "c", "k", "k"], members))
    named = {kind: {name: np.flatnonzero(mask).tolist() for name, mask in one.items()} for kind, one in parts.items()}
    assert named == {
        "source": {"c": [0, 1, 2, 3], "k": [4, 5]},
        "origin": {"k/test": [5], "k/train": [4]},
        "edit": {
            "easy": [0, 3], "mid": [2, 3], "hard": [1, 3],
            "left eye": [0, 2, 3], "right eye": [2, 3], "nose": [1, 2, 3], "mouth": [1, 3],
        },
    }  # fmt: skip


def test_the_table_has_a_row_for_each_part_and_a_column_for_each_metric():
    table = pd.DataFrame(evaluate_scores(LABELS, SCORES, 0.5, rows(["a", "a", "b", "a", "a", "c", "c"])).list_rows())
    assert table["name"].tolist() == ["all", "a", "b", "c"]
    assert {name for metric in METRIC_TITLES for name in (metric, f"{metric}_low", f"{metric}_high")} <= set(
        table.columns
    )
    assert pd.isna(table.loc[3, "auc"])


def test_crossing_sources_shows_what_the_auc_per_source_hides():
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    sources = np.array(["a"] * 4 + ["b"] * 4)
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])  # each apart in itself, not together
    crossed = cross_sources(labels, scores, sources)
    assert crossed["a"] == {"a": 1.0, "b": 0.0}
    assert crossed["b"] == {"a": 1.0, "b": 1.0}
