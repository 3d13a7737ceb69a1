"""Faces found in photographs: our detector beside OpenCV's, on known faces pasted into larger scenes.

    python benchmarks/face_detection.py ARCHIVES [--scenes 150]

ARCHIVES holds the three zips. Three faces, of 64 to 340 pixels a side with their margin, are pasted into each scene of
1280 x 960: photographs and scans without people that scikit-image ships. Into a third as many scenes more, one face of
400 to 900 pixels is pasted. A face counts as found if a box's middle lies in the middle half of it, and the box is 0.3
to 1.05 of its side. What else is found is false. Results go into benchmarks/results/face_detection.json.
"""

import argparse
import io
import os
import platform
import statistics
import time
import zipfile
from collections.abc import Callable
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

RESULTS = Path(__file__).parent / "results"
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
    ours = load_face_finder()

    def find_at(sure: int, longest: int = 1280, again: int = 320) -> Callable[[Image.Image], list[Box]]:
        def find(image: Image.Image) -> list[Box]:
            before = faces.SURE, faces.LONGEST_SIDE, faces.MAX_SECOND_SEARCH_SIDE
            faces.SURE, faces.LONGEST_SIDE, faces.MAX_SECOND_SEARCH_SIDE = sure, longest, again
            try:
                return ours(image)
            finally:
                faces.SURE, faces.LONGEST_SIDE, faces.MAX_SECOND_SEARCH_SIDE = before

        return find

    def cascade(name: str) -> Callable[[Image.Image], list[Box]]:
        classifier = cv2.CascadeClassifier(cv2.data.haarcascades + name)

        def find(image: Image.Image) -> list[Box]:
            found = classifier.detectMultiScale(np.asarray(image.convert("L")), 1.1, 4, minSize=(24, 24))
            return [Box(x, y, x + w, y + h) for x, y, w, h in found]

        return find

    return {
        **{f"libfacedetection, from {sure} of 100": find_at(sure) for sure in (60, 70, 80, 90)},
        "libfacedetection, from 80, without the second search": find_at(80, again=1280),
        "libfacedetection, from 80, at 640 pixels": find_at(80, 640),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--scenes", type=int, default=150)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    sources = [source.short_name for source in DataParameters().sources if "real-vs-fake" not in source.short_name]
    members = []
    for source in sources:
        archive = zipfile.ZipFile(options.archives / f"{source}.zip")
        members += [(archive, name) for name in archive.namelist() if name.endswith(".jpg")]
    order = iter(random.permutation(len(members)))

    def take() -> Image.Image:
        while True:
            archive, name = members[next(order)]
            try:
                return Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            except OSError:
                continue  # the archives hold a few files that are no images

    scenes = [draw_scene(random, [take() for _ in range(3)], 64, 340) for _ in range(options.scenes)]
    scenes += [draw_scene(random, [take()], LARGE, 900) for _ in range(options.scenes // 3)]
    detectors = {}
    for name, find in make_finders().items():
        detectors[name] = measure(find, scenes)
        print(name, detectors[name], flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    faces_pasted = sum(len(portraits) for _, portraits in scenes)
    write_json(
        RESULTS / "face_detection.json",
        {"machine": machine, "scenes": len(scenes), "faces": faces_pasted, "detectors": detectors},
    )


if __name__ == "__main__":
    main()
