import pandas as pd

from deepfake_core.duplicates import mark_duplicates


def index(*rows: tuple[str, str, str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["source", "member", "group", "label", "reason"])


def test_the_source_listed_first_keeps_the_picture():
    rows = mark_duplicates(
        index(("b", "1.jpg", "p", "real", ""), ("b", "0.jpg", "p", "real", ""), ("a", "0.jpg", "p", "real", ""))
    )
    assert rows["reason"].tolist() == ["duplicate", "kept", "duplicate"]
    assert rows["kept"].tolist() == [False, True, False]


def test_a_picture_under_both_labels_is_dropped_on_both_sides():
    rows = mark_duplicates(
        index(
            ("a", "1", "p", "real", ""),
            ("b", "2", "p", "fake", ""),
            ("b", "3", "p", "fake", ""),
            ("b", "4", "q", "fake", ""),
        )
    )
    assert rows["reason"].tolist() == ["label_conflict", "label_conflict", "label_conflict", "kept"]


def test_unusable_rows_keep_their_reason_and_group_with_nothing():
    rows = mark_duplicates(index(("a", "1", "", "real", "truncated"), ("a", "2", "", "fake", "truncated")))
    assert rows["reason"].tolist() == ["truncated", "truncated"]
    assert not rows["kept"].any()
