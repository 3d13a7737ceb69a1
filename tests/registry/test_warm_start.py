"""A training that begins from the network in production, with a real registry and small networks."""

import dataclasses

import mlflow
import numpy as np
import pytest

from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.models import CANDIDATES, efficientnet_lite0
from deepfake_core.registry import names, production, runs
from deepfake_core.registry.connection import connect
from deepfake_core.registry.detectors import register_detector
from deepfake_core.registry.warm_start import begin
from deepfake_core.storage.files import remove_folder
from deepfake_core.training.export import load_network
from deepfake_core.training.fit import Training, find_backbone, train_candidate
from tests.builders import NAME, SIZE, faces, jpeg, prepare, stripes, write_zip

ARCHITECTURE = "efficientnet_lite0"


@pytest.fixture(scope="module", autouse=True)
def small():
    """Let the backbone have few of its layers, without ImageNet's weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet_lite0, "BLOCKS", efficientnet_lite0.BLOCKS[:2])
        patch.setattr(efficientnet_lite0, "load_imagenet", lambda backbone: None)  # noqa: ARG005
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a network that transfers learning."""
    recipe = TrainingParameters(image_size=SIZE, epochs=2, batch_size=16).adjust(CANDIDATES[ARCHITECTURE].RECIPE)
    folder = tmp_path_factory.mktemp("trained")
    return train_candidate(Training(ARCHITECTURE, recipe), stripes(48, 0), stripes(16, 1), folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dataset = prepare(folder, write_zip(folder / "a.zip", faces(20)), write_zip(folder / "b.zip", faces(10, start=100)))
    dataset.report.write_text("<html></html>")
    return dataset


@pytest.fixture(autouse=True)
def without_trainings(dataset):
    """Let no test go on with another one's training."""
    yield
    remove_folder(dataset.store.folder / "training")


@pytest.fixture
def put_into_production(tracking):  # noqa: ARG001 - MLflow is in its folder
    """Return a function that registers a detector, as trained on a data set, and puts it into production."""
    connect()

    def put(candidate, dataset, holdout=()):
        with runs.open_run("retrain") as parent:
            evaluation = EvaluationParameters(holdout_sources=holdout)
            runs.log_inputs(parent, dataset, TrainingParameters(), evaluation, PromotionParameters())
            with runs.open_run(candidate.architecture, parent) as run_id:
                pass
        tags = {names.ARCHITECTURE: candidate.architecture, names.DATASET_VERSION: dataset.version}
        version = register_detector(run_id, candidate.folder, NAME, jpeg(1), tags)
        production.move_production(NAME, version, production.find_production(NAME), "test")
        return run_id

    return put


def begin_training(dataset, holdout=(), architecture=ARCHITECTURE, seed=0):
    parameters = TrainingParameters(weights="production", image_size=SIZE, seed=seed)
    training = Training.plan(architecture, parameters, holdout)
    with runs.open_run(architecture) as run_id:
        begun = begin(training, dataset, NAME, run_id)
    assert dataclasses.replace(begun, recipe=training.recipe) == training
    return begun, mlflow.MlflowClient().get_run(run_id).data


@pytest.mark.slow
def test_a_training_begins_from_the_network_in_production_and_stays_with_it(put_into_production, trained, dataset):
    run_id = put_into_production(trained, dataset)
    begun, logged = begin_training(dataset)
    assert logged.params["begins_from"] == f"version 1 of {NAME}"
    assert logged.tags[names.BEGAN_FROM] == f"{run_id} {dataset.version}"
    built = find_backbone(CANDIDATES[ARCHITECTURE].build(begun.recipe))
    known = find_backbone(load_network(trained.folder))
    assert len(built.weights) == len(known.weights) > 10
    for one, other in zip(built.get_weights(), known.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    put_into_production(trained, dataset)
    assert begin_training(dataset)[1].params["begins_from"] == f"version 1 of {NAME}"  # it is the same training
    assert begin_training(dataset, seed=1)[1].params["begins_from"] == f"version 2 of {NAME}"


@pytest.mark.slow
@pytest.mark.usefixtures("tracking")
def test_weights_that_are_not_productions_are_left_as_they_are(dataset):
    connect()
    training = Training.plan(ARCHITECTURE, TrainingParameters(weights="none"), ())
    assert begin(training, dataset, NAME, "no run") is training


@pytest.mark.slow
@pytest.mark.usefixtures("tracking")
def test_without_a_version_in_production_a_training_begins_as_its_candidate_does(dataset):
    connect()
    begun, logged = begin_training(dataset)
    assert begun.recipe.weights == "imagenet"
    assert logged.params["begins_from"] == f"imagenet: no version of {NAME} is in production"
    assert names.BEGAN_FROM not in logged.tags


@pytest.mark.slow
def test_another_architecture_and_one_without_a_pretrained_part_are_no_beginning(
    put_into_production, candidate, dataset
):
    put_into_production(candidate, dataset)
    begun, logged = begin_training(dataset)
    assert begun.recipe.weights == "imagenet"
    assert logged.params["begins_from"] == f"imagenet: version 1 of {NAME} is another architecture"
    begun, logged = begin_training(dataset, architecture="cnn")
    assert begun.recipe.weights == "none"
    assert logged.params["begins_from"] == f"none: version 1 of {NAME} has no pretrained part"


@pytest.mark.slow
def test_a_network_that_knows_what_is_not_trained_on_is_no_beginning(put_into_production, trained, dataset, tmp_path):
    """Images that a memory of other splits put into another split: of the source that is new, all may be learned."""
    put_into_production(trained, dataset)
    other = prepare(tmp_path / "other", write_zip(tmp_path / "a.zip", faces(20)), test_fraction=0.5)
    begun, logged = begin_training(other)
    learned = set(dataset.split("train")["sha256"])
    asked = {name: other.split(name)["sha256"] for name in ("val", "test")}
    known = asked["val"].isin(learned).sum()
    known += asked["test"].isin(learned | set(dataset.split("val")["sha256"])).sum()
    assert known > 0
    assert begun.recipe.weights == "imagenet"
    assert logged.params["begins_from"].endswith(f"has learned {known} of the images that are not to be trained on now")


@pytest.mark.slow
def test_a_network_that_grew_with_its_data_set_is_a_beginning(put_into_production, trained, tmp_path):
    """Of the same memory of splits: images stay where they are, and some are new."""
    small = prepare(tmp_path / "data", write_zip(tmp_path / "a.zip", faces(20)))
    small.report.write_text("<html></html>")
    put_into_production(trained, small)
    grown = prepare(tmp_path / "data", write_zip(tmp_path / "a.zip", faces(40)))
    assert grown.version != small.version
    assert begin_training(grown)[1].params["begins_from"] == f"version 1 of {NAME}"


@pytest.mark.slow
def test_a_network_that_knows_a_source_that_is_held_out_is_no_beginning(put_into_production, trained, dataset):
    put_into_production(trained, dataset)
    begun, logged = begin_training(dataset, holdout=("b",))
    assert begun.recipe.weights == "imagenet"
    assert logged.params["begins_from"] == f"imagenet: version 1 of {NAME} was trained on b, which is held out now"
    put_into_production(trained, dataset, holdout=("b",))
    assert begin_training(dataset, holdout=("b",), seed=1)[1].params["begins_from"] == f"version 2 of {NAME}"


@pytest.mark.slow
def test_a_network_whose_images_are_unknown_is_no_beginning(put_into_production, trained, dataset):
    run_id = put_into_production(trained, dataset)
    mlflow.MlflowClient().set_tag(run_id, names.BEGAN_FROM, "0123456789abcdef0123456789abcdef some-other-data")
    begun, logged = begin_training(dataset)
    assert begun.recipe.weights == "imagenet"
    assert logged.params["begins_from"].endswith("does not say all images that it was trained on")
