"""A retrain of seconds, for processes that are killed or that run at once.

It calls the core's functions in the order of the flows, without Prefect and figures, on a few drawn images and a
network of a few weights. What it needs is imported here, before processes are forked: TensorFlow's import takes longer.
"""

import inspect
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import keras
import mlflow
import mlflow.data.pandas_dataset
import mlflow.pyfunc
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import tf2onnx  # noqa: F401
from prefect.settings import PREFECT_API_URL, temporary_settings

from deepfake_core.config import (
    DataParameters,
    EvaluationParameters,
    PromotionParameters,
    Recipe,
    Source,
    TrainingParameters,
)
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.images import load_seen
from deepfake_core.data.index import read_facts, write_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_or_read_links
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.data.split_memory import read_memory
from deepfake_core.data.splits import assign_splits
from deepfake_core.evaluation.test_split import evaluate_on_test
from deepfake_core.models import cnn
from deepfake_core.registry import candidates, challenge, fingerprint, names, production, runs, unfinished
from deepfake_core.registry.connection import connect
from deepfake_core.registry.versions import describe_version
from deepfake_core.storage.files import remove_folder, write_beside
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.store import open_store
from deepfake_core.training.calibration import calibrate_detector
from deepfake_core.training.fit import Training, train_candidate
from flows import retrain as flow
from tests.builders import NAME

processes = multiprocessing.get_context("forkserver")
"""Forks each process from one that has imported this module."""

Layout = Literal["files", "shards"]

ZIP, DATA = "a.zip", "data"
SIZE = 32
TRAINING = TrainingParameters(candidates=("cnn",), image_size=SIZE, epochs=2)
EVALUATION = EvaluationParameters(robustness_images=0)
PROMOTION = PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)


def retrain(folder: Path, layout: Layout = "files") -> str:
    """Do what the flow `retrain` does with a folder's zip; return the version."""
    connect()
    store = open_store(folder / DATA)
    with lock_folder(store.folder, "a small retrain"):
        runs.end_killed_runs(store)
        dataset = prepare(folder, layout)
        known = fingerprint.fingerprint_training(dataset.version, TRAINING, EVALUATION, PROMOTION)
        same = fingerprint.find_same_training(NAME, known)
        if same is None:
            return train(dataset, known)
        remove_folder(Training.plan("cnn", TRAINING, ()).folder(dataset))
        return same.version


def describe_data(folder: Path, layout: Layout = "files") -> DataParameters:
    source, place = Source(name=str(folder / ZIP)), str(folder / DATA)
    return DataParameters(sources=(source,), data_dir=place, test_fraction=0.25, val_fraction=0.25, layout=layout)


def prepare(folder: Path, layout: Layout = "files") -> Dataset:
    """Do what the flow `prepare` does."""
    data, store = describe_data(folder, layout), open_store(folder / DATA)
    with lock_folder(store.folder, "a small retrain"):
        archive = fetch_archive(data.sources[0], store)
        index = write_index(archive, store)
        links = find_or_read_links([index], store)
        found = mark_duplicates(read_facts([index]), links)
        rows = assign_splits(found, links, read_memory(store), data.val_fraction, data.test_fraction)
        dataset = publish_dataset(rows, [archive], store, data)
        with write_beside(dataset.report) as beside:  # figures take seconds
            beside.write_text("a report")
        return dataset


def train(dataset: Dataset, known: str) -> str:
    """Do what the flow `train` does, without figures."""
    plan, flow_run = Training.plan("cnn", TRAINING, ()), str(os.getpid())
    begun = unfinished.find_unfinished(NAME, known)
    opened = (
        unfinished.reopen_retrain(begun, flow_run) if begun else runs.open_retrain("small", flow_run, "a CPU", dataset)
    )
    with opened as parent:
        if begun:
            (best,) = unfinished.recall_candidates(begun, dataset, TRAINING, EVALUATION)
        else:
            runs.log_inputs(parent, dataset, TRAINING, EVALUATION, PROMOTION)
            best = fit(plan, dataset, parent)
        measured = evaluate_on_test(best.candidate.folder, dataset)
        candidates.log_measured(best, parent, measured)
        tags = {names.FINGERPRINT: known, names.FLOW_RUN_ID: flow_run}
        version = begun.version if begun else challenge.register_challenger(best, measured, dataset, NAME, tags)
        outcome = challenge.promote_challenger(version, best, measured, dataset, PROMOTION)
        runs.log_text(best.run_id, "a report", names.REPORT)
        describe_version(NAME, version, outcome.decision.text)
    remove_folder(plan.folder(dataset))
    return version


def fit(plan: Training, dataset: Dataset, parent: str) -> candidates.TrainedCandidate:
    """Do what the task `train` does."""
    train, val = (load_seen(dataset, split, SIZE, ()) for split in ("train", "val"))
    with runs.open_run("cnn", parent) as run_id:
        runs.log_training(run_id, plan)

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            runs.log_metrics(run_id, metrics, step=epoch)

        candidate = train_candidate(plan, train, val, plan.folder(dataset), on_epoch=on_epoch)
        calibrate_detector(candidate.folder, val, EVALUATION)
        return candidates.log_candidate(run_id, candidate, val, dataset)


def retrain_by_flow(folder: Path, api: str) -> None:
    """Run the flow `retrain` itself, with two candidates, on Prefect's server at an address."""
    two = TrainingParameters(candidates=("cnn", "hpf_cnn"), image_size=SIZE, epochs=1)
    with temporary_settings({PREFECT_API_URL: api}):
        flow.retrain(describe_data(folder), two, EVALUATION, PROMOTION)


def build(recipe: Recipe) -> keras.Model:
    """Build a network of a few weights, in place of the reference CNN."""
    return keras.Sequential(
        [
            keras.Input((recipe.image_size, recipe.image_size, 3), name="image"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, strides=4, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(1, activation="sigmoid", dtype="float32", name="fake_probability"),
        ],
        name="cnn",
    )


def run(folder: Path, act: Callable[[Path], object] = retrain, point: str = "") -> None:
    """Call a function in a process of its own, which is killed when it comes to a point."""
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    cnn.build = build
    fingerprint.read_git_commit = lambda: "c" * 40  # as on a worker
    if point:
        kill_at(folder, point)
    act(folder)


def run_alone(folder: Path, *arguments: Any) -> None:
    """Run where no other process can be at it: else a run waits a minute for the lock of one that was killed."""
    production.MAX_LOCK_SECONDS = 0
    run(folder, *arguments)


def fork(folder: Path, *arguments: Any) -> int | None:
    """Call `run_alone` in a process of its own; return its exit status."""
    process = processes.Process(target=run_alone, args=(folder, *arguments))
    process.start()
    process.join()
    return process.exitcode


def kill_at(folder: Path, point: str) -> None:
    """Kill this process at a point, such as `rename data/.lock.json`, or when it comes there again: `create_run 2`.

    A point is what is about to be done: a file below the folder is written, renamed (to the name given) or removed,
    or a change of MLflow is asked for. ID stands for any id.
    """
    passed: list[str] = []

    def pass_by(name: str) -> None:
        passed.append(name)
        if f"{name} {passed.count(name)}".removesuffix(" 1") == point:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_files(folder, pass_by)
    watch_mlflow(pass_by)


def watch_files(folder: Path, pass_by: Callable[[str], None]) -> None:

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+"):
            verb, path = "write", arguments[0]
        elif event in ("os.rename", "os.remove"):
            verb, path = event[3:], arguments[event == "os.rename"]
        else:
            return
        if isinstance(path, str | Path) and Path(path).is_relative_to(folder):
            place = re.sub(r"[0-9a-f]{16,}|\.\d+$", "ID", str(Path(path).relative_to(folder)))
            pass_by(f"{verb} {place}")

    sys.addaudithook(watch)


def watch_mlflow(pass_by: Callable[[str], None]) -> None:
    def watch(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(change)
        def ask(*arguments: Any, **named: Any) -> Any:
            words = [str(one) for one in arguments[1:] if isinstance(one, str) and re.fullmatch(r"[a-z_]{4,30}", one)]
            logged = [one.key for key in ("params", "metrics") for one in named.get(key, ())[:1]]
            pass_by(" ".join([name, *words, *logged]))
            return change(*arguments, **named)

        return ask

    for name, change in inspect.getmembers(mlflow.MlflowClient, inspect.isfunction):
        if name.startswith(("create_", "log_", "set_", "delete_", "update_", "finalize_")):
            setattr(mlflow.MlflowClient, name, watch(name, change))
