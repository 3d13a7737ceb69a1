import re

import pandas as pd
import pytest

from deepfake_core.config import DataParameters, Source
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_links
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.data.shortcuts import find_shortcuts
from deepfake_core.data.splits import assign_splits
from deepfake_core.reports.data_report import write_report
from deepfake_core.storage.store import open_store
from tests.builders import draw_image, encode, faces, jpeg, write_zip

HOSTILE = "real/<script>alert(1)</script>&.jpg"


def prepare(path, data_dir, **source: object):
    store = open_store(data_dir)
    archive = fetch_archive(Source(name=str(path), **source), store)
    index = build_index(archive, store)
    links = find_links(index)
    rows = assign_splits(mark_duplicates(index, links), links, {}, 0.25, 0.25)
    return publish_dataset(rows, [archive], store, DataParameters()), links, archive


@pytest.fixture
def published(tmp_path):
    image = draw_image(3, 200, 20)
    edited = image.copy()
    edited.paste(draw_image(99, 50), (75, 125))
    members = faces(40) | {
        "real/source.jpg": encode(image, quality=90),
        "real/small.jpg": encode(image.resize((100, 100)), quality=90),
        "fake/edit.jpg": encode(edited, quality=90),
        HOSTILE: jpeg(5000),
        "real/broken.jpg": b"broken",
    }
    members |= {f"fake/{i}.jpg": encode(draw_image(10_000 + i), quality=40) for i in range(30)}
    return prepare(write_zip(tmp_path / "a.zip", members), tmp_path / "data")


@pytest.mark.slow
def test_the_report_says_what_was_found(published):
    dataset, links, archive = published
    page = write_report(dataset, links, [archive]).read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"data:[^\"]+", "", page)))
    assert "85 files found, 83 of them kept;" in text
    assert "No group is in more than one split." in text
    assert "1 group of more than one picture" in text
    assert "1 pair of near copies with different labels." in text
    assert "JPEG table q40-" in text
    assert "3 pictures" in text
    for member in ("real/source.jpg", "real/small.jpg", "fake/edit.jpg"):
        assert member in text
    assert "real, copy, 100 x 100" in text
    assert re.search(r"a 85 83 1 1 42 41", text)  # files, kept, copy, not an image, kept real, kept fake
    assert "drawn" not in text
    assert pd.read_parquet(dataset.path / "links.parquet").equals(links)


@pytest.mark.slow
def test_the_report_needs_nothing_else_and_runs_nothing(published, tmp_path):
    dataset, links, archive = published
    page = write_report(dataset, links, [archive]).read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="(\w+:[\w/+]*)', page)) == {"data:image/jpeg", "data:image/svg+xml"}
    hostile = mark_hostile(tmp_path)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;.jpg" in hostile
    assert "<script" not in hostile


def mark_hostile(tmp_path) -> str:
    """Write a report whose gallery holds an image with a hostile name."""
    small = {"real/small.jpg": encode(draw_image(5000).resize((44, 44)), quality=90)}
    members = faces(40) | {HOSTILE: jpeg(5000)} | small
    dataset, links, archive = prepare(write_zip(tmp_path / "hostile.zip", members), tmp_path / "other", drawn=True)
    page = write_report(dataset, links, [archive]).read_text()
    assert "Some of these images are drawn" in page
    return page


@pytest.mark.slow
def test_a_report_that_is_there_is_not_written_again(published):
    dataset, links, archive = published
    path = write_report(dataset, links, [archive])
    before = path.stat().st_mtime_ns
    assert write_report(dataset, links, [archive]) == path
    assert path.stat().st_mtime_ns == before
    path.unlink()
    write_report(Dataset(dataset.path, dataset.store), links, [archive])
    assert path.exists()


def kept(real: dict, fake: dict, count: int = 200, source: str = "s") -> pd.DataFrame:
    usual = {"width": 100, "height": 100, "bytes": 5000, "format": "JPEG", "jpeg_table": "q90-a"}
    frames = [
        pd.DataFrame([usual | facts] * count).assign(label=label) for label, facts in (("real", real), ("fake", fake))
    ]
    return pd.concat(frames, ignore_index=True).assign(source=source)


def test_no_difference_is_no_shortcut():
    assert find_shortcuts(kept({}, {})).empty
    few = kept({}, {}, 10)
    few.loc[10:11, "jpeg_table"] = "q50-b"  # two of ten fakes: may be chance
    assert find_shortcuts(few).empty


def test_a_table_that_only_fakes_have_is_named_with_its_auc():
    rows = kept({}, {})
    rows.loc[200:249, "jpeg_table"] = "q50-b"  # a quarter of the fakes
    found = find_shortcuts(rows)
    assert found["shortcut"].tolist() == ["JPEG table q50-b", "JPEG table other than q90-a"]
    assert found["auc"].tolist() == [0.625, 0.625]
    assert found["real"].tolist() == ["0.0% have q50-b", "100.0% have q90-a"]
    assert found["fake"].tolist() == ["25.0% have q50-b", "75.0% have q90-a"]


@pytest.mark.parametrize(
    ("fake", "shortcuts"),
    [
        ({"bytes": 9000}, {"larger files", "more bytes per pixel"}),
        ({"bytes": 900}, {"smaller files", "fewer bytes per pixel"}),
        ({"width": 50, "bytes": 2500}, {"narrower images", "smaller files"}),
        ({"format": "PNG", "jpeg_table": ""}, {"format PNG", "format other than JPEG", "JPEG table other than q90-a"}),
    ],
)
def test_facts_that_tell_the_label_are_shortcuts(fake, shortcuts):
    found = find_shortcuts(kept({}, fake))
    assert set(found["shortcut"]) == shortcuts
    assert (found["auc"] == 1).all()


def test_shortcuts_are_sought_in_each_source_and_in_all():
    rows = pd.concat([kept({}, {"bytes": 9000}, source="a"), kept({}, {}, source="b")])
    found = find_shortcuts(rows)
    assert set(found["scope"]) == {"a", "all"}
    assert found.groupby("scope")["auc"].max().to_dict() == {"a": 1.0, "all": 0.75}
    one_class = pd.concat([kept({}, {}, source="a"), kept({}, {}, source="b").query("label == 'real'")])
    assert find_shortcuts(one_class).empty
