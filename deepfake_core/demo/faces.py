"""One drawn person. Coordinates run from -1 to 1, x to the right, y down, the head around (0, 0)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SKINS = ((247, 216, 194), (236, 194, 164), (214, 163, 128), (176, 122, 86), (128, 83, 58), (88, 58, 44))
HAIRS = (
    (28, 24, 24), (52, 36, 28), (92, 60, 38), (140, 96, 56), (196, 158, 100), (120, 50, 30), (150, 148, 146)
)  # fmt: skip
IRISES = ((70, 44, 28), (98, 64, 36), (76, 110, 140), (88, 112, 78), (96, 106, 112))

Array = np.ndarray
Random = np.random.Generator


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
    return to_image(blobs + random.normal(0, 9, blobs.shape)).resize((side, side), Image.Resampling.BICUBIC)


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
    return to_image(np.asarray(image) * light[:, :, None] * random.uniform(0.975, 1.025, 3))


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


def to_image(pixels: Array) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
