"""The candidates: networks, recipes, pretrained weights, and a reader of checkpoints that trusts none of them."""

import io
import pickle
import struct
from collections import OrderedDict
from typing import get_args

import keras
import numpy as np
import pytest
import skimage.data
from PIL import Image

from deepfake_core.config import Architecture, TrainingParameters
from deepfake_core.errors import ModelError
from deepfake_core.models import CANDIDATES, efficientnet_lite0, hpf_cnn
from deepfake_core.models.backbone import BatchNormalization
from deepfake_core.models.torch_checkpoint import read_checkpoint
from deepfake_core.training.heat_map import ExplainedNetwork

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def build(architecture, **changes):
    recipe = CANDIDATES[architecture].RECIPE
    return CANDIDATES[architecture].build(TrainingParameters(**{"weights": "none", **changes}).adjust(recipe))


def test_every_architecture_has_a_file():
    assert set(CANDIDATES) == set(get_args(Architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_candidate_takes_pixels_and_gives_a_probability_that_depends_on_them(architecture):
    keras.utils.set_random_seed(0)  # some first weights give a probability that float32 rounds to 1
    model = build(architecture, image_size=64)
    assert model.name == architecture
    pixels = np.random.default_rng(0).normal(128, 20, (2, 64, 64, 3)).astype(np.float32)
    scores = keras.ops.convert_to_numpy(model(pixels))
    assert scores.shape == (2, 1)
    assert scores.dtype == np.float32
    assert (scores > 0).all()
    assert (scores < 1).all()
    assert scores[0] != scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_checkpoint_is_loaded_without_code_of_its_own(architecture, tmp_path):
    model = build(architecture, image_size=32)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    assert np.allclose(loaded(pixels), model(pixels), atol=1e-6)


def test_reference_cnn_is_the_published_one():
    model = build("cnn")
    assert model.input_shape == (None, 150, 150, 3)
    assert [(layer.filters, layer.kernel_size) for layer in model.layers if isinstance(layer, keras.layers.Conv2D)] == [
        (32, (3, 3)),
        (64, (3, 3)),
        (128, (3, 3)),
    ]
    convolutions = (27 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    dense = (17 * 17 * 128 + 1) * 256 + 257
    assert model.count_params() == convolutions + dense


def test_cgface_has_five_convolutional_layers():
    convolutions = [layer for layer in build("cgface").layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(convolutions) == 5


def test_the_high_pass_filter_removes_what_is_flat_and_is_never_trained():
    model = build("hpf_cnn", image_size=32)
    layer = model.get_layer("high_pass")
    assert not layer.trainable_variables
    ramp = np.tile(np.arange(32, dtype=np.float32)[None, None, :, None], (1, 32, 1, 3))
    assert np.abs(layer(ramp + 100)).max() < 1e-4
    noise = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    expected = np.einsum(
        "byxcij,ij->byxc", np.lib.stride_tricks.sliding_window_view(noise, (3, 3), axis=(1, 2)), hpf_cnn.HIGH_PASS
    )
    assert np.allclose(layer(noise), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("picture", "classes"), [("chelsea", {285}), ("coffee", {967}), ("rocket", {657})])
def test_the_ported_backbone_names_what_imagenet_would(picture, classes):
    """Egyptian cat, espresso, missile: the classifier is the package's own, behind our backbone and preprocessing."""
    image = Image.fromarray(getattr(skimage.data, picture)())
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    model = build("efficientnet_lite0", image_size=224, weights="imagenet")
    pooled = keras.Model(model.input, model.get_layer("fake_probability").input)
    features = keras.ops.convert_to_numpy(pooled(np.asarray(image, np.float32)[None]))
    tensors = efficientnet_lite0.read_imagenet()
    logits = features @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    assert int(logits.argmax()) in classes


def test_fused_normalisation_is_keras_s_in_training_and_after():
    x = np.random.default_rng(0).normal(3, 2, (8, 4, 4, 5)).astype(np.float32)
    ours, theirs = (kind(epsilon=0.001, momentum=0.9) for kind in (BatchNormalization, keras.layers.BatchNormalization))
    for _ in range(30):
        trained = [keras.ops.convert_to_numpy(layer(x, training=True)) for layer in (ours, theirs)]
    assert np.allclose(*trained, atol=1e-5)
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert np.allclose(one, other, rtol=0.01)  # the kernel's moving variance is the unbiased one: 128 / 127 of it
    theirs.set_weights(ours.get_weights())
    served = [keras.ops.convert_to_numpy(layer(2 * x, training=False)) for layer in (ours, theirs)]
    assert np.allclose(*served, atol=1e-5)
    ours.trainable = False
    before = ours.get_weights()
    assert np.allclose(ours(2 * x, training=True), served[0])
    assert all(np.array_equal(one, other) for one, other in zip(ours.get_weights(), before, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_backbone_s_own_weights_come_back_and_others_are_refused(tmp_path):
    first = efficientnet_lite0.build_backbone(32)
    first.save_weights(tmp_path / "faces.weights.h5")
    model = build("efficientnet_lite0", image_size=32, weights=str(tmp_path / "faces.weights.h5"))
    for ours, theirs in zip(model.get_layer(first.name).get_weights(), first.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)
    with pytest.raises(ModelError, match="which does not fit"):
        build("efficientnet_v2_b0", image_size=32, weights=str(tmp_path / "faces.weights.h5"))
    with pytest.raises(ModelError, match=r"imagenet, none or a .weights.h5 file.*nowhere.h5, which is no such file"):
        build("efficientnet_lite0", image_size=32, weights="nowhere.h5")


@pytest.mark.slow
def test_weights_that_can_t_be_downloaded_are_said_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens on this machine's discard port
    monkeypatch.setattr("keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path))
    with pytest.raises(ModelError, match=r"must be downloaded once, which failed.*set training.weights to none"):
        build("efficientnet_v2_b0", image_size=32, weights="imagenet")


def test_a_head_whose_slope_is_unknown_is_refused():
    layers = [keras.layers.Conv2D(2, 3), keras.layers.Flatten(), keras.layers.Dense(2, "tanh")]
    network = keras.Sequential([keras.Input((8, 8, 3)), *layers, keras.layers.Dense(1, "sigmoid")])
    with pytest.raises(ModelError, match=r"Received: dense\w*, tanh\. Add its slope"):
        ExplainedNetwork(network)


def write_checkpoint(path, content, elements=(), claimed=None):
    buffer = io.BytesIO()
    for part in (LEGACY_MAGIC, 1001, {}):
        pickle.dump(part, buffer, protocol=2)
    buffer.write(content)
    pickle.dump(["0"] if elements else [], buffer, protocol=2)
    if elements:
        buffer.write(struct.pack("<q", claimed or len(elements)) + np.asarray(elements, "<f4").tobytes())
    path.write_bytes(buffer.getvalue())
    return path


def pickled_tensor(shape, strides, offset=0):
    """Pickle {"w": tensor} by hand, protocol 2: names are written, never imported."""
    ints = lambda values: b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"  # noqa: E731
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", offset)
    tensor += ints(shape) + ints(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


def test_a_checkpoint_s_tensors_are_read_in_any_layout(tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", pickled_tensor((2, 3), (1, 2)), range(6))
    assert read_checkpoint(path)["w"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    path = write_checkpoint(tmp_path / "a.pth", pickle.dumps(OrderedDict(w=Hostile()), protocol=2))
    with pytest.raises(ModelError, match=r"it names .*open, which is no tensor"):
        read_checkpoint(path)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((2, 4), (4, 1), 0), ((6,), (1,), 1), ((10**9,), (0,), 0), ((6,), (-1,), 5), ((-1,), (1,), 0)],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, shape, strides, offset):
    path = write_checkpoint(tmp_path / "a.pth", pickled_tensor(shape, strides, offset), range(6))
    with pytest.raises(ModelError, match="lies outside its storage of 6 elements"):
        read_checkpoint(path)


def test_a_storage_that_claims_more_than_the_file_holds_costs_no_memory(tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", pickled_tensor((6,), (1,)), range(6), claimed=2**62)
    with pytest.raises(ModelError, match="goes past the end of the file"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02K\x01."])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ModelError, match="must be a PyTorch state dictionary"):
        read_checkpoint(tmp_path / "a.pth")
