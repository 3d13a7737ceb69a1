import pytest
from pydantic import ValidationError

from deepfake_core.config import (
    KAGGLE_SOURCES,
    Architecture,
    DataParameters,
    PromotionParameters,
    Source,
    TrainingParameters,
)


def test_defaults_are_the_three_kaggle_sets():
    names = [source.name for source in DataParameters().sources]
    assert names == [
        "ciplab/real-and-fake-face-detection",
        "uditsharma72/real-vs-fake-faces",
        "xhlulu/140k-real-and-fake-faces",
    ]


def test_a_misspelt_parameter_is_refused():
    with pytest.raises(ValidationError, match="epoch\n"):
        TrainingParameters(epoch=3)


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (TrainingParameters, {"epochs": 0}),
        (TrainingParameters, {"learning_rate": 0}),
        (TrainingParameters, {"candidates": ()}),
        (TrainingParameters, {"candidates": ("resnet",)}),
        (TrainingParameters, {"augmentation": {"zoom": 1}}),
        (DataParameters, {"test_fraction": 0.6, "val_fraction": 0.4}),
        (DataParameters, {"sources": (KAGGLE_SOURCES[0], KAGGLE_SOURCES[0])}),
        (PromotionParameters, {"min_recall": 1.1}),
        (PromotionParameters, {"model_name": "a/b"}),
    ],
)
def test_a_value_out_of_range_is_refused(model, values):
    with pytest.raises(ValidationError):
        model(**values)


@pytest.mark.parametrize("name", ["", "ciplab", "a/b/c", "a/..", "a/b c"])
def test_a_name_that_is_neither_slug_nor_path_is_refused(name):
    with pytest.raises(ValidationError):
        Source(name=name)


@pytest.mark.parametrize("name", ["./faces.zip", "../faces.zip", "/data/faces.zip", "~/faces.zip"])
def test_a_path_is_a_local_source(name):
    source = Source(name=name)
    assert source.is_local
    assert source.short_name == "faces"
    with pytest.raises(ValidationError, match="Kaggle sources only"):
        Source(name=name, version=3)


@pytest.mark.parametrize(
    ("name", "short"),
    [("./my faces (1).zip", "my faces _1_"), ("/data/a/../b/", "b"), ("owner/some-faces", "some-faces")],
)
def test_short_names_are_names_that_mlflow_admits(name, short):
    assert Source(name=name).short_name == short


def test_parameters_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        TrainingParameters().epochs = 3


def test_every_architecture_has_a_builder():
    from typing import get_args

    from deepfake_core.models import BUILDERS

    assert set(BUILDERS) == set(get_args(Architecture))
