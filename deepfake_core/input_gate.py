"""Whether an image is like those on which a model was calibrated: large, sharp, colourful and lightly compressed.

This file is also copied into every registered model, so it imports nothing of the project.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

LIMIT_SHARE = 0.01
"""Share of the calibration images that lies below each limit."""

JPEG_LUMA_SUM = 3688
"""Of ITU-T T.81 (JPEG), table K.1, which libjpeg scales to a quality."""


@dataclass(frozen=True)
class ImageQuality:
    """What is measured of an image, or of the part of one that is judged; the more, the better.

    Attributes:
        side: the shorter one, in pixels, before it is resized to the network's input.
        sharpness: contrast between neighbouring pixels of the network's input, over all contrast in it: 0 to about 1.
            Blur and scaling up lower it.
        jpeg_quality: 1 to 100, as libjpeg counts, read from the file's quantisation table; None if it is no JPEG.
        saturation: of the network's input, see `measure_saturation`; None if it was not measured.
    """

    side: float
    sharpness: float
    jpeg_quality: float | None = None
    saturation: float | None = None

    @classmethod
    def take(cls, part: Image.Image, pixels: np.ndarray, jpeg_quality: float | None) -> "ImageQuality":
        """Measure a part of an image.

        Args:
            part: before it is resized.
            pixels: the same as the network's input, uint8 of shape (size, size, 3).
        """
        return cls(min(part.size), measure_sharpness(pixels), jpeg_quality, measure_saturation(pixels))


MEASURES = tuple(one.name for one in fields(ImageQuality))

REASONS = {
    "side": "shorter side of {value:.0f} pixels; calibrated on {limit:.0f} and more",
    "sharpness": "blurred or scaled up, sharpness {value:.3f}; calibrated on {limit:.3f} and more",
    "jpeg_quality": "JPEG quality {value:.0f}; calibrated on {limit:.0f} and more",
    "saturation": "grey or nearly so, saturation {value:.3f}; calibrated on {limit:.3f} and more",
}


def measure_sharpness(pixels: np.ndarray) -> float:
    """Return the root mean square of the differences between neighbours, over the standard deviation: 0 to about 1.

    Args:
        pixels: uint8 of shape (height, width, 3).
    """
    grey = pixels.mean(axis=2, dtype=np.float32)
    across, down = np.diff(grey, axis=1), np.diff(grey, axis=0)
    contrast = float(grey.std())
    if not contrast:
        return 0.0
    return float(np.sqrt((np.mean(across**2) + np.mean(down**2)) / 4)) / contrast


def measure_saturation(pixels: np.ndarray) -> float:
    """Return the highest less the lowest of red, green and blue, mean over the pixels: 0 for grey, to 1.

    Args:
        pixels: uint8 of shape (height, width, 3).
    """
    red, green, blue = (pixels[:, :, channel] for channel in range(3))
    highest, lowest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return float((highest - lowest).mean()) / 255


def read_jpeg_quality(image: Image.Image) -> float | None:
    """Return a JPEG's quality, 1 to 100, from its first quantisation table; None if the image has none."""
    tables = getattr(image, "quantization", {})
    return estimate_jpeg_quality(next(iter(tables.values()))) if tables else None


def estimate_jpeg_quality(table: Sequence[int]) -> float | None:
    """Return the quality at which libjpeg would write a table of 64 values, 1 to 100; None if it is none of 8 bits."""
    if max(table) > 255:
        return None
    percent = 100 * sum(table) / JPEG_LUMA_SUM
    return (200 - percent) / 2 if percent <= 100 else 5000 / percent


def fit_limits(qualities: Sequence[ImageQuality]) -> dict[str, float]:
    """Return the limit of each measure, below which 1 in 100 of the images lie; none where no image has the measure."""
    limits = {}
    for name in MEASURES:
        values = sorted(value for one in qualities if (value := getattr(one, name)) is not None)
        if values:
            limits[name] = float(values[int(LIMIT_SHARE * len(values))])
    return limits


def find_reason(quality: ImageQuality, limits: Mapping[str, float]) -> str | None:
    """Return why an image is unlike those that the limits come from; None if it is like them."""
    for name, limit in limits.items():
        value = getattr(quality, name)
        if value is not None and value < limit:
            return REASONS[name].format(value=value, limit=limit)
    return None
