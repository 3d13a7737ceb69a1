"""Three small archives of drawn faces, so that the whole pipeline runs without credentials.

Every image is drawn by this package; nobody is in them. The fakes imitate traces that real ones carry: see `forgeries`.
Metrics measured on these images say nothing about real faces.
"""

import csv
import io
import json
import logging
import string
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepfake_core.config import CLASS_NAMES, KAGGLE_SOURCES, Source
from deepfake_core.demo.faces import Pose, Random
from deepfake_core.demo.forgeries import (
    DIFFICULTIES,
    PHOTOGRAPH_SIZE,
    PORTRAIT_SIZE,
    generate_face,
    splice_face,
    take_photograph,
)
from deepfake_core.storage.files import write_beside, write_json

log = logging.getLogger(__name__)

DRAWING_FORMAT = 2
"""Part of what `sample.json` remembers: raise it when the same arguments would draw other archives."""
SAVED_PAGE = b"<html><title>429 Too Many Requests</title></html>\n"


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
