"""A challenger meets production: without Prefect, and with one trained network for all."""

import base64
import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest

from deepfake_core.config import FEEDBACK, PromotionParameters
from deepfake_core.data.images import load_seen
from deepfake_core.description import DESCRIPTION
from deepfake_core.errors import ProductionMovedError
from deepfake_core.evaluation.evaluation import evaluate_scores
from deepfake_core.evaluation.test_split import evaluate_on_test
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.registry import candidates, challenge, names, production, runs, warm_start
from deepfake_core.registry.candidates import TrainedCandidate, choose_best, log_measured
from deepfake_core.registry.challenge import promote_challenger, register_challenger
from deepfake_core.registry.connection import connect
from deepfake_core.registry.detectors import download_version
from deepfake_core.registry.probe import choose_probe
from deepfake_core.registry.versions import read_version
from deepfake_core.reports.outcome import describe_challenge, describe_retrain
from tests.builders import NAME, draw_scores, faces, jpeg, prepare, write_zip

NO_FLOORS = PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)
VERDICT = GivenVerdict(label="real", probability=0.1, sure=True, version="a model version 1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("challenge")
    return prepare(folder / "data", write_zip(folder / "a.zip", faces(20)))


@pytest.fixture
def challenge_with(tracking, candidate):
    """Return a function that registers the candidate as trained on a data set, and lets it meet production."""
    connect()

    def run(dataset, parameters=NO_FLOORS, threshold=None):
        folder = candidate.folder
        if threshold is not None:
            folder = Path(shutil.copytree(folder, tracking / f"threshold-{threshold}"))
            description = json.loads((folder / DESCRIPTION).read_text())
            (folder / DESCRIPTION).write_text(json.dumps(description | {"threshold": threshold}))
        with runs.open_run("retrain") as parent:
            runs.log_dataset(parent, dataset)
            with runs.open_run("cnn", parent) as run_id:
                pass
        measured = evaluate_on_test(folder, dataset)
        best = TrainedCandidate(dataclasses.replace(candidate, folder=folder), run_id, measured.evaluation)
        log_measured(best, parent, measured)
        version = register_challenger(best, measured, dataset, NAME, {names.FLOW_RUN_ID: "f"})
        outcome = promote_challenger(version, best, measured, dataset, parameters)
        assert NAME in describe_challenge(outcome, NAME, version, measured)
        return outcome, read_version(NAME, version)

    return run


@pytest.fixture(scope="module", autouse=True)
def with_report(dataset):
    dataset.report.write_text("<html></html>")


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The next data set: it holds the first one's images under a fresh memory, so that they change their split."""
    folder = tmp_path_factory.mktemp("grown")
    members = faces(20) | {f"real/n{i}.jpg": jpeg(700 + i) for i in range(30)}
    grown = prepare(folder / "data", write_zip(folder / "grown.zip", members), test_fraction=0.5)
    grown.report.write_text("")
    return grown


def test_the_candidate_with_the_best_auc_on_validation_is_chosen():
    found = [
        TrainedCandidate(SimpleNamespace(), name, evaluate_scores(*draw_scores(100, 1, gain), 0.5))
        for name, gain in (("weak", 0.5), ("strong", 3.0), ("middling", 1.5))
    ]
    assert choose_best(found).run_id == "strong"
    assert choose_best([found[0], dataclasses.replace(found[0], run_id="equal")]).run_id == "weak"


def test_a_small_source_counts_as_much_as_a_large_one_when_a_candidate_is_chosen():
    found = []
    for name, gains in (("large", (3.0, 0.0)), ("both", (2.0, 2.0))):
        labels, scores = (
            np.concatenate(one) for one in zip(draw_scores(400, 1, gains[0]), draw_scores(40, 2, gains[1]), strict=True)
        )
        rows = {"source": np.repeat(["large", "small"], [400, 40]), "member": np.full(440, ""), "group": np.arange(440)}
        found.append(TrainedCandidate(SimpleNamespace(), name, evaluate_scores(labels, scores, 0.5, rows)))
    assert found[0].validation.auc > found[1].validation.auc
    assert choose_best(found).run_id == "both"


@pytest.mark.slow
def test_the_first_version_is_promoted_if_it_meets_the_floors(challenge_with, dataset):
    _, refused = challenge_with(dataset, PromotionParameters(min_precision=1, min_recall=1))
    assert refused.decision == names.NOT_PROMOTED
    assert any(reason.startswith("NOT met: ") for reason in refused.reasons)
    outcome, version = challenge_with(dataset)
    assert (outcome.production, outcome.comparison) == (None, None)
    assert version.decision == names.PROMOTED
    assert version.reasons[-1] == "met: no production model yet"
    assert production.find_production(NAME) == version.version == "2"
    text = describe_retrain(dataset, version)
    assert f"version 2: {names.PROMOTED}" in text
    assert f"| AUC | {version.estimate('auc')} |" in text


@pytest.mark.slow
def test_an_equal_challenger_is_not_promoted_and_both_are_compared_on_the_same_images(challenge_with, dataset):
    challenge_with(dataset)
    outcome, version = challenge_with(dataset)
    assert version.decision == names.NOT_PROMOTED
    assert version.tags[names.COMPARED_WITH] == outcome.production == "1"
    assert outcome.comparison.difference.value == 0
    assert outcome.comparison.challenger.confusion.total == len(dataset.split("test"))
    assert version.metrics["probability_better"] == outcome.comparison.probability < 0.95


@pytest.mark.slow
def test_drawn_images_never_replace_a_model_of_photographs(challenge_with, dataset, tmp_path):
    challenge_with(dataset)
    drawn = prepare(tmp_path / "drawn", write_zip(tmp_path / "b.zip", faces(20)))
    drawn.report.write_text("")
    for source in drawn.description["sources"]:
        source["drawn"] = True
    _, version = challenge_with(drawn, NO_FLOORS.model_copy(update={"min_probability": 0.500001, "max_recall_drop": 1}))
    assert version.is_drawn
    assert "NOT met: drawn images never replace a model trained on photographs" in version.reasons
    assert production.find_production(NAME) == "1"


@pytest.mark.slow
def test_what_went_into_production_meanwhile_is_compared_with(challenge_with, dataset, monkeypatch):
    """Two retrains end together: the other one's version goes into production while ours is compared."""
    challenge_with(dataset)
    challenge_with(dataset)
    seen = []
    compare = challenge.compare_scores

    def compare_slowly(*arguments):
        seen.append(production.find_production(NAME))
        if len(seen) == 1:
            production.move_production(NAME, "2", "1", "the other retrain")
        return dataclasses.replace(compare(*arguments), probability=1.0)  # whatever the metrics: ours is better

    monkeypatch.setattr(challenge, "compare_scores", compare_slowly)
    _, version = challenge_with(dataset, NO_FLOORS.model_copy(update={"max_recall_drop": 1}))
    assert seen == ["1", "2"]
    assert production.find_production(NAME) == version.version == "3"
    assert version.tags[names.COMPARED_WITH] == version.tags[names.REPLACED] == "2"


@pytest.mark.slow
def test_production_that_never_rests_fails_the_promotion(challenge_with, dataset, monkeypatch):
    challenge_with(dataset)
    moves = []

    def move(*arguments, **named):
        moves.append((arguments, named))
        raise ProductionMovedError("moved")

    monkeypatch.setattr(challenge, "move_production", move)
    compare = challenge.compare_scores
    better = lambda *arguments: dataclasses.replace(compare(*arguments), probability=1.0)  # noqa: E731
    monkeypatch.setattr(challenge, "compare_scores", better)
    with pytest.raises(ProductionMovedError, match=f"Received: {challenge.MAX_COMPARISONS} moves"):
        challenge_with(dataset, NO_FLOORS.model_copy(update={"max_recall_drop": 1}))
    assert len(moves) == challenge.MAX_COMPARISONS
    assert read_version(NAME, "2").decision == ""


@pytest.mark.slow
def test_images_that_production_learned_are_left_out_of_the_comparison(challenge_with, dataset, grown):
    challenge_with(dataset)
    outcome, version = challenge_with(grown)
    test, first = grown.split("test"), dataset.manifest
    learned = set(first.loc[first["split"].isin(("train", "val")), "sha256"])
    left = int((~test["sha256"].isin(learned)).sum())
    assert 0 < left < len(test)
    assert outcome.comparison.left_out == len(test) - left
    assert any(f"on the same {left} images" in reason for reason in version.reasons)


@pytest.mark.slow
def test_images_that_production_learned_before_a_warm_start_are_left_out_too(challenge_with, dataset, grown, tmp_path):
    """Its training, on other images, began from the network of a version that was trained on `dataset`."""
    _, first = challenge_with(dataset)
    other = prepare(tmp_path / "other", write_zip(tmp_path / "other.zip", faces(20, start=300)))
    other.report.write_text("")
    _, second = challenge_with(other)
    mlflow.MlflowClient().set_tag(second.run_id, names.BEGAN_FROM, f"{first.run_id} {first.dataset_version}")
    production.move_production(NAME, "2", expected="1", reason="test")
    outcome, _ = challenge_with(grown)
    test, manifest = grown.split("test"), dataset.manifest
    learned = set(manifest.loc[manifest["split"].isin(("train", "val")), "sha256"])
    assert outcome.production == "2"
    assert outcome.comparison.left_out == test["sha256"].isin(learned).sum() > 0


@pytest.mark.slow
def test_production_without_a_manifest_is_never_replaced(challenge_with, dataset, tmp_path, monkeypatch):
    challenge_with(dataset)
    other = prepare(tmp_path / "other", write_zip(tmp_path / "other.zip", faces(20, start=300)))
    other.report.write_text("")
    monkeypatch.setattr(warm_start, "read_table", lambda *_: None)
    _, version = challenge_with(other, NO_FLOORS.model_copy(update={"min_probability": 0.500001, "max_recall_drop": 1}))
    assert any("unknown, as its run holds no manifest" in reason for reason in version.reasons)
    assert production.find_production(NAME) == "1"


@pytest.fixture(scope="module")
def with_feedback(tmp_path_factory):
    """Publish a data set with 60 confirmed reports of fakes."""
    folder = tmp_path_factory.mktemp("feedback")
    feedback = open_feedback(folder / "data" / "feedback")
    for number in range(60):
        sent = feedback.add(jpeg(40_000 + number), VERDICT, "fake")
        feedback.confirm(sent.sha256, "fake", by="a reviewer")
    dataset = prepare(folder / "data", write_zip(folder / "a.zip", faces(20)))
    dataset.report.write_text("<html></html>")
    return dataset


@pytest.mark.slow
def test_a_challenger_that_forgets_confirmed_reports_is_refused(challenge_with, with_feedback, monkeypatch):
    """The first version calls every image fake, the second every image real."""
    alone, first = challenge_with(with_feedback, threshold=0.0)
    images = with_feedback.split("regression")
    assert [image.sha256 for image in alone.regression.images] == images["sha256"].tolist()
    assert alone.regression.compared == ()
    assert first.decision == names.PROMOTED
    assert first.metrics["regression/images"] == len(images) > 10

    compare = challenge.compare_scores
    better = lambda *arguments: dataclasses.replace(compare(*arguments), probability=1.0)  # noqa: E731
    monkeypatch.setattr(challenge, "compare_scores", better)
    outcome, second = challenge_with(with_feedback, NO_FLOORS.model_copy(update={"max_recall_drop": 1}), threshold=1.0)
    (reason,) = [one for one in second.reasons if one.startswith("NOT met")]
    assert f"confirmed reports: wrong on {len(images)} of {len(images)}, production on 0" in reason
    assert reason.endswith(f"and {len(images) - 10} more")
    assert images["sha256"][0][:12] in reason
    assert production.find_production(NAME) == "1"
    assert second.metrics["regression/p_value"] == outcome.regression.p_value < 0.001
    table = pd.read_csv(io.StringIO(runs.read_text(second.run_id, "evaluation/regression.csv")))
    assert table["sha256"].tolist() == images["sha256"].tolist()
    assert table["wrong_after"].all()
    assert not table["wrong_before"].any()


@pytest.mark.slow
def test_what_a_run_keeps_for_good_is_no_confirmed_report(challenge_with, with_feedback, candidate, tmp_path):
    _, version = challenge_with(with_feedback)
    candidates.log_candidate(version.run_id, candidate, load_seen(with_feedback, "val", 32, ()), with_feedback)
    val = with_feedback.split("val")
    reported = val["source"] == FEEDBACK
    assert reported.sum() > 5
    probe = Path(mlflow.MlflowClient().download_artifacts(version.run_id, names.PROBE, str(tmp_path)))
    images = {hashlib.sha256(file.read_bytes()).hexdigest() for file in probe.glob("*.image")}
    assert images == set(val["sha256"][~reported])
    stored = download_version(f"models:/{NAME}/{version.version}", tmp_path / "version")
    example = (stored / "input_example.json").read_text().replace("\\n", "")  # MLflow breaks lines
    encoded = [base64.b64encode((with_feedback.path / path).read_bytes()).decode() for path in val["path"]]
    assert [one in example for one in encoded] == [position == choose_probe(val)[0] for position in range(len(val))]


def test_where_validation_holds_confirmed_reports_alone_they_are_the_probe():
    rows = pd.DataFrame({"source": [FEEDBACK] * 40})
    assert choose_probe(rows).tolist() == np.linspace(0, 39, 16).astype(int).tolist()
    assert choose_probe(rows.assign(source=[FEEDBACK, "s"] * 20)[:4]).tolist() == [1, 3]


@pytest.mark.slow
def test_both_models_are_asked_about_confirmed_reports_that_neither_learned(challenge_with, with_feedback, dataset):
    challenge_with(dataset)
    outcome, version = challenge_with(with_feedback)
    images = with_feedback.split("regression")
    assert len(outcome.regression.compared) == len(images)
    assert all(image.before == image.after for image in outcome.regression.images)  # it is the same network
    assert any("production on" in reason and "confirmed reports" in reason for reason in version.reasons)
    reported = (with_feedback.split("test")["source"] == "feedback").sum()
    learned = outcome.comparison.left_out - reported
    assert reported > 0
    assert learned >= 0
    assert "feedback" not in outcome.comparison.challenger.sources


@pytest.mark.slow
def test_confirmed_reports_that_production_learned_elsewhere_are_not_asked_about(
    challenge_with, with_feedback, tmp_path
):
    """Production comes from another data folder, where the same pictures were a source to train on."""
    images = with_feedback.split("regression")
    members = faces(20) | {
        f"{row.label}/r{row.Index}.jpg": (with_feedback.path / row.path).read_bytes() for row in images.itertuples()
    }
    other = prepare(tmp_path / "other", write_zip(tmp_path / "b.zip", members))
    other.report.write_text("")
    challenge_with(other)
    outcome, _ = challenge_with(with_feedback)
    untouched = set(other.split("test")["sha256"])
    asked = {image.sha256 for image in outcome.regression.compared}
    assert asked == set(images["sha256"]) & untouched
    assert len(asked) < len(images)
