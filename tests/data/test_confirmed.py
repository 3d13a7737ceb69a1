"""Confirmed reports in a data set: which split they are in, and which they never reach."""

import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_core.config import FEEDBACK, REGRESSION, DataParameters, Source
from deepfake_core.data.dataset import hash_content
from deepfake_core.data.split_memory import read_memory, remember_splits
from deepfake_core.data.splits import REGRESSION_SHARE
from deepfake_core.storage.store import open_store
from tests.data.test_dataset import check_laws, link, pictures, split, worlds


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(worlds(), st.data())
def test_no_confirmed_image_nor_a_near_copy_of_it_is_where_it_must_not_be(world, data):
    """Reports, and what a source adds, come over three versions in any order."""
    index, links, first = world
    confirmed = np.zeros(len(index), bool)
    confirmed[data.draw(st.lists(st.integers(0, len(index) - 1), max_size=120, unique=True))] = True
    index = index.assign(source=np.where(confirmed, FEEDBACK, "s"))
    known: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        for count in (first, data.draw(st.integers(first, len(index))), len(index)):
            rows = split(index[:count], links, read_memory(store))
            check_laws(index[:count], links, rows)
            kept = rows[rows["kept"]].set_index("sha256")["split"]
            assert all(kept.get(name, where) == where for name, where in known.items())
            new = rows[rows["kept"] & ~rows["group"].isin(rows.loc[rows["sha256"].isin(read_memory(store)), "group"])]
            reported = set(rows.loc[rows["source"] == FEEDBACK, "group"])
            assert set(new.loc[new["split"] == REGRESSION, "group"]) <= reported
            known |= kept.to_dict()
            remember_splits(rows, store)


def test_three_in_ten_of_the_new_groups_with_a_report_are_never_learned_from_whatever_their_other_split():
    index = pictures(20_000).assign(source=FEEDBACK)
    rows = split(index, val=0.1, test=0.2)
    shares = rows["split"].value_counts(normalize=True)
    expected = {REGRESSION: REGRESSION_SHARE, "train": 0.7 * 0.7, "test": 0.7 * 0.2, "val": 0.7 * 0.1}
    assert shares.to_dict() == pytest.approx(expected, abs=0.01)
    without = split(index.assign(source="s"), val=0.1, test=0.2).set_index("sha256")["split"]
    now = rows.set_index("sha256")["split"]
    assert (now[now != REGRESSION] == without[now[now != REGRESSION].index]).all()
    chosen = without[now[now == REGRESSION].index].value_counts(normalize=True)
    assert chosen.to_dict() == pytest.approx({"train": 0.7, "test": 0.2, "val": 0.1}, abs=0.015)


def test_a_near_copy_of_a_known_image_stays_in_its_split_and_one_of_a_regression_image_joins_it():
    index = pictures(400)
    names = index["sha256"].tolist()
    first = split(index[:200]).set_index("sha256")["split"]
    pairs = [(position, 200 + position, bool(position % 2)) for position in range(100)]
    reported = index.assign(source=["s"] * 200 + [FEEDBACK] * 200)
    now = split(reported, link(names, pairs), first.to_dict()).set_index("sha256")
    assert all(now.loc[names[i], "split"] == first[names[i]] for i in range(200) if now.loc[names[i], "kept"])
    assert set(now["split"][names[200:300]]) <= {"train", "val", "test"}
    alone = now["split"][names[300:]]
    held = alone.index[alone == REGRESSION]
    assert 15 < len(held) < 45

    more = pictures(500)
    later = [(names.index(name), 400 + position, False) for position, name in enumerate(held)]
    memory = now.loc[now["kept"], "split"].to_dict()
    added = link(more["sha256"].tolist(), [*pairs, *later])
    grown = split(more.assign(source=["s"] * 200 + [FEEDBACK] * 200 + ["s"] * 100), added, memory).set_index("sha256")
    joined = more["sha256"].tolist()[400 : 400 + len(held)]
    assert set(grown["split"][joined]) == {REGRESSION}
    assert (grown["split"][held] == REGRESSION).all()


def test_without_reports_a_data_set_is_what_it_was():
    """The version was computed by the code before the regression set."""
    rows = split(pictures(500), link(pictures(500)["sha256"].tolist(), [(0, 1, True), (2, 3, False)]))
    assert hash_content(rows, "none") == "8dccaa05dd9d4823"
    assert set(rows["split"]) == {"train", "val", "test"}


@pytest.mark.parametrize("name", ["./feedback", "owner/feedback", "/a/feedback.zip"])
def test_a_source_of_that_name_gets_its_owner_into_it(name):
    (source,) = DataParameters(sources=(Source(name=name),)).sources
    assert source.short_name.endswith(".feedback")
