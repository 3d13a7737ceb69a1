"""One full retrain on the three archives as Kaggle serves them: counts, figures, seconds.

    python benchmarks/retrain.py ARCHIVES [--epochs N] [--candidates NAME ...]

ARCHIVES holds real-and-fake-face-detection.zip, real-vs-fake-faces.zip and 140k-real-and-fake-faces.zip. Data and
MLflow go into a temporary folder; the results go into benchmarks/results/retrain.json, which the README quotes.
"""

import argparse
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

from deepfake_core.config import DataParameters, PromotionParameters, TrainingParameters
from deepfake_core.data.dataset import open_dataset
from deepfake_core.registry import names, runs, versions
from deepfake_core.reports.outcome import print_outcome
from deepfake_core.storage.files import write_json
from flows.prepare import prepare
from flows.retrain import retrain

RESULTS = Path(__file__).parent / "results" / "retrain.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--epochs", type=int, default=TrainingParameters().epochs)
    parser.add_argument("--candidates", nargs="+", default=TrainingParameters().candidates)
    options = parser.parse_args()
    archives = options.archives.absolute()
    training = TrainingParameters(epochs=options.epochs, candidates=options.candidates)
    logging.getLogger("deepfake_core").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(folder)
        sources = tuple(
            source.model_copy(update={"name": f"{archives}/{source.short_name}.zip"})
            for source in DataParameters().sources
        )
        data = DataParameters(sources=sources, data_dir=f"{folder}/data")

        start = time.perf_counter()
        prepare(data)
        prepared = time.perf_counter() - start
        start = time.perf_counter()
        prepare(data)
        prepared_again = time.perf_counter() - start
        start = time.perf_counter()
        dataset, version = retrain(data, training)
        trained = time.perf_counter() - start

        published = open_dataset(dataset)
        registered = versions.read_version(PromotionParameters().model_name, version)
        print_outcome(published, registered)
        write_json(
            RESULTS,
            {
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
                "training": training.model_dump(mode="json"),
                "counts": published.description["counts"],
                "dataset_version": published.version,
                "metrics": dict(sorted(registered.metrics.items())),
                "architecture": registered.tags["architecture"],
                "threshold": float(runs.read_parameters(registered.run_id)[names.THRESHOLD]),
                "decision": registered.tags["decision"],
                "reasons": registered.tags["reasons"],
                "seconds": {"prepare": prepared, "prepare again": prepared_again, "retrain": trained},
            },
        )
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
