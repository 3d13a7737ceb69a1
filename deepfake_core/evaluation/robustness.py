"""What is left of a detector when images come as the web delivers them: recompressed, scaled, blurred, retouched.

Each change is made to the image as it was found, before it is resized to the detector's input. Large images are scaled
down first.
"""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageFilter

from deepfake_core.data.dataset import Dataset
from deepfake_core.detector import Detector, decode_image, resize_image
from deepfake_core.evaluation.metrics import compute_metrics
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.storage.progress import Progress

IMAGES_AT_ONCE = 32

LONGEST_SIDE = 1024
"""In pixels. Larger images are scaled down to it before they are changed, as web sites do: a change takes up to 80
bytes of memory for each pixel."""


def recompress(image: Image.Image, quality: int, file_format: str = "JPEG") -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=quality)
    return Image.open(buffer).convert("RGB")


def scale_and_back(image: Image.Image, factor: float) -> Image.Image:
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Blur by a Gaussian whose radius is in pixels of an image 256 pixels wide."""
    return image.filter(ImageFilter.GaussianBlur(radius * image.width / 256))


def add_noise(image: Image.Image, deviation: float) -> Image.Image:
    """Add Gaussian noise of a standard deviation in grey levels, the same to an image in each run."""
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(pixels.size).normal(0, deviation, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def enhance(image: Image.Image, factor: float, kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Image.Image:
    """Change an image as Pillow's `ImageEnhance` does; a factor of 1 leaves it as it is."""
    return kind(image).enhance(factor)


def smooth(image: Image.Image, share: float) -> Image.Image:
    """Smooth skin and keep edges, as retouching does: Gastal and Oliveira, "Domain Transform for Edge-Aware Image and
    Video Processing", SIGGRAPH 2011.

    Args:
        share: of the range of colours: pixels that differ by much more are not mixed. In space it is 3 pixels of an
            image 256 pixels wide.
    """
    pixels = np.asarray(image)[:, :, ::-1]
    smoothed = cv2.edgePreservingFilter(pixels, flags=cv2.RECURS_FILTER, sigma_s=3 * image.width / 256, sigma_r=share)
    return Image.fromarray(np.ascontiguousarray(smoothed[:, :, ::-1]))


def sharpen(image: Image.Image, percent: int) -> Image.Image:
    """Add the difference to a blurred image, that many percent of it."""
    return image.filter(ImageFilter.UnsharpMask(radius=2 * image.width / 256, percent=percent, threshold=0))


def crop(image: Image.Image, share: float) -> Image.Image:
    """Cut a share of the side off each edge."""
    left, top = round(image.width * share), round(image.height * share)
    return image.crop((left, top, image.width - left, image.height - top))


def take_screenshot(image: Image.Image, factor: float) -> Image.Image:
    """Show the image at another size and save what the screen shows, without loss, as PNG does."""
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)


CHANGES: dict[str, tuple[Callable[..., Image.Image], Sequence[float]]] = {
    "JPEG quality": (recompress, (90, 70, 50, 30)),
    "WebP quality": (partial(recompress, file_format="WEBP"), (80, 50)),
    "scaled and back": (scale_and_back, (0.5, 0.25)),
    "blur, pixels of 256": (blur, (0.5, 1, 2)),
    "noise, grey levels": (add_noise, (4, 8, 16)),
    "smoothing, share of the range": (smooth, (0.1, 0.3)),
    "sharpening, percent": (sharpen, (75, 150)),
    "brightness": (partial(enhance, kind=ImageEnhance.Brightness), (0.6, 0.8, 1.25, 1.6)),
    "contrast": (partial(enhance, kind=ImageEnhance.Contrast), (0.7, 1.4)),
    "colour": (partial(enhance, kind=ImageEnhance.Color), (0, 0.5, 1.6)),
    "crop, share of the side": (crop, (0.02, 0.05, 0.1)),
    "screenshot, scale": (take_screenshot, (0.7, 1.4)),
}
"""By name: the change, and its strengths."""


def change_image(data: bytes, kinds: Sequence[tuple[str, float]], size: int) -> list[np.ndarray]:
    """Return an image after each of these changes at this strength, resized: uint8 arrays (size, size, 3)."""
    image = decode_image(data)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return [resize_image(CHANGES[name][0](image, strength), size) for name, strength in kinds]


def score_changed(
    detector: Detector, paths: Sequence[str], read: Callable[[str], bytes], on_progress: Progress | None = None
) -> dict[tuple[str, float], np.ndarray]:
    """Score images after each change, at each strength.

    Returns:
        By name of the change and strength: P(fake) per image as float32 of shape (n,).
    """
    kinds = [(name, strength) for name, (_, strengths) in CHANGES.items() for strength in strengths]
    scores = {kind: np.zeros(len(paths), np.float32) for kind in kinds}

    def change(path: str) -> list[np.ndarray]:
        return change_image(read(path), kinds, detector.image_size)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), IMAGES_AT_ONCE):
            changed = list(pool.map(change, paths[start : start + IMAGES_AT_ONCE]))
            for position, kind in enumerate(kinds):
                pixels = np.stack([images[position] for images in changed])
                scores[kind][start : start + len(changed)] = detector.score(pixels)
            if on_progress:
                on_progress(start + len(changed), len(paths))
    return scores


def measure_robustness(
    folder: Path, dataset: Dataset, measured: Measured, max_images: int, on_progress: Progress | None = None
) -> pd.DataFrame:
    """Measure what changes of the test images cost.

    Args:
        max_images: how many images are drawn from the test split, at most.

    Returns:
        One row per change and strength: `change`, `strength`, `images`, `auc`, `auc_lost` against the same images
        unchanged, `false_alarm_rate`, `false_alarms_added` to those of the same images unchanged, `recall`,
        `precision`.
    """
    measures = ["auc", "false_alarm_rate", "recall", "precision"]
    columns = ["change", "strength", "images", "auc", "auc_lost", "false_alarm_rate", "false_alarms_added"]
    columns += measures[2:]
    chosen = np.sort(np.random.default_rng(0).permutation(len(measured.images))[:max_images])
    labels, rows = measured.images.labels[chosen], measured.images.rows.iloc[chosen]
    if len(np.unique(labels)) < 2:
        return pd.DataFrame(columns=columns)
    changed = score_changed(Detector(folder), rows["path"].tolist(), dataset.read, on_progress)

    def measure(scores: np.ndarray) -> dict[str, float]:
        metrics = compute_metrics(labels, scores, measured.threshold)
        return {name: metrics[name] for name in measures}

    clean = measure(measured.scores[chosen])
    table = pd.DataFrame(
        [
            {"change": change, "strength": strength, "images": len(labels), **measure(scores)}
            for (change, strength), scores in changed.items()
        ]
    )
    added = table["false_alarm_rate"] - clean["false_alarm_rate"]
    return table.assign(auc_lost=clean["auc"] - table["auc"], false_alarms_added=added)[columns]
