"""Drift on real images: how often windows alarm that should not, and that should.

    python benchmarks/drift.py ARCHIVES [--epochs N] [--windows 500]

ARCHIVES holds 140k-real-and-fake-faces.zip and real-vs-fake-faces.zip. A small cnn is trained on the 140k set; of the
other, which it never sees, come the images of an unseen source. Four in ten images are test images, whose observations
are the reference, as `watch/daily` reads it. Images are judged as `deepfake serve` does (faces) and with `--no-detect`
(whole).

alarms: windows of 300 observations drawn with replacement. `unchanged`: of the test split's own images. `disjoint`: the
reference is a half of the test images, the window is of the other half. The others: of the test images recompressed at
JPEG quality 40, or scaled to half, and with one in five replaced by the unseen source.

smallest: of windows of 100, 300 and 1,000, the smallest share of images from the unseen source, and the smallest share
of images at quality 40, at which at least 95 in 100 windows alarm.

Results go into benchmarks/results/drift.json.
"""

import argparse
import io
import os
import platform
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from deepfake_core.config import EvaluationParameters, TrainingParameters, WatchParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import load_seen, measure_files
from deepfake_core.detector import Detector
from deepfake_core.monitoring.drift import JUDGED_KINDS, MAX_DRIFT_P, compare_windows, select_kind
from deepfake_core.monitoring.reference import observe_images
from deepfake_core.storage.files import write_json
from deepfake_core.training.calibration import calibrate_detector
from deepfake_core.training.fit import Training, train_candidate
from tests.builders import prepare

RESULTS = Path(__file__).parent / "results" / "drift.json"
UNSEEN = "real-vs-fake-faces"
WINDOW = 300
SHARES = tuple(range(2, 101, 2))
"""In percent, of changed images in a window."""


def train(dataset: Dataset, epochs: int) -> Detector:
    plan = Training.plan("cnn", TrainingParameters(epochs=epochs, image_size=96), (UNSEEN,))
    train, val = (load_seen(dataset, split, 96, plan.holdout) for split in ("train", "val"))
    candidate = train_candidate(plan, train, val, plan.folder(dataset))
    calibrate_detector(candidate.folder, val, EvaluationParameters(), measure_files(val, dataset))
    return Detector(candidate.folder)


def recompress(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return buffer.getvalue()


def halve(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)
    small.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def observe(detector: Detector, files: list[Path], change: Callable[[Image.Image], bytes] | None = None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        if change:
            changed = [Path(folder) / f"{position}.jpg" for position in range(len(files))]
            for file, target in zip(files, changed, strict=True):
                with Image.open(file) as image:
                    target.write_bytes(change(image.convert("RGB")))
            files = changed
        return observe_images(detector, files).to_pandas()


def draw(rows: pd.DataFrame, count: int, random: np.random.Generator) -> pd.DataFrame:
    return rows.iloc[random.integers(0, len(rows), count)]


def count_alarms(reference: pd.DataFrame, windows: list[pd.DataFrame]) -> float:
    return float(
        np.mean([compare_windows(reference, window, WatchParameters().min_distance).drifted for window in windows])
    )


def mix(ours: pd.DataFrame, others: pd.DataFrame, share: float, count: int, random: Any) -> pd.DataFrame:
    changed = round(share * count)
    return pd.concat([draw(ours, count - changed, random), draw(others, changed, random)])


def measure(kind: str, seen: dict[str, pd.DataFrame], windows: int) -> dict[str, Any]:
    rows = {name: select_kind(one, kind) for name, one in seen.items()}
    ours, random = rows["unchanged"], np.random.default_rng(0)
    alarms = {
        name: count_alarms(ours, [draw(one, WINDOW, random) for _ in range(windows)])
        for name, one in rows.items()
        if name != "unseen"
    }
    halves = []
    for _ in range(windows):
        order = random.permutation(len(ours))
        halves.append((ours.iloc[order[::2]], draw(ours.iloc[order[1::2]], WINDOW, random)))
    alarms["disjoint"] = float(
        np.mean([compare_windows(*half, WatchParameters().min_distance).drifted for half in halves])
    )
    fifth = [mix(ours, rows["unseen"], 0.2, WINDOW, random) for _ in range(windows)]
    alarms["one in five unseen"] = count_alarms(ours, fifth)
    smallest = {
        str(count): {
            name: find_smallest(ours, rows[name], count, windows // 5, random) for name in ("unseen", "quality 40")
        }
        for count in (100, 300, 1000)
    }
    return {"observations": {name: len(one) for name, one in rows.items()}, "alarms": alarms, "smallest": smallest}


def find_smallest(ours: pd.DataFrame, others: pd.DataFrame, count: int, windows: int, random: Any) -> int | None:
    """Return the smallest of `SHARES` at which at least 95 in 100 windows alarm, by bisection; None if none does."""

    def alarms(share: int) -> bool:
        return count_alarms(ours, [mix(ours, others, share / 100, count, random) for _ in range(windows)]) >= 0.95

    place = bisect_left(SHARES, True, key=alarms)
    return SHARES[place] if place < len(SHARES) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--windows", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        zips = [options.archives.absolute() / f"{name}.zip" for name in ("140k-real-and-fake-faces", UNSEEN)]
        dataset = prepare(f"{folder}/data", *zips, test_fraction=0.4, val_fraction=0.15)
        detector = train(dataset, options.epochs)
        rows = dataset.split("test")
        ours, others = ([dataset.path / path for path in rows.loc[(rows["source"] == UNSEEN) == unseen, "path"]]
                        for unseen in (False, True))  # fmt: skip
        seen = {
            "unchanged": observe(detector, ours),
            "quality 40": observe(detector, ours, recompress),
            "half": observe(detector, ours, halve),
            "unseen": observe(detector, others),
        }
    write_json(
        RESULTS,
        {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "images": {"test": len(ours), "unseen": len(others)},
            "windows": options.windows,
            "window": WINDOW,
            "level": MAX_DRIFT_P,
            "min_distance": WatchParameters().min_distance,
            "kinds": {kind: measure(kind, seen, options.windows) for kind in JUDGED_KINDS},
        },
    )
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
