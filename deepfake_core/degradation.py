"""What happens to images on their way through the web: scaled down, blurred, recompressed.

A detector that saw fakes only as their generator wrote them lives on traces that the first upload removes.
"""

import numpy as np
import simplejpeg
from PIL import Image, ImageFilter

from deepfake_core.config import AugmentationParameters

SCALE = (0.5, 1.0)
BLUR_PIXELS = (0.3, 1.5)
JPEG_QUALITY = (40, 95)


def degrade_image(image: np.ndarray, shares: AugmentationParameters, random: np.random.Generator) -> np.ndarray:
    """Scale, blur and recompress an image, each with its own chance, in this order.

    Args:
        image: uint8 array of shape (size, size, 3).
        shares: `resize`, `blur` and `recompression` are the chances; the other changes are the accelerator's work.

    Returns:
        uint8 array of the same shape.
    """
    size = image.shape[0]
    if random.random() < shares.resize:
        side = round(size * random.uniform(*SCALE))
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        image = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    if random.random() < shares.blur:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_PIXELS))))
    if random.random() < shares.recompression:
        quality = int(random.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420")
        image = simplejpeg.decode_jpeg(data)
    return image
