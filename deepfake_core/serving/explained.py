"""Pictures that explain verdicts, drawn with Pillow alone: the base install has no matplotlib."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepfake_core.config import CLASS_COLOURS
from deepfake_core.serving.faces import Box

MAX_SIDE_PIXELS = 800
LINE_PIXELS = 22
CHARACTER_PIXELS = 8
MIN_WIDTH_PIXELS = 480
INFERNO = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
"""Colours of matplotlib's map of the name, at equal distances."""


def shrink(image: Image.Image) -> Image.Image:
    """Return an image of at most `MAX_SIDE_PIXELS` pixels a side."""
    scale = MAX_SIDE_PIXELS / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size]) if scale < 1 else image


def draw_heat(
    image: Image.Image, boxes: Sequence[Box], maps: Sequence[np.ndarray], fakes: Sequence[bool], lines: Sequence[str]
) -> Image.Image:
    """Draw the heat map of each verdict over an image, and the verdicts below it.

    Args:
        boxes: what was judged, in the image's pixels.
        maps: per box, float array of shape (height, width), 0 to 1.
        fakes: per box, whether the verdict is fake.
        lines: of text; long ones are broken.

    Returns:
        RGB image.
    """
    width, height = image.size
    most = max(width, MIN_WIDTH_PIXELS) // CHARACTER_PIXELS
    lines = [part for line in lines for part in textwrap.wrap(line, most, subsequent_indent="    ")]
    page = Image.new("RGB", (max(width, MIN_WIDTH_PIXELS), height + LINE_PIXELS * len(lines) + 8), "white")
    page.paste(image)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(LINE_PIXELS * 0.7)
    for number, (box, heat, fake) in enumerate(zip(boxes, maps, fakes, strict=True), 1):
        left, top = round(box.left), round(box.top)
        right, bottom = max(left + 1, round(box.right)), max(top + 1, round(box.bottom))
        smooth = Image.fromarray(heat.astype(np.float32)).resize((right - left, bottom - top))
        hot = Image.blend(page.crop((left, top, right, bottom)), colour_heat(np.asarray(smooth)), 0.5)
        page.paste(hot, (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=CLASS_COLOURS["fake" if fake else "real"], width=3)
        if len(boxes) > 1:
            draw.text((left + 6, top + 4), str(number), fill="white", font=font)
    for number, line in enumerate(lines):
        draw.text((6, height + 4 + LINE_PIXELS * number), line, fill="black", font=font)
    return page


def colour_heat(heat: np.ndarray) -> Image.Image:
    """Return a float array of shape (height, width), 0 to 1, as an RGB image: black to yellow."""
    place = np.clip(heat, 0, 1) * (len(INFERNO) - 1)
    lower = np.minimum(place.astype(int), len(INFERNO) - 2)
    share = (place - lower)[..., None]
    return Image.fromarray((INFERNO[lower] * (1 - share) + INFERNO[lower + 1] * share).round().astype(np.uint8))
