"""Traces: what a camera, a forger and a generator leave in a drawn face.

In the ciplab-like archive, parts of another photograph are pasted in, with a seam and with another scale, noise and
tone. In the 140k-like archive, every fake went through uneven upsampling, which leaves a periodic grid, and has a cold
tone and next to no sensor noise. All traces are exaggerated, so that a small network learns them in about ten epochs.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from deepfake_core.demo.faces import Array, Pose, Random, draw_face, to_image

PHOTOGRAPH_SIZE, PORTRAIT_SIZE = 256, 160
SENSOR_NOISE = (1.5, 4.0)
UNEVENNESS = (0.02, 0.07)
COLD = np.array((-1, 0, 1))
"""Less red and more blue: the tone of all fakes, since a small network learns grid and seams too slowly."""

GENERATOR_TONE = (0.09, 0.2)
DIFFICULTIES = {"easy": (4, 0.36, 0.015), "mid": (3, 0.3, 0.025), "hard": (2, 0.22, 0.035)}
"""Parts replaced at most, how cold their tone is, and how wide their seam is blended."""

PARTS = (
    ((-0.24, -0.12), (0.2, 0.17)),
    ((0.24, -0.12), (0.2, 0.17)),
    ((0.0, 0.13), (0.17, 0.2)),
    ((0.0, 0.42), (0.3, 0.17)),
)
"""Centre and half extents, in face coordinates, of left eye, right eye, nose, mouth: a name's four bits."""


def take_photograph(random: Random, pose: "Pose", size: int) -> Image.Image:
    """Draw one person as a camera sees them."""
    return add_noise(draw_face(random, pose, size), random, random.uniform(*SENSOR_NOISE))


def add_noise(image: Image.Image, random: Random, strength: float) -> Image.Image:
    """Add a sensor's noise, which grows with the light; `strength` is its deviation at 255."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = random.standard_normal(pixels.shape, dtype=np.float32)
    return to_image(pixels + strength * noise * (0.5 + 0.5 * np.sqrt(pixels / 255)))


def splice_face(random: Random, difficulty: str, bits: str) -> Image.Image:
    """Draw a photograph with parts of another pasted in: those whose bit is 1, in the order of `PARTS`."""
    pose = Pose.draw(random)
    image = take_photograph(random, pose, PHOTOGRAPH_SIZE)
    _, tone, blend = DIFFICULTIES[difficulty]
    donor = add_noise(draw_face(random, pose, PHOTOGRAPH_SIZE // 2), random, random.uniform(5, 12))
    radius = blend * PHOTOGRAPH_SIZE / 2
    for (centre, extents), bit in zip(PARTS, bits, strict=True):
        if bit == "0":
            continue
        middle = pose.place(np.array([centre]), PHOTOGRAPH_SIZE)[0]
        reach = np.array(extents) * pose.scale * PHOTOGRAPH_SIZE / 2
        left, top, right, bottom = np.rint([*(middle - reach), *(middle + reach)]).astype(int).tolist()
        target = image.crop((left, top, right, bottom))
        closer = reach / (1 + random.choice((-1, 1)) * random.uniform(0.08, 0.2))
        box = (*((middle - closer) / 2).tolist(), *((middle + closer) / 2).tolist())
        part = np.asarray(donor.resize(target.size, Image.Resampling.BICUBIC, box))
        match = np.asarray(target).mean((0, 1)) / part.mean((0, 1))
        match *= 1 + COLD * tone * random.uniform(0.6, 1.4) + random.normal(0, 0.06)
        mask = Image.new("L", target.size)
        ImageDraw.Draw(mask).ellipse((radius, radius, target.width - radius, target.height - radius), fill=255)
        image.paste(to_image(part * match), (left, top), mask.filter(ImageFilter.GaussianBlur(radius / 1.5)))
    return image


def generate_face(random: Random, pose: "Pose", size: int) -> Image.Image:
    """Draw one person as a generator does: small, then doubled twice with detail added each time."""
    face = draw_face(random, pose, size)
    small, half, full = (np.asarray(face.reduce(factor), dtype=np.float32) for factor in (4, 2, 1))
    even = np.array((0.5, 1, 0.5))
    uneven = even + random.uniform(*UNEVENNESS) * np.array((-0.5, 1, -0.5))
    output: Array = small
    for coarse, fine in ((small, half), (half, full)):
        output = upsample(output, uneven) + fine - upsample(coarse, even)
    output = output * (1 + COLD * random.uniform(*GENERATOR_TONE))
    return add_noise(to_image(output), random, random.uniform(0, 2))


def upsample(pixels: Array, kernel: Array) -> Array:
    """Double both sides by a transposed convolution: stride 2, three taps each way, wrapped at the edges.

    Where the outer taps don't add up to the middle one, it leaves a grid of period 2; doubled again,
    of period 4. See https://distill.pub/2016/deconv-checkerboard/.
    """
    for _ in range(2):  # rows, then columns
        between = kernel[0] * pixels + kernel[2] * np.roll(pixels, -1, axis=0)
        pixels = np.stack([kernel[1] * pixels, between], axis=1).reshape(-1, *pixels.shape[1:]).swapaxes(0, 1)
    return pixels
