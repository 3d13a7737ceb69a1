"""Confirmed reports in a data set: which split they are in, and which they never reach."""

import hashlib
import io
import shutil
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from deepfake_core.config import FEEDBACK, REGRESSION, DataParameters, Source
from deepfake_core.data.confirmed import cut_face, fetch_confirmed
from deepfake_core.data.dataset import hash_content
from deepfake_core.data.groups import find_components
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.reported_images import WHOLE, WHOLE_IMAGE
from deepfake_core.data.split_memory import read_memory, remember_splits
from deepfake_core.data.splits import REGRESSION_SHARE
from deepfake_core.errors import ArchiveError, ConfigurationError
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import Feedback, open_feedback
from deepfake_core.storage.store import open_store
from tests.builders import draw_image, encode, faces, jpeg, prepare, write_zip
from tests.split_laws import check_laws, link, pictures, split, worlds


@pytest.mark.sweep
@settings(max_examples=30, deadline=None)
@given(worlds(), st.data())
def test_no_confirmed_image_nor_a_near_copy_of_it_is_where_it_must_not_be(world, data):
    """Reports, and what a source adds, come over three versions in any order; some reports are a face and its image."""
    index, links, first, most = world
    random = Random(data.draw(st.integers(0, 2**32)))
    chosen = random.sample(range(len(index)), data.draw(st.integers(0, 120)))
    index.loc[chosen, "source"] = FEEDBACK
    whole = dict(zip(chosen[::3], chosen[1::3], strict=False))
    for image, face in whole.items():  # what is linked to either may not cross splits
        name, label = index["sha256"][image], index["label"][face]
        index.loc[image, ["label", "member"]] = label, f"{WHOLE}/{label}/{name}.jpg"
        index.loc[face, "member"] = f"{label}/{name}.jpg"
    linked = pd.Series(find_components(pd.Index(index["sha256"]), links), index=index["sha256"])
    known: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        for count in (first, data.draw(st.integers(first, len(index))), len(index)):
            rows = split(index[:count], links, read_memory(store), most=most)
            faces = {index["sha256"][image]: index["sha256"][face] for image, face in whole.items() if image < count}
            of_faces = links.assign(image=links["image"].replace(faces), other=links["other"].replace(faces))
            check_laws(index[:count], pd.concat([links, of_faces]), rows)
            kept = rows[rows["kept"]].set_index("sha256")["split"]
            assert all(kept.get(name, where) == where for name, where in known.items())
            new = rows[rows["kept"] & ~rows["group"].isin(rows.loc[rows["sha256"].isin(read_memory(store)), "group"])]
            assert set(linked[new.loc[new["split"] == REGRESSION, "sha256"]]) <= set(linked[index["sha256"][chosen]])
            known |= kept.to_dict()
            remember_splits(rows, store)


def test_three_in_ten_new_groups_with_a_report_are_never_learned_from():
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


def test_a_near_copy_joins_the_split_of_the_image_that_is_known():
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


VERDICT = GivenVerdict(label="real", probability=0.5, sure=True, version="a model version 1", faces=1)


def report(data_dir, label: str, *images: bytes, box: tuple[int, int, int, int] | None = None) -> list[str]:
    """Report images in a data folder and confirm them; return their SHA-256."""
    feedback = open_feedback(f"{data_dir}/feedback")
    wrong = {"real": "fake", "fake": "real"}[label]
    verdict = GivenVerdict(label=wrong, probability=0.5, sure=True, version="a model version 1", box=box, faces=1)
    names = [feedback.add(image, verdict, label).sha256 for image in images]
    for name in names:
        feedback.confirm(name, label, by="a reviewer")
    return names


def list_files(folder) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_confirmed_reports_are_a_source_and_leave_when_a_decision_is_taken_back(tmp_path):
    data_dir, path = tmp_path / "data", write_zip(tmp_path / "a.zip", faces(20))
    before = prepare(data_dir, path)
    assert not (data_dir / "feedback").exists()
    fakes = report(data_dir, "fake", *(jpeg(20_000 + i) for i in range(40)))
    reals = report(data_dir, "real", *(jpeg(30_000 + i) for i in range(40)))
    feedback = open_feedback(data_dir / "feedback")
    feedback.add(jpeg(5), VERDICT, "fake")  # nobody confirmed it
    dataset = prepare(data_dir, path)
    rows = dataset.manifest[dataset.manifest["source"] == FEEDBACK]
    assert rows.groupby("label")["sha256"].agg(set).to_dict() == {"fake": set(fakes), "real": set(reals)}
    assert 10 < len(dataset.split(REGRESSION)) < 40
    assert set(dataset.splits) == {"train", "val", "test", REGRESSION}
    for row in dataset.split(REGRESSION).itertuples():
        assert (dataset.path / row.path).read_bytes() == feedback.read_image(row.sha256)
        assert row.path == f"regression/{row.label}/{row.sha256}.jpg"
    was = before.manifest.query("kept").set_index("sha256")["split"]
    now = dataset.manifest.query("kept").set_index("sha256")["split"]
    assert (now[was.index] == was).all()

    written = list_files(data_dir / "confirmed" / FEEDBACK)
    stray = data_dir / "confirmed" / FEEDBACK / "fake" / f".{fakes[0]}.jpg.123"  # of a run that was killed
    stray.write_bytes(b"half")
    feedback.withdraw(fakes[0], by="another")
    feedback.forget(fakes[1])
    feedback.confirm(fakes[2], "real", by="another")
    smaller = prepare(data_dir, path)
    left = {name: data for name, data in written.items() if name[5:69] not in fakes[:3]}
    assert list_files(data_dir / "confirmed" / FEEDBACK) == left | {
        f"real/{fakes[2]}.jpg": feedback.read_image(fakes[2])
    }
    rows = smaller.manifest.query("kept").set_index("sha256")
    assert rows.loc[fakes[2], ["label", "split"]].tolist() == ["real", now[fakes[2]]]
    common = rows.index.intersection(now.index)
    assert len(common) == len(now) - 2
    assert (rows["split"][common] == now[common]).all()

    for name in (*fakes[2:], *reals):
        feedback.reject(name, by="another")
    assert prepare(data_dir, path).version == before.version
    assert list_files(data_dir / "confirmed") == {}


@pytest.mark.slow
def test_what_is_a_near_copy_of_a_test_image_never_trains_the_model(tmp_path):
    large = {f"real/{i}.jpg": encode(draw_image(i, 200, 20), quality=90) for i in range(60)}
    large |= {f"fake/{i}.jpg": encode(draw_image(500 + i, 200, 20), quality=90) for i in range(60)}
    data_dir, path = tmp_path / "data", write_zip(tmp_path / "a.zip", large)
    dataset = prepare(data_dir, path)
    tested = dataset.split("test")
    for row in tested.itertuples():
        with Image.open(dataset.path / row.path) as image:
            report(data_dir, row.label, encode(image.resize((150, 150)), quality=70))  # the same picture, smaller
            edited = image.copy()
        edited.paste(draw_image(9000, 50), (75, 125))
        report(data_dir, "fake", encode(edited.resize((220, 220)), quality=90))  # a near copy that is kept
    now = prepare(data_dir, path).manifest
    reported = now[now["source"] == FEEDBACK]
    assert len(reported) == 2 * len(tested) > 40
    assert set(reported["split"]) == {"test", ""}
    assert set(reported["group"]) <= set(now.loc[now["split"] == "test", "group"])
    assert (reported["split"] == "test").sum() >= len(tested)


@pytest.mark.slow
def test_the_face_cut_out_of_a_copy_of_a_test_image_never_trains_the_model(tmp_path):
    photographs = {f"{label}/{i}.jpg": encode(draw_image(start + i, 480, 30).crop((0, 0, 480, 400)), quality=92)
                   for label, start in (("real", 0), ("fake", 500)) for i in range(40)}  # fmt: skip
    data_dir, path = tmp_path / "data", write_zip(tmp_path / "a.zip", photographs)
    dataset = prepare(data_dir, path)
    tested = dataset.split("test")
    sent = {}
    for position, row in enumerate(tested.itertuples()):
        image, box = (dataset.path / row.path).read_bytes(), (150, 90, 290, 250)
        if position:  # the first is sent as it is, the others as a messenger recompresses them
            image = encode(Image.open(io.BytesIO(image)), quality=80)
        sent |= dict.fromkeys(report(data_dir, "fake", image, box=box), row.sha256)
    published = prepare(data_dir, path)
    reported = published.manifest[published.manifest["source"] == FEEDBACK]
    used, whole = reported[reported["kept"]], reported[~reported["kept"]]
    assert set(whole["reason"]) == {WHOLE_IMAGE}
    assert set(whole["member"]) == {f"whole/fake/{name}.jpg" for name in sent}
    assert set(used["member"]) == {f"fake/{name}.jpg" for name in sent}
    assert set(used["split"]) == {"test"}
    groups = published.manifest.query("kept").set_index("sha256")["group"]
    assert all(groups[face.sha256] == groups[sent[Path(face.member).stem]] for face in used.itertuples())
    assert not any(list(published.path.rglob(f"{name}.*")) for name in set(whole["sha256"]) - set(tested["sha256"]))
    assert prepare(data_dir, path).version == published.version


def test_the_face_that_was_judged_is_cut_out_and_keeps_its_split_though_its_bytes_change(tmp_path):
    scene = draw_image(1, 640, 40)
    jpegs = [encode(scene, quality=83, subsampling=sampling) for sampling in (0, 2)]
    box = (100, 200, 260, 360)
    (name,) = report(tmp_path, "fake", jpegs[0], box=box)
    (report_of_jpeg,) = open_feedback(tmp_path / "feedback").list_confirmed()
    data, suffix = cut_face(report_of_jpeg.read(), report_of_jpeg.box)
    face, whole = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(jpegs[0]))
    assert suffix == ".jpg"
    assert face.size == (160, 160)
    assert face.quantization == whole.quantization
    assert JpegImagePlugin.get_sampling(face) == 0
    difference = np.asarray(face, int) - np.asarray(whole.crop(box), int)
    assert np.abs(difference).mean() < 3

    (source,) = fetch_confirmed("auto", open_store(tmp_path))
    expected = {f"fake/{name}.jpg": data, f"whole/fake/{name}.jpg": jpegs[0]}
    assert list_files(tmp_path / "confirmed" / FEEDBACK) == expected
    other = hashlib.sha256(b"cut out by other code").hexdigest()
    index = pictures(200).assign(source=["s"] * 199 + [source.short_name])
    index.loc[199, ["member", "sha256"]] = f"fake/{name}.jpg", other
    for known in ("train", "test", REGRESSION):
        assert split(index, memory={name: known}).set_index("sha256").loc[other, "split"] == known
    remember_splits(split(index), open_store(tmp_path))
    memory = read_memory(open_store(tmp_path))
    assert memory[name] == memory[other]


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_face_is_cut_out_of_other_formats_without_loss(tmp_path, form):
    image = draw_image(1, 200, 20)
    options = {"lossless": True} if form == "WEBP" else {}
    (name,) = report(tmp_path, "real", encode(image, form, **options), box=(0, 20, 90, 999))
    fetch_confirmed("auto", open_store(tmp_path))
    with Image.open(tmp_path / "confirmed" / FEEDBACK / "real" / f"{name}.png") as face:
        assert np.array_equal(np.asarray(face.convert("RGB")), np.asarray(image.crop((0, 20, 90, 200))))


def test_whole_images_keep_their_bytes(tmp_path):
    (name,) = report(tmp_path, "real", jpeg(1), box=(0, 0, 48, 48))
    fetch_confirmed("auto", open_store(tmp_path))
    whole = tmp_path / "confirmed" / FEEDBACK / "whole" / "real" / f"{name}.jpg"
    written = whole.stat()
    assert list_files(tmp_path / "confirmed" / FEEDBACK) == dict.fromkeys(
        [f"real/{name}.jpg", f"whole/real/{name}.jpg"], jpeg(1)
    )
    fetch_confirmed("auto", open_store(tmp_path))
    assert whole.stat() == written
    whole.unlink()  # as versions before this one left it
    fetch_confirmed("auto", open_store(tmp_path))
    assert whole.read_bytes() == jpeg(1)


def test_a_report_that_is_forgotten_while_reports_are_read_is_skipped(tmp_path, monkeypatch):
    names = report(tmp_path, "fake", *(jpeg(number) for number in range(4)))
    feedback = open_feedback(tmp_path / "feedback")
    listed = Feedback.list_confirmed

    def forget_after(self):
        found = listed(self)
        for name in leaving:
            feedback.forget(name)
        leaving.clear()
        return found

    monkeypatch.setattr(Feedback, "list_confirmed", forget_after)
    leaving = names[1:2]
    (source,) = fetch_confirmed("auto", open_store(tmp_path))
    left = {f"fake/{name}.jpg" for name in (names[0], *names[2:])}
    assert set(list_files(Path(source.name))) == left
    shutil.rmtree(source.name)
    leaving = [names[0], *names[2:]]
    assert fetch_confirmed("auto", open_store(tmp_path)) == ()


def test_what_was_forgotten_is_in_no_index_any_more(tmp_path):
    names = report(tmp_path, "fake", *(jpeg(number) for number in range(4)))
    store = open_store(tmp_path)

    def index_reports() -> set[str]:
        for source in fetch_confirmed("auto", store):
            build_index(fetch_archive(source, store), store)
        members = [pd.read_parquet(path)["member"] for path in store.indexes().glob("*.parquet")]
        return {Path(member).stem for one in members for member in one}

    assert index_reports() == set(names)
    feedback = open_feedback(tmp_path / "feedback")
    feedback.forget(names[0])
    assert index_reports() == set(names[1:])
    feedback.reject(names[1], by="a reviewer")
    assert index_reports() == set(names[2:])
    for name in names[2:]:
        feedback.forget(name)
    assert index_reports() == set()


def test_reports_can_be_elsewhere_or_left_out(tmp_path):
    report(tmp_path / "other", "fake", jpeg(1))
    store = open_store(tmp_path / "data")
    assert fetch_confirmed("auto", store) == ()
    (source,) = fetch_confirmed(str(tmp_path / "other" / "feedback"), store)
    assert source.short_name == FEEDBACK
    assert len(list_files(store.confirmed())) == 1
    assert fetch_confirmed("none", store) == ()
    assert list_files(store.confirmed()) == {}


def test_at_a_url_each_machine_makes_its_own_copy(tmp_path, monkeypatch):
    url = f"memory://{tmp_path}/deepfake"
    sent = report(url, "fake", jpeg(1))
    for machine in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        (source,) = fetch_confirmed("auto", open_store(url))
        assert source.name.startswith(str(tmp_path / machine))
        assert list_files(Path(source.name)) == {f"fake/{sent[0]}.jpg": jpeg(1)}


def test_what_is_no_feedback_or_was_changed_stops_the_run(tmp_path):
    store = open_store(tmp_path / "data")
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "a.jpg").write_bytes(jpeg(1))
    with pytest.raises(ConfigurationError, match=r"which holds a\.jpg and no feedback\.json"):
        fetch_confirmed(str(other), store)
    (name,) = report(tmp_path / "data", "fake", jpeg(1))
    (store.feedback() / name / "image").write_bytes(jpeg(2))
    with pytest.raises(ArchiveError, match="must be as it was sent"):
        fetch_confirmed("auto", store)
    assert list_files(store.confirmed()) == {}
    (store.feedback() / "feedback.json").write_text('{"format": 1, "project": "another"}')
    with pytest.raises(ConfigurationError, match="another"):
        fetch_confirmed("auto", store)
