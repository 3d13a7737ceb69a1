"""Windows against a reference: how often they alarm that should not, and that should; and agreement of two versions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from deepfake_core.config import WatchParameters
from deepfake_core.monitoring.drift import COMPARED_COLUMNS, Drift, adjust_holm, compare_windows, measure_agreement


def compare(reference: pd.DataFrame, window: pd.DataFrame) -> Drift:
    return compare_windows(reference, window, WatchParameters().min_distance)


def draw_rows(count: int, seed: int, whole: bool = True, **changed: float) -> pd.DataFrame:
    """Draw observations; `changed` adds to a column, in its standard deviations."""
    random = np.random.default_rng(seed)
    rows = pd.DataFrame({name: random.normal(changed.get(name, 0), 1, count) for name in COMPARED_COLUMNS})
    rows["sure"] = (rows["sure"] > -1).astype("boolean")
    rows["jpeg_quality"] = np.round(rows["jpeg_quality"])
    return rows.assign(face=None if whole else 1)


@pytest.mark.sweep
def test_at_most_1_in_20_windows_from_the_same_world_alarms():
    reference = draw_rows(1000, 0)
    alarms = sum(bool(compare(reference, draw_rows(300, seed)).drifted) for seed in range(1, 501))
    print(f"{alarms} of 500 windows alarmed")
    assert alarms <= 25


def add_faces(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Add up to 8 faces to each image: they are of its size and JPEG quality."""
    random = np.random.default_rng(seed)
    copies = rows.loc[rows.index.repeat(random.integers(0, 9, len(rows)))]
    others = draw_rows(len(copies), seed).set_index(copies.index)
    images = ["jpeg_quality", "width", "height"]
    others[images] = copies[images]
    return pd.concat([rows, others.assign(face=copies.groupby(level=0).cumcount() + 2)])


@pytest.mark.slow
def test_faces_of_one_image_are_no_reason_to_alarm():
    reference = add_faces(draw_rows(1000, 0, whole=False), 0)
    windows = [add_faces(draw_rows(120, seed, whole=False), seed) for seed in range(1, 201)]
    found = [compare(reference, window) for window in windows]
    print(f"{sum(bool(one.drifted) for one in found)} of 200 windows alarmed")
    assert sum(bool(one.drifted) for one in found) <= 10
    assert {one.observations for one in found} == {120}
    few = add_faces(draw_rows(99, 1, whole=False), 1)
    assert len(few) > 300
    assert compare(reference, few).drifted is None


@pytest.mark.parametrize("column", COMPARED_COLUMNS)
def test_a_window_in_which_one_column_changed_alarms_and_names_it(column):
    reference = draw_rows(1000, 0)
    found = [compare(reference, draw_rows(300, seed, **{column: 1.0})) for seed in range(1, 41)]
    assert sum(column in {shift.column for shift in one.changed} for one in found) >= 38


def test_a_small_change_is_none_however_many_observations_there_are():
    reference, window = draw_rows(100_000, 0), draw_rows(100_000, 1, sharpness=0.1)
    found = compare(reference, window)
    (shift,) = [one for one in found.shifts if one.column == "sharpness"]
    assert shift.p < 1e-10
    assert not found.drifted
    assert compare_windows(reference, window, min_distance=0.02).drifted


def test_too_few_are_not_compared():
    found = compare(draw_rows(1000, 0), draw_rows(99, 1, sharpness=5))
    assert (found.drifted, found.shifts, found.observations) == (None, (), 99)


def test_faces_are_compared_with_faces_and_whole_images_with_whole_images():
    reference = pd.concat([draw_rows(500, 0), draw_rows(500, 1, whole=False, side=-3)])
    assert compare(reference, draw_rows(300, 2, whole=False, side=-3)).drifted is False
    assert compare(reference, draw_rows(300, 2, side=-3)).changed[0].kind == "whole"


def test_another_share_of_jpegs_is_a_change_and_what_no_row_has_is_left_out():
    reference, window = draw_rows(500, 0).assign(sure=None), draw_rows(300, 1).assign(sure=None)
    reference["jpeg_quality"] += 90
    window["jpeg_quality"] = np.where(np.arange(300) < 150, window["jpeg_quality"] + 90, np.nan)
    found = compare(reference, window)
    assert [one.column for one in found.changed] == ["jpeg_quality"]
    assert "sure" not in {one.column for one in found.shifts}
    assert "JPEG quality of whole images: has changed (mean 45, on the test split 90" in found.changed[0].describe()


def test_an_older_reference_which_has_all_digits_is_compared_with_rounded_observations():
    reference, window = draw_rows(500, 0).assign(jpeg_quality=92.0346), draw_rows(300, 1).assign(jpeg_quality=92.035)
    assert compare(reference, window).drifted is False


@given(st.lists(st.floats(0, 1), max_size=9), st.sampled_from([0.01, 0.05, 0.2]))
def test_holms_adjustment_rejects_what_his_procedure_rejects(p, level):
    rejected = set()
    for rank, place in enumerate(np.argsort(p)):
        if p[place] * (len(p) - rank) >= level:
            break
        rejected.add(place)
    assert {place for place, value in enumerate(adjust_holm(p)) if value < level} == rejected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_agreement_is_the_share_of_equal_labels_and_cohens_kappa(pairs):
    ours, theirs = (list(labels) for labels in zip(*pairs, strict=True))
    rows = pd.DataFrame({"face": 1, "fake": ours, "shadow_fake": theirs, "shadow_version": "m/2"})
    alone = pd.DataFrame({"face": 1, "fake": [True], "shadow_fake": [None], "shadow_version": [None]})
    (found,) = measure_agreement(pd.concat([rows, rows.assign(face=2), alone]))
    assert found.observations == len(pairs)
    assert found.low <= found.share == np.mean(np.equal(ours, theirs)) <= found.high
    assert found.kappa == pytest.approx(cohen_kappa_score(ours, theirs, labels=[False, True]), nan_ok=True)
    assert "m/2 ran beside it" in found.describe()


def test_nothing_ran_beside_production():
    assert (
        measure_agreement(pd.DataFrame({"face": 1, "fake": [True], "shadow_fake": [None], "shadow_version": [None]}))
        == []
    )
