import re

import pytest
from pydantic import ValidationError

from deepfake_core.config import (
    KAGGLE_SOURCES,
    AugmentationParameters,
    DataParameters,
    PromotionParameters,
    Recipe,
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


@pytest.mark.parametrize("name", ["/", "/x/..", "/x/.zip", "./" + "n" * 151, "/x/" + "é" * 76, "owner/" + "n" * 151])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ValidationError, match="must have 1 to 150 bytes"):
        Source(name=name)
    assert Source(name="./" + "n" * 150 + ".zip").short_name == "n" * 150


def test_an_owner_that_makes_the_short_name_too_long_is_refused():
    with pytest.raises(ValidationError, match="must have 1 to 150 bytes"):
        name_sources(f"/{'a' * 100}/{'n' * 100}", f"/b/{'n' * 100}")


def name_sources(*names: str) -> list[str]:
    return [source.short_name for source in DataParameters(sources=[{"name": name} for name in names]).sources]


def test_sources_that_end_alike_are_told_apart_by_their_owners():
    assert name_sources("alice/faces", "bob/faces", "carol/others") == ["alice.faces", "bob.faces", "others"]
    assert name_sources("alice/faces", "./faces.zip", "bob/faces-2")[::2] == ["alice.faces", "faces-2"]
    assert name_sources("/data/a b(1)/faces", "/data/c/faces.zip") == ["a b_1_.faces", "c.faces"]
    assert name_sources("alice/faces") == ["faces"]


def test_short_names_are_the_same_after_parameters_were_sent():
    data = DataParameters(sources=[{"name": "alice/faces"}, {"name": "bob/faces"}])
    sent = DataParameters.model_validate_json(data.model_dump_json())
    assert [source.short_name for source in sent.sources] == ["alice.faces", "bob.faces"]
    assert sent == data
    assert Source(name="alice/faces").short_name == "faces"


@pytest.mark.parametrize(
    "names",
    [["a/faces", "a/faces"], ["/x/a/faces", "/y/a/faces"], ["/x/faces", "/x/faces.zip"], ["a/b", "c/b", "./a.b"]],
)
def test_sources_that_nothing_tells_apart_are_refused(names):
    with pytest.raises(ValidationError, match="must differ in the last part of their names, or in the one before"):
        name_sources(*names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"real_folder": "a/b"}, "pattern"),
        ({"real_folder": []}, "at least 1"),
        ({"real_folder": ["real", ""]}, "pattern|at least 1"),
        ({"real_folder": ["one", "fake"]}, "must differ. Received: 'fake' and 'fake'"),
        (
            {"real_folder": "Celeb-real", "fake_folder": ["Celeb-*"]},
            "must differ. Received: 'Celeb-real' and 'Celeb-\\*'",
        ),
        ({"name": "owner/faces", "follow_links": True}, "local folders only"),
    ],
)
def test_a_source_s_folders_and_links(values, message):
    with pytest.raises(ValidationError, match=message):
        Source(**{"name": "./faces", **values})


@pytest.mark.parametrize("name", ["data_dir", "feedback"])
@pytest.mark.parametrize("address", ["s3://k:5ecre7@b/x", "s3://b/x?secret=5ecre7", "s3:/b/x", "simplecache::s3://b/x"])
def test_an_address_that_no_store_has_is_refused_without_its_secrets(name, address):
    with pytest.raises(ValidationError, match="An address must be a folder, or a URL such as s3://bucket/") as caught:
        DataParameters(**{name: address})
    assert "5ecre7" not in str(caught.value)
    pattern = DataParameters.model_json_schema()["properties"][name]["pattern"]  # of Prefect's form
    assert bool(re.search(pattern, address)) == ("5ecre7" not in address)
    for fine in ("data", "/data/me@home?", "~/data", "s3://bucket/deepfake"):
        assert DataParameters(**{name: fine}).model_dump()[name] == fine
        assert re.search(pattern, fine)


def test_parameters_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        TrainingParameters().epochs = 3


def test_what_is_set_takes_the_place_of_a_recipe_s_value_and_no_other():
    recipe = Recipe(
        image_size=64,
        epochs=5,
        patience=3,
        learning_rate=0.1,
        augmentation=AugmentationParameters(rotation=3, zoom=0.4),
    )
    assert TrainingParameters().adjust(recipe) == recipe
    changed = TrainingParameters(epochs=9, augmentation=AugmentationParameters(zoom=0)).adjust(recipe)
    assert changed == recipe.model_copy(
        update={"epochs": 9, "augmentation": AugmentationParameters(rotation=3, zoom=0)}
    )


@pytest.mark.parametrize(
    ("given", "learning_rate", "warmup_epochs"),
    [
        ({"batch_size": 32}, 0.001, 1),
        ({"batch_size": 16}, 0.001, 1),
        ({"batch_size": 128}, 0.002, 5),
        ({"batch_size": 128, "learning_rate": 0.004}, 0.004, 5),
        ({"batch_size": 128, "warmup_epochs": 0}, 0.002, 0),
        ({"batch_size": 2048, "learning_rate": None}, 0.008, 5),
    ],
)
def test_larger_batches_raise_the_learning_rate_and_warm_it_up(given, learning_rate, warmup_epochs):
    recipe = Recipe(image_size=64, epochs=3, patience=1, learning_rate=0.001, batch_size=32, warmup_epochs=1)
    adjusted = TrainingParameters(**given).adjust(recipe)
    assert adjusted.batch_size == given["batch_size"]
    assert adjusted.learning_rate == pytest.approx(learning_rate)
    assert adjusted.warmup_epochs == warmup_epochs


def test_an_override_has_the_recipe_s_meaning_and_bounds():
    properties = TrainingParameters.model_json_schema()["properties"]
    for name, field in Recipe.model_fields.items():
        assert properties[name]["default"] is None
        assert properties[name]["description"].startswith(field.description)
        assert "Empty: each candidate's own" in properties[name]["description"]
    with pytest.raises(ValidationError, match="less than or equal to 1024"):
        TrainingParameters(image_size=2000)
