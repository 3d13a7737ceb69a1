"""What each candidate reaches on real images, over several seeds: AUC, accuracy, precision, recall per source.

    python benchmarks/candidates.py ARCHIVES [--seeds 0 1 2] [--only NAME ...]

ARCHIVES holds the three zips. Every candidate trains on the same split by its own recipe. The checkpoint is chosen on
val; the metrics are the test split's, at threshold 0.5. `calibrated` is what a retrain would say of the same scores: at
the threshold from val, with the verdicts that are sure. `cnn` is trained in float32, in bfloat16, and in float32 in
batches of 256 with the learning rate that goes with them, to show what these cost in AUC. `auc_lost` is what changes of
the test images cost: deepfake_core/evaluation/robustness.py. On the 140k images, whose traces of a generator these
changes remove, one variant trains without forensic augmentation, in which a share of training images is recompressed,
blurred and scaled. With `other splits`, each seed also divides the same images into train, val and test in another
way: it shows what depends on which images are in val. Results are written to benchmarks/results/candidates.json after
each training. A training whose data set, recipe and number of parameters are in that file already is not repeated, so a
run that was stopped continues.
"""

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deepfake_core.config import Architecture, DataParameters, EvaluationParameters, Recipe, TrainingParameters
from deepfake_core.data import splits
from deepfake_core.data.dataset import Dataset, open_dataset
from deepfake_core.data.images import load_seen, measure_files
from deepfake_core.detector import Detector, apply_temperature
from deepfake_core.evaluation.evaluation import Evaluation, evaluate_detector, evaluate_scores, find_sure
from deepfake_core.evaluation.robustness import measure_robustness
from deepfake_core.evaluation.test_split import evaluate_on_test
from deepfake_core.models import CANDIDATES
from deepfake_core.storage.files import write_json
from deepfake_core.training.calibration import calibrate_detector
from deepfake_core.training.fit import Training, train_candidate
from flows.prepare import prepare

RESULTS = Path(__file__).parent / "results"
CALIBRATED = ("false_alarm_rate", "recall", "sure_share", "error_when_sure", "reals_surely_fake", "fakes_surely_real")
FACES_140K, CIPLAB = "140k-real-and-fake-faces", "real-and-fake-face-detection"


class Variant(NamedTuple):
    """What is trained.

    Attributes:
        left_out: sources of which no image is used.
        share: of the training images that is used.
        other_splits: whether each seed has splits of its own.
    """

    architecture: Architecture
    recipe: Recipe
    left_out: tuple[str, ...] = ()
    share: float = 1.0
    other_splits: bool = False


def list_variants() -> dict[str, Variant]:
    """Name what is trained: each candidate by its recipe, `cnn` in both precisions; the pretrained one on other splits,
    with one head, on all and a part of the images, and on each source alone: 140k also without forensic augmentation,
    ciplab on crops of a larger input."""
    variants: dict[str, Variant] = {}
    for architecture in get_args(Architecture):
        recipe = CANDIDATES[architecture].RECIPE
        if architecture == "efficientnet_v2_b0":
            continue  # its ImageNet weights have to be downloaded
        precisions = ("float32", "bfloat16") if architecture == "cnn" else ("auto",)
        for precision in precisions:
            name = architecture if precision == "auto" else f"{architecture}, {precision}"
            variants[name] = Variant(architecture, recipe.model_copy(update={"precision": precision}))
    larger = TrainingParameters(batch_size=256, precision="float32").adjust(CANDIDATES["cnn"].RECIPE)
    variants["cnn, float32, batches of 256"] = Variant("cnn", larger)
    recipe = CANDIDATES["efficientnet_lite0"].RECIPE
    variants["efficientnet_lite0, other splits"] = Variant("efficientnet_lite0", recipe, other_splits=True)
    recipe = recipe.model_copy(update={"head_per_source": False})
    variants["efficientnet_lite0, one head"] = Variant("efficientnet_lite0", recipe)
    for name, share in (("a quarter", 0.25), ("half", 0.5)):
        variants[f"efficientnet_lite0, one head, {name} of the images"] = Variant(
            "efficientnet_lite0", recipe, share=share
        )
    variants["efficientnet_lite0, 140k alone"] = Variant("efficientnet_lite0", recipe, (CIPLAB,))
    plain = recipe.augmentation.model_copy(update=dict.fromkeys(("recompression", "blur", "resize"), 0.0))
    changed = recipe.model_copy(update={"augmentation": plain})
    variants["efficientnet_lite0, 140k alone, no forensic augmentation"] = Variant(
        "efficientnet_lite0", changed, (CIPLAB,)
    )
    changes = {"image_size": 448, "augmentation": plain, "learning_rate": 0.0001, "epochs": 14}
    large = recipe.model_copy(update=changes)
    variants["efficientnet_lite0, ciplab alone, 448 pixels, crops of 336"] = Variant(
        "efficientnet_lite0", large, (FACES_140K,)
    )
    return variants


def prepare_other_splits(data: DataParameters, seed: int) -> Dataset:
    """Return a data set of the same images, whose groups are divided in another way, in a folder of its own."""

    def draw_others(rows: pd.DataFrame, *fractions: float) -> pd.Series:
        return draw_splits(rows.assign(group=f"deal {seed}: " + rows["group"]), *fractions)

    draw_splits = splits._draw_splits
    with patch.object(splits, "_draw_splits", draw_others):
        return open_dataset(prepare(data.model_copy(update={"data_dir": f"{data.data_dir}-{seed}"})))


def measure(dataset: Dataset, variant: Variant, seed: int) -> dict[str, Any]:
    architecture, recipe, left_out, share, _ = variant
    train, val = (load_seen(dataset, split, recipe.image_size, left_out) for split in ("train", "val"))
    train = train.select(np.random.default_rng(seed).permutation(len(train)) < share * len(train))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        candidate = train_candidate(Training(architecture, recipe, seed), train, val, Path(folder))
        seconds = time.perf_counter() - start
        detector = Detector(candidate.folder)
        validation, _ = evaluate_detector(detector, val)
        test = evaluate_on_test(candidate.folder, dataset, left_out)
        changed = measure_robustness(candidate.folder, dataset, test, len(test.images))
        calibrate_detector(candidate.folder, val, EvaluationParameters(), measure_files(val, dataset))
        calibrated = Detector(candidate.folder)
        scores = apply_temperature(test.scores, calibrated.temperature)
        sure = find_sure(calibrated, scores, measure_files(test.images, dataset))
        judged = evaluate_scores(test.images.labels, scores, calibrated.threshold, test.images.rows, sure=sure)
    epochs = candidate.history["seconds"].iloc[1:] if len(candidate.history) > 1 else candidate.history["seconds"]
    return {
        "trained_in": detector.description["trained_in"],
        "minutes": seconds / 60,
        "epochs": len(candidate.history),
        "best_epoch": candidate.best_epoch,
        "images_per_second": len(train) / float(epochs.median()),
        "auc_lost": changed.groupby("change", sort=False)["auc_lost"].max().to_dict(),
        "val": describe(validation),
        "test": describe(test.evaluation),
        "calibrated": {
            source: {name: one.metrics[name].value for name in CALIBRATED if name in one.metrics}
            for source, one in {**judged.sources, "all": judged}.items()
        },
    }


def describe(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    return {
        source: {
            "images": one.confusion.total,
            "auc": one.auc,
            **{name: getattr(one.confusion, name) for name in ("accuracy", "precision", "recall")},
        }
        for source, one in {**evaluation.sources, "all": evaluation}.items()
    }


def plot_aucs(variants: dict[str, Any]) -> Figure:
    """Draw each seed's AUC per candidate and source, with their mean."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    sources = sorted({source for one in variants.values() for seed in one["seeds"].values() for source in seed["test"]})
    for position, source in enumerate(sorted(set(sources) - {"all"})):
        colour = ("#2c7fb8", "#d95f0e", "#636363")[position]
        for row, one in enumerate(variants.values()):
            values = [seed["test"][source]["auc"] for seed in one["seeds"].values() if source in seed["test"]]
            if not values:
                continue
            height = row + 0.24 * (position - 0.5)
            axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.5, label=source if row == 0 else None)
            axes.plot(sum(values) / len(values), height, "|", color=colour, markersize=16, markeredgewidth=2)
    axes.axvline(0.5, color="grey", linestyle=":")
    axes.set_yticks(range(len(variants)), list(variants))
    axes.invert_yaxis()
    axes.set(xlabel="AUC on the test split: each seed, and the mean (bar)", xlim=(0.4, 1.0))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="what to train, by the names in the results")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("deepfake_core").setLevel(logging.INFO)
    file = RESULTS / "candidates.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        sources = tuple(
            source.model_copy(update={"name": f"{options.archives.absolute()}/{source.short_name}.zip"})
            for source in DataParameters().sources
        )
        data = DataParameters(sources=sources, data_dir=f"{folder}/data")
        dataset = open_dataset(prepare(data))
        variants: dict[str, Any] = known.get("variants", {}) if known.get("dataset") == dataset.version else {}
        chosen = {name: one for name, one in list_variants().items() if not options.only or name in options.only}
        parameters = {
            name: CANDIDATES[one.architecture].build(one.recipe).count_params() for name, one in chosen.items()
        }
        for seed in map(str, options.seeds):
            for name, variant in chosen.items():
                row = variants.get(name)
                if row is None or row["parameters"] != parameters[name] or Recipe(**row["recipe"]) != variant.recipe:
                    description = variant.recipe.model_dump(mode="json")
                    variants[name] = {"parameters": parameters[name], "recipe": description, "seeds": {}}
                known_seed = variants[name]["seeds"].get(seed, {})
                if not {"auc_lost", "calibrated"} <= known_seed.keys():  # older results lack some
                    used = prepare_other_splits(data, int(seed)) if variant.other_splits else dataset
                    variants[name]["seeds"][seed] = measure(used, variant, int(seed))
                    print(name, seed, json.dumps(variants[name]["seeds"][seed]["test"]), flush=True)
                    ordered = {one: variants[one] for one in list_variants() if one in variants}
                    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
                    counts = dataset.description["counts"]["splits"]
                    write_json(
                        file, {"machine": machine, "dataset": dataset.version, "splits": counts, "variants": ordered}
                    )
                    plot_aucs(ordered).savefig(RESULTS / "candidates.png", dpi=110)
    print(f"written: {file} and candidates.png")


if __name__ == "__main__":
    main()
