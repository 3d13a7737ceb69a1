"""What confirmed reports change: production has seen few of a generator's fakes, and is wrong on many; then a retrain.

    python benchmarks/feedback.py ARCHIVES [--candidate NAME] [--image-size N] [--epochs N]

ARCHIVES holds the three zips. Of the 140k set's fakes, production is trained on one in twenty. Half of the others are
shown to it: its wrong verdicts are reported and confirmed. A retrain follows, on the same sources and the reports. Both
versions are then scored on the other half, which neither has seen, nor a near copy: recall, and the AUC against the
set's real test images. Results go into benchmarks/results/feedback.json.
"""

import argparse
import hashlib
import logging
import os
import platform
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deepfake_core.config import (
    DEFAULT_MODEL,
    FEEDBACK,
    REGRESSION,
    Architecture,
    DataParameters,
    EvaluationParameters,
    PromotionParameters,
    Source,
    TrainingParameters,
)
from deepfake_core.data.dataset import Dataset, open_dataset
from deepfake_core.detector import Detector, call_fake, open_image, resize_image
from deepfake_core.evaluation.evaluation import evaluate_scores
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.registry import names, runs, versions
from deepfake_core.registry.detectors import pull_detector
from deepfake_core.storage.files import write_json
from flows.prepare import prepare
from flows.retrain import retrain

RESULTS = Path(__file__).parent / "results" / "feedback.json"
SET = "140k-real-and-fake-faces"
KEPT_SHARE, SHOWN_SHARE = 0.05, 0.5
"""Share of the set's fakes that production is trained on; and of the others, the share that is shown to it."""


def divide(dataset: Dataset) -> dict[str, pd.DataFrame]:
    """Divide the set's fakes that have no near copy elsewhere, by groups: `trained`, `shown` and `others`."""
    kept = dataset.manifest[dataset.manifest["kept"]]
    mine = (kept["source"] == SET) & (kept["label"] == "fake")
    fakes = kept[mine & ~kept["group"].isin(set(kept.loc[~mine, "group"]))]
    place = fakes["group"].map(lambda name: int(hashlib.sha256(f"shown {name}".encode()).hexdigest()[:16], 16) / 2**64)
    shown = place < KEPT_SHARE + SHOWN_SHARE * (1 - KEPT_SHARE)
    trained = place < KEPT_SHARE
    return {"trained": fakes[trained], "shown": fakes[shown & ~trained], "others": fakes[~shown]}


def write_without(archive: Path, target: Path, left_out: set[str]) -> None:
    """Write a zip without the images of these SHA-256, nor the csv files, which name them."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as written:
        for name in source.namelist():
            data = source.read(name)
            if not name.endswith(".csv") and hashlib.sha256(data).hexdigest() not in left_out:
                written.writestr(name, data)


def load(dataset: Dataset, rows: pd.DataFrame, size: int) -> np.ndarray:
    pixels = np.empty((len(rows), size, size, 3), np.uint8)
    for position, path in enumerate(rows["path"]):
        with open_image(dataset.read(path)) as image:
            pixels[position] = resize_image(image, size)
    return pixels


def measure(detector: Detector, dataset: Dataset, fakes: pd.DataFrame, reals: pd.DataFrame) -> dict[str, Any]:
    """Evaluate a version on fakes and reals that it has not seen."""
    rows = pd.concat([fakes, reals], ignore_index=True)
    labels = (rows["label"] == "fake").to_numpy(int)
    scores = detector.score(load(dataset, rows, detector.image_size))
    evaluation = evaluate_scores(labels, scores, detector.threshold, rows)
    found = {name: asdict(evaluation.metrics[name]) for name in ("recall", "false_alarm_rate", "auc")}
    return {"threshold": detector.threshold, **found}


def report_mistakes(detector: Detector, dataset: Dataset, shown: pd.DataFrame, address: str) -> int:
    """Report and confirm each fake that a version calls real; return how many."""
    feedback, scores = open_feedback(address), detector.score(load(dataset, shown, detector.image_size))
    missed = ~call_fake(scores, detector.threshold)
    wrong = shown[missed]
    for row, score in zip(wrong.itertuples(), scores[missed], strict=True):
        verdict = GivenVerdict(label="real", probability=float(score), sure=None, version=f"{DEFAULT_MODEL} version 1")
        sent = feedback.add(dataset.read(str(row.path)), verdict, "fake")
        feedback.confirm(sent.sha256, "fake", by="the benchmark", why="the set says so")
    return len(wrong)


def count_leaks(dataset: Dataset) -> int:
    """Return how many groups with a confirmed image have images in more than one split."""
    kept = dataset.manifest[dataset.manifest["kept"]]
    reported = set(kept.loc[kept["source"] == FEEDBACK, "group"])
    return int((kept[kept["group"].isin(reported)].groupby("group")["split"].nunique() > 1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--candidate", default="efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    archives, candidate = options.archives.absolute(), options.candidate
    logging.getLogger("deepfake_core").setLevel(logging.INFO)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(folder)
        sources = {
            source.short_name: source.model_copy(update={"name": f"{archives}/{source.short_name}.zip"})
            for source in DataParameters().sources
        }
        full = open_dataset(prepare(DataParameters(sources=tuple(sources.values()), data_dir=f"{folder}/full")))
        parts = divide(full)
        write_without(
            archives / f"{SET}.zip",
            Path(f"{folder}/{SET}.zip"),
            set(pd.concat([parts["shown"], parts["others"]])["sha256"]),
        )
        data = DataParameters(
            sources=tuple((sources | {SET: Source(name=f"{folder}/{SET}.zip")}).values()), data_dir=f"{folder}/data"
        )
        result = run_twice(data, full, parts, candidate, options.image_size, options.epochs)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    write_json(RESULTS, {"machine": machine, "minutes": (time.perf_counter() - begun) / 60, **result})
    print(f"written: {RESULTS}")


def run_twice(
    data: DataParameters,
    full: Dataset,
    parts: dict[str, pd.DataFrame],
    candidate: Architecture,
    image_size: int,
    epochs: int,
) -> dict[str, Any]:
    """Train production, report its mistakes, train again; measure both versions."""
    training = TrainingParameters(candidates=(candidate,), image_size=image_size, epochs=epochs)
    evaluation = EvaluationParameters(robustness_images=0)
    promotion = PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)
    first, _ = retrain(data, training, evaluation, promotion)
    before = Detector(pull_detector(f"models:/{DEFAULT_MODEL}/1", Path("before")))
    confirmed = report_mistakes(before, full, parts["shown"], f"{data.data_dir}/feedback")
    second, number = retrain(data, training, evaluation, promotion)
    after = Detector(pull_detector(f"models:/{DEFAULT_MODEL}/{number}", Path("after")))
    version, dataset = versions.read_version(DEFAULT_MODEL, number), open_dataset(second)
    tested = open_dataset(first).split("test")
    reals = full.manifest[full.manifest["sha256"].isin(tested.loc[tested["label"] == "real", "sha256"])]
    reals = reals[reals["kept"] & (reals["source"] == SET)]
    feedback = dataset.manifest[dataset.manifest["kept"] & (dataset.manifest["source"] == FEEDBACK)]
    table = runs.read_text(version.run_id, names.REGRESSION_TABLE)
    return {
        "training": training.model_dump(mode="json"),
        "images": {name: len(rows) for name, rows in parts.items()} | {"reals": len(reals)},
        "confirmed": confirmed,
        "confirmed_by_split": {str(name): int(count) for name, count in feedback["split"].value_counts().items()},
        "groups_in_two_splits": count_leaks(dataset),
        "before": measure(before, full, parts["others"], reals),
        "after": measure(after, full, parts["others"], reals),
        "regression": {
            name.removeprefix(f"{REGRESSION}/"): value
            for name, value in version.metrics.items()
            if name.startswith(f"{REGRESSION}/")
        },
        "regression_rows": len(table.splitlines()) - 1 if table else 0,
        "decision": version.decision,
        "reasons": version.reasons,
    }


if __name__ == "__main__":
    main()
