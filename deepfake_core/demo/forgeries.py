"""Three small archives of drawn faces, so that the whole pipeline runs without credentials.

Every image is drawn by this file; nobody is in them. The fakes imitate traces that real ones carry.
In the ciplab-like archive, parts of another photograph are pasted in, with a seam and with other
scale, noise and tone. In the 140k-like archive, every fake went through uneven upsampling, which
leaves a periodic grid, and has a cold tone and next to no sensor noise. All traces are exaggerated, so
that a small network learns them in about ten epochs: figures measured on these images say nothing about
real faces.
"""

import csv
import io
import json
import logging
import string
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from deepfake_core.config import CLASS_NAMES, KAGGLE_SOURCES, Source
from deepfake_core.files import write_beside, write_json

log = logging.getLogger(__name__)

DRAWING_FORMAT = 2
"""Part of what `sample.json` remembers: raise it when the same arguments would draw other archives."""

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

SKINS = ((247, 216, 194), (236, 194, 164), (214, 163, 128), (176, 122, 86), (128, 83, 58), (88, 58, 44))
HAIRS = (
    (28, 24, 24), (52, 36, 28), (92, 60, 38), (140, 96, 56), (196, 158, 100), (120, 50, 30), (150, 148, 146)
)  # fmt: skip
IRISES = ((70, 44, 28), (98, 64, 36), (76, 110, 140), (88, 112, 78), (96, 106, 112))
SAVED_PAGE = b"<html><title>429 Too Many Requests</title></html>\n"

Array = np.ndarray
Random = np.random.Generator


class Picture(NamedTuple):
    """An encoded picture and its place in an archive."""

    label: str
    name: str
    data: bytes
    split: str = ""


def draw_archives(folder: Path, per_class: int = 120, seed: int = 0) -> tuple[Source, ...]:
    """Draw three small archives in the layouts of the three Kaggle data sets.

    The same arguments give the same bytes; archives that are there already are not drawn again.

    Args:
        folder: receives three zips, named as Kaggle names them, and `sample.json`, which remembers
            the arguments.
        per_class: pictures of each class, in the first and in the third archive (the second repeats
            the first). Eight files that the pipeline must leave out come on top: `_draw_odd_portraits`.
        seed: another seed draws other faces.

    Returns:
        The archives as local sources, with the label rules of `KAGGLE_SOURCES`.
    """
    if per_class < 1 or seed < 0:
        raise ValueError(f"`per_class` must be at least 1, `seed` at least 0. Received: {per_class}, {seed}")
    folder = folder.absolute()
    paths = [folder / f"{source.short_name}.zip" for source in KAGGLE_SOURCES]
    sources = tuple(
        Source.model_validate(source.model_dump() | {"name": str(path), "version": None, "drawn": True})
        for source, path in zip(KAGGLE_SOURCES, paths, strict=True)
    )
    arguments = {"format": DRAWING_FORMAT, "per_class": per_class, "seed": seed}
    memory = folder / "sample.json"
    if all(path.exists() for path in (*paths, memory)) and json.loads(memory.read_text()) == arguments:
        log.info("the sample's archives are in %s already, nothing to draw", folder)
        return sources
    memory.unlink(missing_ok=True)  # not true again until all three are there
    photographs = _draw_photographs(per_class, seed)
    portraits = _draw_portraits(per_class, seed)
    portraits += _draw_odd_portraits(portraits, per_class, seed)
    layouts = (_lay_out_ciplab(photographs), _lay_out_reupload(photographs), _lay_out_140k(portraits))
    for path, members in zip(paths, layouts, strict=True):
        with write_beside(path) as beside:
            beside.write_bytes(_pack(members))
        log.info("%s: %d files, %.1f MB", path.name, len(members), path.stat().st_size / 1e6)
    write_json(memory, arguments)
    return sources


# Archives: pictures, their names and folders


def _lay_out_ciplab(photographs: Sequence[Picture]) -> dict[str, bytes]:
    tops = ("real_and_fake_face", "real_and_fake_face_detection/real_and_fake_face")  # the same twice, as served
    return {f"{top}/training_{each.label}/{each.name}": each.data for top in tops for each in photographs}


def _lay_out_reupload(photographs: Sequence[Picture]) -> dict[str, bytes]:
    return {f"{each.label}/{each.name}": each.data for each in photographs}


def _lay_out_140k(portraits: Sequence[Picture]) -> dict[str, bytes]:
    """Name the files and write the csv files, where 1 means real."""
    members = {}
    for split in ("train", "valid", "test"):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", "original_path", "id", "label", "label_str", "path"])
        for row, each in enumerate(each for each in portraits if each.split == split):
            path = f"{split}/{each.label}/{each.name}"
            members[f"real_vs_fake/real-vs-fake/{path}"] = each.data
            identity, is_real = each.name.removesuffix(".jpg"), int(each.label == "real")
            writer.writerow([row, each.name, identity, is_real, each.label, path])
        members[f"{split}.csv"] = text.getvalue().encode()
    return members


def _draw_photographs(per_class: int, seed: int) -> list[Picture]:
    photographs = []
    for number in range(1, per_class + 1):
        random = _seed_random(seed, "spliced", number)
        difficulty = ("mid", "easy", "mid", "hard")[number % 4]
        bits = _draw_bits(random, difficulty)
        data = _encode(splice_face(random, difficulty, bits), quality=92, progressive=True)
        photographs.append(Picture("fake", f"{difficulty}_{number}_{bits}.jpg", data))
    for number in range(1, per_class + 1):
        random = _seed_random(seed, "photograph", number)
        image = take_photograph(random, Pose.draw(random), PHOTOGRAPH_SIZE)
        data = _encode(image, quality=92, progressive=True)
        photographs.append(Picture("real", f"real_{number:05d}.jpg", data))
    return photographs


def _draw_bits(random: Random, difficulty: str) -> str:
    most = DIFFICULTIES[difficulty][0]
    bits = ["1"] * int(random.integers(most - 1, most + 1)) + ["0"] * 4
    return "".join(random.permutation(bits[:4]))


def _draw_portraits(per_class: int, seed: int) -> list[Picture]:
    """Draw the 140k-like pictures: five in seven train, one valid, one test, as in the original."""
    splits = ("train", "train", "train", "train", "train", "valid", "test")
    return [
        _draw_portrait(label, number, seed, splits[number % 7]) for label in CLASS_NAMES for number in range(per_class)
    ]


def _draw_odd_portraits(portraits: Sequence[Picture], per_class: int, seed: int) -> list[Picture]:
    """Draw what the pipeline must leave out; the reason it gives follows each.

    Training images that come again in test, with other bytes (`copy`), one picture under both
    labels (`label_conflict`), half a JPEG (`truncated`), a saved web page (`not_an_image`).
    """
    odd: list[Picture] = []
    for label in CLASS_NAMES:
        for original in [each for each in portraits if each.label == label][:2]:
            name = _name_portrait(label, per_class + len(odd), seed)
            comment = b"\xff\xfe\x00\x08copied"  # a JPEG segment that says nothing about pixels
            odd.append(Picture(label, name, original.data[:2] + comment + original.data[2:], "test"))
    number = per_class + len(odd)
    disputed = _draw_portrait("real", number, seed, "train")
    odd += [disputed, disputed._replace(label="fake", name=_name_portrait("fake", number, seed))]
    whole = _draw_portrait("real", number + 1, seed, "train")
    odd += [whole._replace(data=whole.data[: len(whole.data) // 2])]
    odd += [Picture("fake", _name_portrait("fake", number + 1, seed), SAVED_PAGE, "valid")]
    return odd


def _draw_portrait(label: str, number: int, seed: int, split: str) -> Picture:
    random = _seed_random(seed, label, number)
    pose = Pose.draw(random)
    draw = take_photograph if label == "real" else generate_face
    data = _encode(draw(random, pose, PORTRAIT_SIZE), quality=75)
    return Picture(label, _name_portrait(label, number, seed), data, split)


def _name_portrait(label: str, number: int, seed: int) -> str:
    if label == "real":
        return f"{number:05d}.jpg"
    letters = list(string.ascii_uppercase + string.digits)
    return "".join(_seed_random(seed, "name", number).choice(letters, 10)) + ".jpg"


def _seed_random(seed: int, kind: str, number: int) -> Random:
    """Give every picture random numbers of its own, so that more pictures leave the first ones as they were."""
    return np.random.default_rng((seed, number, *kind.encode()))


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _pack(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


# Traces: what a camera, a forger and a generator leave


def take_photograph(random: Random, pose: "Pose", size: int) -> Image.Image:
    """Draw one person as a camera sees them."""
    return add_noise(draw_face(random, pose, size), random, random.uniform(*SENSOR_NOISE))


def add_noise(image: Image.Image, random: Random, strength: float) -> Image.Image:
    """Add a sensor's noise, which grows with the light; `strength` is its deviation at 255."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = random.standard_normal(pixels.shape, dtype=np.float32)
    return _to_image(pixels + strength * noise * (0.5 + 0.5 * np.sqrt(pixels / 255)))


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
        image.paste(_to_image(part * match), (left, top), mask.filter(ImageFilter.GaussianBlur(radius / 1.5)))
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
    return add_noise(_to_image(output), random, random.uniform(0, 2))


def upsample(pixels: Array, kernel: Array) -> Array:
    """Double both sides by a transposed convolution: stride 2, three taps each way, wrapped at the edges.

    Where the outer taps don't add up to the middle one, it leaves a grid of period 2; doubled again,
    of period 4. See https://distill.pub/2016/deconv-checkerboard/.
    """
    for _ in range(2):  # rows, then columns
        between = kernel[0] * pixels + kernel[2] * np.roll(pixels, -1, axis=0)
        pixels = np.stack([kernel[1] * pixels, between], axis=1).reshape(-1, *pixels.shape[1:]).swapaxes(0, 1)
    return pixels


# Faces: coordinates run from -1 to 1, x to the right, y down, the head around (0, 0)


@dataclass(frozen=True)
class Pose:
    """How a head is held: angle in radians; `turn` moves features sideways, `x` and `y` all of it."""

    angle: float
    scale: float
    x: float
    y: float
    turn: float

    @classmethod
    def draw(cls, random: Random) -> "Pose":
        lowest, highest = (-0.14, 0.92, -0.06, -0.02, -0.05), (0.14, 1.12, 0.06, 0.08, 0.05)
        return cls(*random.uniform(lowest, highest).tolist())

    def place(self, points: Array, side: int) -> Array:
        """Turn face coordinates of shape (n, 2) into pixels."""
        cos, sin = self.scale * np.cos(self.angle), self.scale * np.sin(self.angle)
        return (points @ np.array([[cos, sin], [-sin, cos]]) + (self.x, self.y) + 1) * side / 2


class Canvas:
    """A square picture to draw on in face coordinates; widths and blurs are in their unit too."""

    def __init__(self, image: Image.Image, pose: Pose) -> None:
        self.image, self.pose = image, pose
        self._draw = ImageDraw.Draw(image)

    def fill(self, points: Array, colour: Array, blur: float = 0.0, opacity: float = 1.0) -> None:
        placed = self.pose.place(points, self.image.width)
        if not blur:
            self._draw.polygon(placed.ravel().tolist(), fill=_mix_ink(colour))
            return
        radius = blur * self.image.width / 2
        corner = np.floor(placed.min(axis=0) - 3 * radius).astype(int)
        width, height = (np.ceil(placed.max(axis=0) + 3 * radius).astype(int) - corner).tolist()
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).polygon((placed - corner).ravel().tolist(), fill=round(255 * opacity))
        mask = mask.filter(ImageFilter.BoxBlur(radius)).filter(ImageFilter.BoxBlur(radius))
        self.image.paste(_mix_ink(colour), (int(corner[0]), int(corner[1])), mask)

    def stroke(self, points: Array, colour: Array, width: float) -> None:
        placed = self.pose.place(points, self.image.width)
        pixels = max(1, round(width * self.image.width / 2))
        self._draw.line(placed.ravel().tolist(), fill=_mix_ink(colour), width=pixels, joint="curve")


def draw_face(random: Random, pose: Pose, size: int) -> Image.Image:
    """Draw one person without noise, at twice the size for smooth edges."""
    canvas = Canvas(_draw_background(random, 2 * size), pose)
    skin, hair = _pick_colour(random, SKINS, 8), _pick_colour(random, HAIRS, 4)
    head, long_hair = random.uniform(0.5, 0.58), random.random() < 0.45
    if long_hair:
        _draw_long_hair(canvas, random, hair, head)
    _draw_body(canvas, random, skin)
    _draw_head(canvas, random, skin, head)
    _draw_eyes(canvas, random, skin, hair)
    _draw_nose(canvas, random, skin)
    _draw_mouth(canvas, random, skin)
    if long_hair or random.random() < 0.85:
        _draw_fringe(canvas, random, hair, head)
    return _light(canvas.image.reduce(2).filter(ImageFilter.GaussianBlur(0.5)), random)


def _draw_background(random: Random, side: int) -> Image.Image:
    rows, columns = random.integers(2, 7, 2)
    blobs = random.uniform(60, 190) + random.normal(0, 10, 3) + random.normal(0, 30, (rows, columns, 1))
    return _to_image(blobs + random.normal(0, 9, blobs.shape)).resize((side, side), Image.Resampling.BICUBIC)


def _draw_long_hair(canvas: Canvas, random: Random, hair: Array, head: float) -> None:
    wide, long, down = head * random.uniform(1.2, 1.5), random.uniform(1.4, 1.9), np.linspace(0, 1, 48)
    for side in (-1, 1):
        edge = np.stack([side * wide * np.sin(down * 2.2 + 0.12) ** 0.4, long * down - 0.76], axis=1)
        edge += random.normal(0, 0.008, edge.shape)
        canvas.fill(np.concatenate([edge, edge[::-1] * (0.05, 1)]), hair * 0.8)
        for share in random.uniform(0.4, 1.03, 50):
            canvas.stroke(edge[random.integers(0, 20) :] * (share, 1), hair * random.uniform(0.7, 0.9), 0.008)


def _draw_body(canvas: Canvas, random: Random, skin: Array) -> None:
    neck = random.uniform(0.22, 0.3)
    canvas.fill(_arc(0, 1.5, random.uniform(0.85, 1.1), 0.62), random.uniform(20, 220, 3))
    throat = [[-neck, 0.4], [neck, 0.4], [neck * 1.1, 1.0], [0, 1.12], [-neck * 1.1, 1.0]]
    canvas.fill(np.array(throat), skin * 0.86)
    canvas.fill(_arc(0, 0.72, neck * 1.1, 0.16), skin * 0.55, 0.05, 0.6)


def _draw_head(canvas: Canvas, random: Random, skin: Array, head: float) -> None:
    jaw, lit = random.uniform(0.12, 0.34), random.choice((-1, 1))
    for side in (-1, 1):
        canvas.fill(_arc(side * head, 0.02, 0.06, 0.14), skin * 0.85)
    outline = _arc(0, 0, 1, random.uniform(0.68, 0.74))
    outline[:, 0] = head * np.sign(outline[:, 0]) * np.abs(outline[:, 0]) ** 0.85
    outline[:, 0] *= 1 - jaw * np.clip(outline[:, 1] / 0.7, 0, 1) ** 1.5
    canvas.fill(outline, skin)
    canvas.fill(_arc(-lit * head * 0.7, 0, 0.1, 0.4), skin * 0.62, 0.08, 0.5)
    for x, y, width, height in ((lit * head * 0.45, 0.16, 0.14, 0.14), (lit * 0.05, -0.4, 0.24, 0.12)):
        canvas.fill(_arc(x, y, width, height), skin * 1.12 + 8, 0.075, 0.5)
    for side in (-1, 1):
        cheek, socket = random.uniform(0.2, 0.6), random.uniform(0.3, 0.6)
        canvas.fill(_arc(side * 0.3, 0.22, 0.11, 0.08), skin * (1.02, 0.8, 0.8), 0.06, cheek)
        canvas.fill(_arc(side * 0.235, -0.12, 0.13, 0.085), skin * 0.62, 0.05, socket)


def _draw_eyes(canvas: Canvas, random: Random, skin: Array, hair: Array) -> None:
    apart, y = random.uniform(0.22, 0.26), random.uniform(-0.13, -0.07)
    wide, tall, gaze = random.uniform(0.1, 0.125), random.uniform(0.038, 0.06), random.uniform(-0.02, 0.02)
    iris, white = _pick_colour(random, IRISES, 8), np.array((236, 230, 226)) * (0.75 + skin.mean() / 800)
    arch, thick = random.uniform(0.05, 0.09), random.uniform(0.018, 0.035)
    taper = np.outer(np.sin(np.linspace(0.5, 3, 48)), (0, thick))
    for x in (canvas.pose.turn - apart, canvas.pose.turn + apart):
        upper, lower = _arc(x, y, wide, tall, 180, 360), _arc(x, y, wide, tall * 0.75, 0, 180)
        canvas.fill(np.concatenate([upper, lower]), white)
        for colour, radius in ((iris * 0.5, 0.055), (iris, 0.047), (iris * 1.3, 0.033), (iris * 0.15, 0.025)):
            disc = _arc(x + gaze, y - 0.004, radius, radius)
            highest = np.interp(disc[:, 0], upper[:, 0], upper[:, 1])
            lowest = np.interp(disc[:, 0], lower[::-1, 0], lower[::-1, 1])
            disc[:, 1] = np.clip(disc[:, 1], highest, lowest)
            canvas.fill(disc, colour)
        canvas.fill(_arc(x + gaze + 0.018, y - 0.022, 0.011, 0.011), white * 1.2)
        canvas.fill(np.concatenate([upper, upper[::-1] + np.array((0, 0.02))]), skin * 0.3, 0.006, 0.6)
        canvas.stroke(upper, np.minimum(hair, skin) * 0.35, 0.016)
        canvas.stroke(lower[6:-6], skin * 0.6, 0.006)
        canvas.stroke(_arc(x, y - 0.012, wide * 1.05, tall * 1.5, 200, 340), skin * 0.68, 0.007)
        brow = _arc(x, y - 0.08, wide * 1.3, arch, 195, 345)
        canvas.fill(np.concatenate([brow - taper, (brow + taper)[::-1]]), hair * 0.75, 0.006, 0.85)


def _draw_nose(canvas: Canvas, random: Random, skin: Array) -> None:
    tip, wide, x = random.uniform(0.15, 0.22), random.uniform(0.075, 0.11), canvas.pose.turn * 1.6
    lit = random.choice((-1, 1))
    bridge = np.array([[x * 0.5, -0.12], [x + lit * 0.07, tip - 0.02], [x + lit * 0.01, tip]])
    canvas.fill(bridge, skin * 0.7, 0.025, 0.6)
    canvas.fill(_arc(x - lit * 0.012, tip - 0.14, 0.02, 0.13), skin * 1.15 + 10, 0.02, 0.5)
    canvas.fill(_arc(x, tip - 0.02, wide * 0.55, 0.045), skin * 1.1 + 6, 0.02, 0.6)
    canvas.fill(_arc(x, tip + 0.045, wide * 0.9, 0.025), skin * 0.55, 0.02, 0.6)
    for side in (-wide, wide):
        canvas.fill(_arc(x + side * 0.5, tip + 0.025, wide * 0.28, 0.014), skin * 0.3, 0.005, 0.9)
        canvas.fill(_arc(x + side, tip, 0.012, 0.035), skin * 0.6, 0.01, 0.7)


def _draw_mouth(canvas: Canvas, random: Random, skin: Array) -> None:
    wide, y, x = random.uniform(0.15, 0.22), random.uniform(0.38, 0.44), canvas.pose.turn
    smile, full, gap = random.uniform(-0.01, 0.05), random.uniform(0.03, 0.055), random.uniform(-0.05, 0.035)
    lip = skin * 0.55 + np.array((170, 62, 70)) * random.uniform(0.25, 0.5)
    across = np.linspace(-1, 1, 48)
    round_off, down = 1 - across**2, (0, 1)
    line = np.stack([x + wide * across, y + smile * (0.3 - across**2)], axis=1)
    lower = line + np.outer(max(0.0, gap) * round_off, down)
    bow = full * round_off * (0.75 + 0.35 * np.abs(np.sin(across * 2.6)))
    middle = y + full + max(0.0, gap)
    canvas.fill(_arc(x, middle + full * 0.9, wide * 0.55, 0.025), skin * 0.6, 0.025, 0.6)
    canvas.fill(np.concatenate([line - np.outer(bow, down), line[::-1]]), lip * 0.85)
    canvas.fill(np.concatenate([line, lower[::-1]]), np.array((214, 208, 200)))
    canvas.fill(np.concatenate([lower, (lower + np.outer(1.25 * full * round_off**0.8, down))[::-1]]), lip)
    canvas.fill(_arc(x, middle - full * 0.3, wide * 0.3, 0.012), lip * 1.2 + 15, 0.012, 0.6)
    canvas.stroke(line, lip * 0.45, 0.01)


def _draw_fringe(canvas: Canvas, random: Random, hair: Array, head: float) -> None:
    """Draw the hair in front: from ear to ear over the top, down to a hairline, combed to one side."""
    outer = _arc(0, -0.08, head * random.uniform(1.04, 1.16), random.uniform(0.72, 0.84), 178, 362)
    outer *= 1 + random.normal(0, 0.012, (48, 1))
    inner = _arc(0, -0.02, head * 0.96, random.uniform(0.42, 0.6), 178, 362)
    parting = np.exp(-(((inner[:, 0] - random.uniform(-0.25, 0.25)) / 0.2) ** 2))
    inner[:, 1] += 0.1 * random.uniform(-1, 1) * parting
    canvas.fill(np.concatenate([inner, inner[::-1] * (0.98, 0.9)]), hair * 0.3, 0.04, 0.35)
    canvas.fill(np.concatenate([outer, inner[::-1]]), hair)
    along, bend = np.linspace(0, 1, 7)[:, None], random.integers(-14, 15)
    for start in random.integers(0, 48, 110):
        end = np.clip(start + bend + random.integers(-3, 4), 0, 47)
        way = along * random.uniform(0.9, 1.12)
        swing = (outer[end] - outer[start]) * way * (1 - way) * 0.7
        strand = outer[start] * (1 - way) + inner[end] * way + swing
        canvas.stroke(strand, hair * random.uniform(0.85, 1.15), 0.008)


def _light(image: Image.Image, random: Random) -> Image.Image:
    """Light from one side, slightly coloured."""
    ramp = np.linspace(-1, 1, image.width, dtype=np.float32)
    down, right = random.uniform(-0.16, 0.16, 2)
    light = random.uniform(0.9, 1.06) + down * ramp[:, None] + right * ramp
    return _to_image(np.asarray(image) * light[:, :, None] * random.uniform(0.975, 1.025, 3))


def _arc(x: float, y: float, width: float, height: float, start: float = 0, end: float = 360) -> Array:
    """Return 48 points on an ellipse; 0 degrees is right, 90 is down."""
    angles = np.radians(np.linspace(start, end, 48))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1)


def _pick_colour(random: Random, palette: Sequence[tuple[int, int, int]], spread: float) -> Array:
    """Return a colour between two neighbours of a palette."""
    place = random.uniform(0, len(palette) - 1)
    channels = [np.interp(place, range(len(palette)), channel) for channel in zip(*palette, strict=True)]
    return np.array(channels) + random.normal(0, spread) + random.normal(0, 2, 3)


def _mix_ink(colour: Array) -> tuple[int, ...]:
    return tuple(np.clip(colour, 0, 255).astype(int).tolist())


def _to_image(pixels: Array) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
