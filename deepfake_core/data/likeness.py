"""The second look: whether two thumbnails show one photograph, and whether they are the same picture.

Hashes of different people in the same pose can be as near as those of a photograph and its edit. The pixels tell them
apart: an edit leaves most of the photograph as it was, while of two people no part agrees in its details.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from deepfake_core.data.hashes import THUMBNAIL_SIZE

WINDOW, STRIDE = 8, 4
MIN_WINDOW_CORRELATION = 0.94
"""Least correlation of two windows that show the same details."""

REGISTRATION_STEPS = 4
MAX_SHIFT_PIXELS, MAX_SCALE_CHANGE = 4.0, 0.15
"""How far a picture may be shifted (pixels of the thumbnail), and by how much it may be larger or smaller."""

NOISE_VARIANCE = 8.0
"""Variance (grey levels squared) below which a window has no details that could agree."""

PAIRS_AT_ONCE = 256
PLACES = np.arange(THUMBNAIL_SIZE, dtype=np.float32) - (THUMBNAIL_SIZE - 1) / 2


def measure_pairs(
    thumbnails: np.ndarray, first: np.ndarray, second: np.ndarray, mirrored: np.ndarray, threads: int | None = None
) -> np.ndarray:
    """Look at pairs of pictures, in so many threads, or one for each core.

    Args:
        thumbnails: uint8 of shape (n, 32, 32).
        first, second: positions of the pairs' pictures, int of shape (m,).
        mirrored: whether to mirror the second one first, bool of shape (m,).

    Returns:
        float32 of shape (2, m): `measure_likeness` and `measure_difference` of each pair.
    """
    if not len(first):
        return np.empty((2, 0), np.float32)

    def measure(start: int) -> np.ndarray:
        part = slice(start, start + PAIRS_AT_ONCE)
        one, other = (thumbnails[each[part]].astype(np.float32) for each in (first, second))
        other = np.where(mirrored[part, None, None], other[:, :, ::-1], other)
        return np.stack([measure_likeness(one, other), measure_difference(one, other)])

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(measure, range(0, len(first), PAIRS_AT_ONCE))), axis=1)


def measure_likeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of windows that show the same details, once the second picture is laid over the first.

    On 2,400 aligned faces, pairs of which one is an edit or a crop of the other had at least 0.63, others at most 0.33.
    Of 22 such pairs in another sample, one had 0.53.

    Args:
        first, second: float32 of shape (n, 32, 32), grey levels 0 to 255.

    Returns:
        float32 of shape (n,), 0 to 1.
    """
    second = _warp(second, _register(first, second))
    one, other = (
        sliding_window_view(each, (WINDOW, WINDOW), (1, 2))[:, ::STRIDE, ::STRIDE] for each in (first, second)
    )
    one, other = (each - each.mean((-1, -2), keepdims=True) for each in (one, other))
    variances = (one * one).mean((-1, -2)) * (other * other).mean((-1, -2))
    correlations = ((one * other).mean((-1, -2)) + NOISE_VARIANCE) / (np.sqrt(variances) + NOISE_VARIANCE)
    return (correlations > MIN_WINDOW_CORRELATION).mean((1, 2), dtype=np.float32)


def measure_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the difference of two pictures where they differ most: the largest RMS over 4 x 4 pixels, in grey levels.

    Brightness and contrast are made equal first; shifts and crops are not undone. Resizing to a quarter, blurring and
    recompressing at quality 30 leave at most 8; of 2,400 faces, the nearest edits and latent neighbours differ by 22.

    Args:
        first, second: float32 of shape (n, 32, 32), grey levels 0 to 255.

    Returns:
        float32 of shape (n,).
    """
    first, second = (each - each.mean((1, 2), keepdims=True) for each in (first, second))
    contrast = (first * second).sum((1, 2)) / np.maximum((second * second).sum((1, 2)), 1)
    remainder = first - contrast[:, None, None] * second
    blocks = (remainder**2).reshape(len(first), THUMBNAIL_SIZE // 4, 4, THUMBNAIL_SIZE // 4, 4)
    return np.sqrt(blocks.mean((2, 4)).max((1, 2)))


def _register(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Find the shift and scale that lay the second picture over the first, by Gauss-Newton steps.

    After the inverse compositional form of Baker and Matthews, "Lucas-Kanade 20 Years On", IJCV 2004, section 3.2.

    Returns:
        float32 of shape (n, 3): shifts to the right and down in pixels, and relative change of scale.
    """
    first, second = _equalise(first), _equalise(second)
    down, right = np.gradient(first, axis=(1, 2))
    steepest = np.stack([right, down, right * PLACES + down * PLACES[:, None]], -1)
    steepest[:, [0, 1, -2, -1]] = steepest[:, :, [0, 1, -2, -1]] = 0
    steepest = steepest.reshape(len(first), -1, 3)
    curvature = steepest.transpose(0, 2, 1) @ steepest + 1e-3 * np.eye(3, dtype=np.float32)
    warps = np.zeros((len(first), 3), np.float32)
    for _ in range(REGISTRATION_STEPS):
        error = (_equalise(_warp(second, warps)) - first).reshape(len(first), -1, 1)
        warps -= np.linalg.solve(curvature, steepest.transpose(0, 2, 1) @ error)[:, :, 0]
        np.clip(warps[:, :2], -MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS, out=warps[:, :2])
        np.clip(warps[:, 2], -MAX_SCALE_CHANGE, MAX_SCALE_CHANGE, out=warps[:, 2])
    return warps


def _equalise(pictures: np.ndarray) -> np.ndarray:
    pictures = pictures - pictures.mean((1, 2), keepdims=True)
    return pictures / np.maximum(np.sqrt((pictures**2).mean((1, 2), keepdims=True)), 1)


def _warp(pictures: np.ndarray, warps: np.ndarray) -> np.ndarray:
    """Sample pictures at shifted and scaled places, linearly interpolated; the edge is repeated outside."""
    centre = (THUMBNAIL_SIZE - 1) / 2
    scaled = (1 + warps[:, 2, None]) * PLACES
    columns, rows = (
        np.clip(scaled + warps[:, axis, None] + centre, 0, THUMBNAIL_SIZE - 1)[:, :, None] for axis in (0, 1)
    )
    columns, rows = (
        np.maximum(0, 1 - np.abs(each - np.arange(THUMBNAIL_SIZE, dtype=np.float32))) for each in (columns, rows)
    )
    return rows @ pictures @ columns.transpose(0, 2, 1)
