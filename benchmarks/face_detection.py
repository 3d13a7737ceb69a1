"""Faces found in photographs: our detector beside OpenCV's, on known faces pasted into larger scenes.

    python benchmarks/face_detection.py ARCHIVES [--scenes 150] [--images 1600] [--only {scenes,shared}]

ARCHIVES holds the three zips. Two parts, of which `--only` measures one and keeps what is recorded of the other:

scenes: Three faces, of 64 to 340 pixels a side with their margin, are pasted into each scene of 1280 x 960: photographs
and scans without people that scikit-image ships. Into a third as many scenes more, one face of 400 to 900 pixels is
pasted. A face counts as found if a box's middle is in the middle half of it, and the box is 0.3 to 1.05 of its side.
What else is found is false.

shared: Of each source's different images, at most `--images` drawn at random, those in which our detector finds no face
are counted.

Results go into benchmarks/results/face_detection.json.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage
from PIL import Image

from deepfake_core.config import DataParameters
from deepfake_core.serving import faces
from deepfake_core.serving.faces import Box, fit_crop, load_face_finder
from deepfake_core.storage.files import write_json

RESULTS = Path(__file__).parent / "results" / "face_detection.json"
SCENES = (
    "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "motorcycle_left.png", "page.png", "rocket.jpg", "text.png",
)  # fmt: skip
WIDTH, HEIGHT = 1280, 960
SMALL, LARGE = 110, 400


def draw_scene(
    random: np.random.Generator, portraits: list[Image.Image], smallest: int, largest: int
) -> tuple[Image.Image, list[Box]]:
    """Paste portraits into a photograph, none over another; return it and where they are."""
    file = Path(skimage.__file__).parent / "data" / SCENES[random.integers(len(SCENES))]
    photograph = Image.open(file).convert("RGB")
    scale = max(WIDTH / photograph.width, HEIGHT / photograph.height)
    photograph = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
    scene, boxes = photograph.crop((0, 0, WIDTH, HEIGHT)), list[Box]()
    for portrait in portraits:
        side = round(2 ** random.uniform(np.log2(smallest), np.log2(largest)))
        for _ in range(50):
            left, top = (int(random.integers(0, most - side)) for most in (WIDTH, HEIGHT))
            box = Box(left, top, left + side, top + side)
            if not any(box.intersect(other).area for other in boxes):
                scene.paste(portrait.resize((side, side), Image.Resampling.BICUBIC), (left, top))
                boxes.append(box)
                break
    return scene, boxes


def is_found(portrait: Box, box: Box) -> bool:
    side = portrait.right - portrait.left
    inner = Box(
        portrait.left + side / 4, portrait.top + side / 4, portrait.right - side / 4, portrait.bottom - side / 10
    )
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    inside = inner.left < x < inner.right and inner.top < y < inner.bottom
    return inside and 0.3 < max(box.right - box.left, box.bottom - box.top) / side < 1.05


def make_finders() -> dict[str, Callable[[Image.Image], list[Box]]]:
    def find_at(confidence: float, longest: int = 1280, again: int = 320) -> Callable[[Image.Image], list[Box]]:
        def find(image: Image.Image) -> list[Box]:
            before = faces.MAX_SEARCH_PIXELS, faces.MAX_SECOND_SEARCH_PIXELS
            faces.MAX_SEARCH_PIXELS, faces.MAX_SECOND_SEARCH_PIXELS = longest, again
            try:
                return ours(image)
            finally:
                faces.MAX_SEARCH_PIXELS, faces.MAX_SECOND_SEARCH_PIXELS = before

        usual, faces.MIN_FACE_CONFIDENCE = faces.MIN_FACE_CONFIDENCE, confidence
        ours = load_face_finder()
        faces.MIN_FACE_CONFIDENCE = usual
        return find

    def cascade(name: str) -> Callable[[Image.Image], list[Box]]:
        classifier = cv2.CascadeClassifier(cv2.data.haarcascades + name)

        def find(image: Image.Image) -> list[Box]:
            found = classifier.detectMultiScale(np.asarray(image.convert("L")), 1.1, 4, minSize=(24, 24))
            return [Box(x, y, x + w, y + h) for x, y, w, h in found]

        return find

    return {
        **{f"YuNet, from {confidence}": find_at(confidence) for confidence in (0.6, 0.7, 0.8, 0.9)},
        "YuNet, from 0.8, without the second search": find_at(0.8, again=1280),
        "YuNet, from 0.8, at 960 pixels": find_at(0.8, 960),
        "YuNet, from 0.8, at 640 pixels": find_at(0.8, 640),
        "OpenCV, haarcascade_frontalface_default": cascade("haarcascade_frontalface_default.xml"),
        "OpenCV, haarcascade_frontalface_alt2": cascade("haarcascade_frontalface_alt2.xml"),
    }


def measure(find: Callable[[Image.Image], list[Box]], scenes: list[tuple[Image.Image, list[Box]]]) -> dict[str, Any]:
    found, small, large, false, overlaps, seconds = [], [], [], 0, [], []
    for scene, portraits in scenes:
        start = time.perf_counter()
        boxes = find(scene)
        seconds.append(time.perf_counter() - start)
        right = set()
        for portrait in portraits:
            hits = [number for number, box in enumerate(boxes) if is_found(portrait, box)]
            found.append(bool(hits))
            side = portrait.right - portrait.left
            if side < SMALL:
                small.append(bool(hits))
            if side >= LARGE:
                large.append(bool(hits))
            right |= set(hits)
            overlaps += [fit_crop(boxes[number], WIDTH, HEIGHT).overlap(portrait) for number in hits[:1]]
        false += len(boxes) - len(right)
    return {
        "recall": float(np.mean(found)),
        "recall_small": float(np.mean(small)),
        "recall_large": float(np.mean(large)),
        "false_per_scene": false / len(scenes),
        "crop_overlap": float(np.median(overlaps)),
        "milliseconds": 1000 * statistics.median(seconds),
    }


def list_images(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".jpg")]


def take_portraits(archives: list[zipfile.ZipFile], random: np.random.Generator) -> Iterator[Image.Image]:
    """Yield the images of all archives in a random order."""
    members = [(archive, name) for archive in archives for name in list_images(archive)]
    for number in random.permutation(len(members)):
        archive, name = members[number]
        try:
            portrait = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
        except OSError:
            continue  # the archives hold a few files that are no images
        yield portrait


def measure_scenes(archives: list[zipfile.ZipFile], count: int) -> dict[str, Any]:
    """Measure every detector on `count` scenes of three faces and a third as many of one large face."""
    random = np.random.default_rng(0)
    portraits = take_portraits(archives, random)
    scenes = [draw_scene(random, list(islice(portraits, 3)), 64, 340) for _ in range(count)]
    scenes += [draw_scene(random, list(islice(portraits, 1)), LARGE, 900) for _ in range(count // 3)]
    detectors = {}
    for name, find in make_finders().items():
        detectors[name] = measure(find, scenes)
        print(name, detectors[name], flush=True)
    return {"scenes": len(scenes), "faces": sum(len(boxes) for _, boxes in scenes), "detectors": detectors}


def draw_different(archive: zipfile.ZipFile, most: int) -> list[bytes]:
    """Return at most `most` of an archive's images as encoded bytes, drawn at random, none twice."""
    names, different = list_images(archive), dict[bytes, bytes]()
    for number in np.random.default_rng(0).permutation(len(names)):
        data = archive.read(names[number])
        different[hashlib.sha256(data).digest()] = data
        if len(different) == most:
            break
    return list(different.values())


def decode_each(encoded: list[bytes]) -> Iterator[Image.Image]:
    """Yield the images; what is none is left out."""
    for data in encoded:
        try:
            yield Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:
            continue


def measure_shared(archives: dict[str, zipfile.ZipFile], most: int) -> dict[str, dict[str, int]]:
    """Count each source's images, and those without a face found."""
    find, counts = load_face_finder(), {}
    for source, archive in archives.items():
        found = [bool(find(image)) for image in decode_each(draw_different(archive, most))]
        counts[source] = {"images": len(found), "missed": found.count(False)}
        print(source, counts[source], flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--only", choices=("scenes", "shared"))
    options = parser.parse_args()
    archives = {
        source.short_name: zipfile.ZipFile(options.archives / f"{source.short_name}.zip")
        for source in DataParameters().sources
        if "real-vs-fake" not in source.short_name  # ciplab's images once more
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.only != "shared":
        machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
        results |= {"machine": machine, **measure_scenes(list(archives.values()), options.scenes)}
    if options.only != "scenes":
        results["shared"] = measure_shared(archives, options.images)
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
