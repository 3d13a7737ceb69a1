"""Memory, open files, threads and disk of what runs for long, as curves.

    python benchmarks/soak.py [--photos 5000] [--requests 2000] [--clips 100] [--retrains 20] [--only PART ...]

Photographs are drawn faces in scenes of 1,024 x 1,024 pixels, 50 different ones, each judged again and again; clips are
of 320 x 240 pixels. The network is `efficientnet_lite0` as it is before training. Each part is a process of its own,
looked at twice a second:

predict: `deepfake predict FOLDER --json` on a folder of photographs.
serve: `deepfake serve`, to which photographs are sent one after the other.
clips: `deepfake predict FOLDER --json` on a folder of clips.
retrain: `python -m flows.retrain` on drawn images, some of them new each time, and `deepfake gc` as `clean/weekly`
    calls it; after each, what lies on disk.

Results go into benchmarks/results/soak.json and soak.png: of each curve, 400 looks at most. Parts that are left out
keep what is recorded of them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests
from matplotlib.figure import Figure

from benchmarks.data_speed import measure_disk
from benchmarks.serving_speed import make_model
from deepfake_core.storage.files import write_json
from tests.builders import draw_portrait, draw_scene, faces, free_port, write_clip, write_zip

RESULTS = Path(__file__).parent / "results"
SECONDS_BETWEEN_LOOKS = 0.5
DIFFERENT = 50

DISK = ("data_mb", "mlflow_mb", "prefect_mb")
"""What lies on disk after a retrain: the data folder, MLflow's database and files, Prefect's."""

Curve = dict[str, list[float]]
"""Measurements of one part, by name; each list has one entry per look."""


def look_at(process: psutil.Process, curve: Curve, seconds: float) -> None:
    """Append what a process and its children use now."""
    family = [process, *process.children(recursive=True)]
    measured = {
        "seconds": seconds,
        "memory_mb": sum(one.memory_info().rss for one in family) / 1e6,
        "open_files": sum(one.num_fds() for one in family),
        "threads": sum(one.num_threads() for one in family),
    }
    for name, value in measured.items():
        curve.setdefault(name, []).append(round(value, 2))


@contextmanager
def watch(pid: int) -> Iterator[Curve]:
    """Look at a process until the end of the block, or its own."""
    curve: Curve = {}
    ended, process, start = threading.Event(), psutil.Process(pid), time.monotonic()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                look_at(process, curve, time.monotonic() - start)
            except psutil.Error:
                continue  # a child that has just ended, or the process

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield curve
    finally:
        ended.set()
        watcher.join()


def write_photos(folder: Path, count: int) -> Path:
    """Write a folder of `count` photographs, of which 50 differ."""
    folder.mkdir()
    for number in range(count):
        file = folder / f"{number:05}.jpg"
        if number < DIFFERENT:
            people = {(100, 150): draw_portrait(number, 300), (600, 500): draw_portrait(1000 + number, 200)}
            draw_scene(people, 1024, 1024).save(file, quality=90)
        else:
            file.hardlink_to(folder / f"{number % DIFFERENT:05}.jpg")
    return folder


def write_clips(folder: Path, count: int) -> Path:
    """Write a folder of `count` clips of two seconds, of which five differ."""
    folder.mkdir()
    for number in range(count):
        file = folder / f"{number:03}.mp4"
        if number < 5:
            person = draw_portrait(number, 150)
            frames = [draw_scene({(40 + step, 50): person}, 320, 240) for step in range(50)]
            write_clip(file, frames)
        else:
            file.hardlink_to(folder / f"{number % 5:03}.mp4")
    return folder


def predict(model: Path, folder: Path) -> Curve:
    """Watch `deepfake predict` on a folder."""
    command = [sys.executable, "-m", "deepfake_core.cli", "predict", str(folder), "--json", "--model", str(model)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        watch(process.pid) as curve,
    ):
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    return curve


def serve(model: Path, folder: Path, count: int) -> Curve:
    """Watch `deepfake serve` while photographs are sent to it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/gradio_api"
    command = [sys.executable, "-m", "deepfake_core.cli", "serve", "--model", str(model), "--port", str(port)]
    files = sorted(folder.iterdir())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it says that it listens
        with watch(process.pid) as curve:
            for number in range(count):
                with files[number % len(files)].open("rb") as file:
                    (path,) = requests.post(f"{address}/upload", files={"files": file}).json()
                data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
                event = requests.post(f"{address}/call/judge", json={"data": data}).json()["event_id"]
                answer = requests.get(f"{address}/call/judge/{event}").text
                if "P(fake)" not in answer:
                    raise RuntimeError(answer)
        process.terminate()
        process.communicate()
    return curve


def retrain(folder: Path, count: int) -> Curve:
    """Retrain again and again on images of which a tenth are new, and clean; the disk is looked at after each."""
    settings = folder / "retrain.json"
    curve: Curve = {}
    for number in range(count):
        source = write_zip(folder / "source.zip", faces(100, start=10 * number))
        settings.write_text(
            json.dumps(
                {
                    "data": {"sources": [{"name": str(source)}], "data_dir": str(folder / "data")},
                    "training": {"candidates": ["cnn"], "image_size": 32, "epochs": 2},
                    "promotion": {"min_precision": 0, "min_recall": 0, "max_false_alarm_rate": 1},
                }
            )
        )
        command = [sys.executable, "-m", "flows.retrain", "--config", str(settings)]
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_PROFILE": "ephemeral",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as process,
            watch(process.pid) as one,
        ):
            if process.wait():
                raise RuntimeError((folder / "log").read_text())
        gc = [sys.executable, "-m", "deepfake_core.cli", "gc", "--yes"]
        subprocess.run(gc, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        for name in ("memory_mb", "open_files", "threads"):
            curve.setdefault(name, []).append(max(one[name]))
        for name, kept in zip(DISK, (("data",), ("mlflow.db", "mlruns"), ("prefect",)), strict=True):
            curve.setdefault(name, []).append(round(sum(measure_disk(folder / part) for part in kept) / 1e6, 2))
        print(f"retrain {number + 1}:", {name: values[-1] for name, values in curve.items()}, flush=True)
    return curve


def summarise(curve: Curve) -> dict[str, float]:
    """Return each measurement's maximum, and how much more the second half had than the first."""
    summary = {}
    for name, values in curve.items():
        if name != "seconds":
            half = len(values) // 2
            summary |= {f"{name}_max": max(values), f"{name}_growth": max(values[half:]) - max(values[:half])}
    return summary


def thin(curve: Curve) -> Curve:
    """Return every n-th look, so that at most 400 are left."""
    step = -(-max(map(len, curve.values())) // 400)
    return {name: values[::step] for name, values in curve.items()}


def plot(parts: dict[str, Any]) -> Figure:
    """Draw a column per part and a row per measurement; the last row is what lies on disk after each retrain."""
    names = ("memory_mb", "open_files", "threads")
    figure = Figure(figsize=(3.2 * len(parts), 8), layout="constrained")
    for column, (part, result) in zip(figure.subplots(4, len(parts), squeeze=False).T, parts.items(), strict=True):
        curve = result["curve"]
        seconds = curve.get("seconds")
        for axes, name in zip(column, names, strict=False):
            axes.plot(_count(curve[name], seconds), curve[name], color="#1f77b4")
            axes.set_ylim(bottom=0)
            axes.set_ylabel(name.replace("_mb", ", MB").replace("_", " "))
        disk = {name.removesuffix("_mb"): values for name, values in curve.items() if name in DISK}
        for (name, values), style in zip(disk.items(), ("-", "--", ":"), strict=False):
            column[-1].plot(_count(values, seconds), values, style, color="#1f77b4", label=name)
        column[-1].set_visible(bool(disk))
        if disk:
            column[-1].set_ylabel("disk, MB")
            column[-1].set_ylim(bottom=0)
            column[-1].legend(fontsize=8)
        column[0].set_title(f"{part}: {result['count']:,}")
        column[-1 if disk else -2].set_xlabel("minutes" if seconds else "retrains")
    return figure


def _count(values: list[float], seconds: list[float] | None) -> list[float]:
    return [second / 60 for second in seconds] if seconds else list(range(1, len(values) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {"predict": 5000, "serve": 2000, "clips": 100, "retrain": 20}
    for part, option in zip(counts, ("photos", "requests", "clips", "retrains"), strict=True):
        parser.add_argument(f"--{option}", dest=part, type=int, default=counts[part])
    parser.add_argument("--only", nargs="+", choices=counts, default=list(counts))
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {"parts": {}}
    results["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model("efficientnet_lite0", folder / "model")
        parts: dict[str, Callable[[int], Curve]] = {
            "predict": lambda count: predict(model, write_photos(folder / "photos", count)),
            "serve": lambda count: serve(model, write_photos(folder / "uploads", DIFFERENT), count),
            "clips": lambda count: predict(model, write_clips(folder / "clips", count)),
            "retrain": lambda count: retrain(folder, count),
        }
        for part in options.only:
            count = getattr(options, part)
            curve = parts[part](count)
            results["parts"][part] = {"count": count, "summary": summarise(curve), "curve": thin(curve)}
            print(part, results["parts"][part]["summary"], flush=True)
            write_json(options.output, results)
    plot(results["parts"]).savefig(options.output.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
