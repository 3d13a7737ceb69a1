"""Preparing and training at the size of the three real data sets: seconds and memory of each stage, beside its floor.

    python benchmarks/full_size.py ARCHIVES [--pictures 140000] [--folder FOLDER] [--output FILE]

ARCHIVES holds real-and-fake-face-detection.zip and 140k-real-and-fake-faces.zip, however small. Of their faces,
archives of the true layout and size are made in a temporary folder, in FOLDER if that is named: each picture is two
faces of a class, cropped at random, blended and tinted. 140,000 are of 256 x 256 pixels; 2,041 of 600 x 600 pixels, as
progressive JPEGs, come three times. With another number of `--pictures`, the 2,041 are scaled with it.

Measured, each flow in a process of its own: `prepare`, `prepare` on a Ray cluster, `prepare` again, `prepare` with 1 %
new, and `train` with two epochs of `cnn`. The cluster is a node of this machine with all its cores; it starts from
nothing, and what it prepares must be the same.

Stages are Prefect's task runs. Memory is the process's own (RssAnon), without pages of files that the system takes
back, and without Prefect's server and Ray's workers. Floors are measured on the same archives in the same run, with a
thread per core: reading the archives; decoding their JPEGs from memory; copying their files; bare training steps on a
resident batch. Results go into benchmarks/results/full_size.json and full_size.png.
"""

import argparse
import csv
import hashlib
import io
import logging
import multiprocessing
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from bisect import bisect
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import simplejpeg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.data_speed import each, measure_disk, read_images
from deepfake_core.config import CLASS_NAMES, KAGGLE_SOURCES, DataParameters, TrainingParameters
from deepfake_core.data.contents import MIN_DECODED_PIXELS
from deepfake_core.data.dataset import open_dataset
from deepfake_core.data.images import load_images
from deepfake_core.detector import open_image, resize_image
from deepfake_core.storage.files import write_json

RESULTS = Path(__file__).parent / "results"
CORES = os.cpu_count() or 1
SMALL, LARGE = 256, 600
TRUE_SIZE = {"small": 140_000, "real": 1081, "fake": 960}
SHARE_NEW = 0.01
SAMPLE = 2000
EPOCHS = 2
SECONDS_BETWEEN_LOOKS = 0.1
ON_CLUSTER = "prepare on a cluster"
MAX_SECONDS_TO_START = 300
MAX_SECONDS_TO_RECORD = 60
"""Prefect's server hears of a task's end a little later."""
DRAWN_AT_ONCE = 1000
PARTS = ("train",) * 5 + ("valid", "test")
"""Of seven pictures of the 140k set, where each is in the archive."""

Faces = dict[str, list[Image.Image]]
"""Decoded faces by label."""


# --- the archives


def read_faces(archives: Path, name: str, side: int) -> Faces:
    """Decode the different faces of an archive at a size."""
    faces: Faces = {}
    with zipfile.ZipFile(archives / f"{name}.zip") as archive:
        members = [member for member in archive.namelist() if member.endswith(".jpg")]
        seen = {(Path(member).parent.name.removeprefix("training_"), Path(member).name): member for member in members}
        for (label, _), member in seen.items():
            with Image.open(archive.open(member)) as image:
                faces.setdefault(label, []).append(image.convert("RGB").resize((side, side)))
    return faces


def draw_picture(faces: list[Image.Image], seed: list[int]) -> Image.Image:
    """Blend crops of two faces, and tint them."""
    random = np.random.default_rng(seed)
    side, crops = faces[0].width, []
    for number in random.choice(len(faces), 2, replace=False):
        size = random.uniform(0.8, 1) * side
        left, top = random.uniform(0, side - size, 2)
        crops.append(
            faces[number].resize((side, side), Image.Resampling.BILINEAR, (left, top, left + size, top + size))
        )
    blended = Image.blend(*crops, random.uniform(0.25, 0.75))
    tint = np.arange(256) * random.uniform(0.8, 1.1, (3, 1)) + random.uniform(0, 10, (3, 1))
    return blended.point(np.clip(tint, 0, 255).astype(int).ravel().tolist())


def draw_small(faces: Faces, number: int) -> tuple[str, str, bytes]:
    """Draw a picture of the 140k set; return its label, its name and its bytes."""
    label = CLASS_NAMES[number % 2]
    random = np.random.default_rng([1, number])
    fake = "".join(random.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), 10))
    name = f"{number // 2:05}.jpg" if label == "real" else f"{fake}.jpg"
    pixels = np.asarray(draw_picture(faces[label], [2, number]))
    return label, name, simplejpeg.encode_jpeg(pixels, quality=int(random.integers(80, 96)), colorsubsampling="420")


def draw_large(faces: Faces, label: str, number: int) -> tuple[str, str, bytes]:
    """Draw a picture of ciplab's set, as `draw_small` does."""
    kind, bits = ("easy", "mid", "mid", "hard")[number % 4], f"{number % 15 + 1:04b}"
    name = f"real_{number + 1:05}.jpg" if label == "real" else f"{kind}_{number + 1}_{bits}.jpg"
    buffer = io.BytesIO()
    draw_picture(faces[label], [3, CLASS_NAMES.index(label), number]).save(buffer, "JPEG", quality=95, progressive=True)
    return label, name, buffer.getvalue()


def draw_all(draw: Callable[[Any], tuple[str, str, bytes]], whats: range) -> Iterator[tuple[str, str, bytes]]:
    """Draw pictures on all cores, a few ahead of what is written."""
    with ThreadPoolExecutor(CORES) as pool:
        for start in range(0, len(whats), DRAWN_AT_ONCE):
            yield from pool.map(draw, whats[start : start + DRAWN_AT_ONCE])


def write_large(folder: Path, faces: Faces, counts: dict[str, int]) -> None:
    """Write ciplab's archive, and the one that holds its pictures again."""
    first, again = (folder / f"{source.short_name}.zip" for source in KAGGLE_SOURCES[:2])
    with zipfile.ZipFile(first, "w") as archive, zipfile.ZipFile(again, "w") as copy:
        for label, count in counts.items():
            for _, name, data in draw_all(lambda number, label=label: draw_large(faces, label, number), range(count)):
                archive.writestr(f"real_and_fake_face/training_{label}/{name}", data)
                archive.writestr(f"real_and_fake_face_detection/real_and_fake_face/training_{label}/{name}", data)
                copy.writestr(f"{label}/{name}", data)


def write_small(folder: Path, faces: Faces, start: int, end: int) -> None:
    """Write the archive of the 140k set with pictures 0 to `end`; those before `start` are in the one that is there."""
    file = folder / f"{KAGGLE_SOURCES[2].short_name}.zip"
    beside = file.with_suffix(".beside")
    rows: dict[str, list[list[Any]]] = {part: [] for part in PARTS}

    def add(archive: zipfile.ZipFile, path: str, data: bytes) -> None:
        part, label, name = path.split("/")
        archive.writestr(f"real_vs_fake/real-vs-fake/{path}", data)
        rows[part].append([len(rows[part]), name, Path(name).stem, int(label == "real"), label, path])

    with zipfile.ZipFile(beside, "w") as archive:
        if start:
            with zipfile.ZipFile(file) as before:
                for member in before.namelist():
                    if member.endswith(".jpg"):
                        add(archive, "/".join(Path(member).parts[-3:]), before.read(member))
        numbers = range(start, end)
        drawn = draw_all(lambda number: draw_small(faces, number), numbers)
        for number, (label, name, data) in zip(numbers, drawn, strict=True):
            add(archive, f"{PARTS[number % len(PARTS)]}/{label}/{name}", data)
        for part, lines in rows.items():
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(["", "original_path", "id", "label", "label_str", "path"])
            writer.writerows(lines)
            archive.writestr(f"{part}.csv", text.getvalue())
    beside.replace(file)


# --- what is measured


@contextmanager
def watch_memory() -> Iterator[list[tuple[float, float]]]:
    """Note the time and this process's own memory in GB, again and again until the end of the block."""
    looks: list[tuple[float, float]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            looks.append((time.time(), int(line) / 1e6))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield looks
    finally:
        ended.set()
        watcher.join()


class Lines(logging.Handler):
    """Keep what the product logs, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.created, record.getMessage()))

    def find(self, pattern: str) -> list[float]:
        return [created for created, message in self.lines if re.search(pattern, message)]


def run_flow(data: DataParameters, dataset: str = "") -> dict[str, Any]:
    """Run `prepare`, or `train` on a data set; return its seconds and peak memory, and those of its stages."""
    logger, lines = logging.getLogger("deepfake_core"), Lines()
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    training = TrainingParameters(candidates=("cnn",), epochs=EPOCHS)
    with watch_memory() as looks:
        if dataset:
            from flows.train import train

            state = train(dataset, training, return_state=True)
        else:
            from flows.prepare import prepare

            state = prepare(data, return_state=True)
        result = {"value": state.result()}
    spans = read_spans(state.state_details.flow_run_id)
    if dataset:
        (begun,) = lines.find("parameters, computed in")
        epochs = lines.find(r"^cnn epoch \d")
        spans["epochs"] = (begun, epochs[-1])
        result["seconds_to_training"] = begun - spans["all"][0]
        result["memory_growth_gb"] = find_peak(looks, epochs[0], epochs[-1]) - find_peak(looks, begun, epochs[0])
    stages = {
        name: {"seconds": last - first, "memory_gb": find_peak(looks, first, last)}
        for name, (first, last) in spans.items()
    }
    return {**stages.pop("all"), **result, "stages": stages}


@contextmanager
def start_cluster() -> Iterator[dict[str, str]]:
    """Start a Ray node with all cores, and a Prefect server that it reaches; yield the environment to use them in."""
    ports = [free_port() for _ in range(3)]
    api, here = f"http://127.0.0.1:{ports[2]}/api", Path(sys.executable)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the driver sends its code
    with tempfile.TemporaryDirectory(prefix="ray") as folder, ExitStack() as running:  # a short path: sockets are in it
        node = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"]
        node += ["--node-ip-address=127.0.0.1", f"--num-cpus={CORES}", f"--port={ports[0]}", f"--temp-dir={folder}/ray"]
        node += [f"--ray-client-server-port={ports[1]}", "--object-store-memory=80000000"]
        log = Path(folder, "log")
        for name, *arguments in (node, ["prefect", "server", "start", "--no-ui", f"--port={ports[2]}"]):
            with log.open("a") as said:
                process = subprocess.Popen([here.with_name(name), *arguments], env=clean, stdout=said, stderr=said)
            running.callback(process.wait)
            running.callback(process.terminate)
        start = time.monotonic()
        while "Ray runtime started" not in log.read_text() or not answers(f"{api}/health"):
            if time.monotonic() > start + MAX_SECONDS_TO_START:
                raise TimeoutError(f"Ray and Prefect must start in {MAX_SECONDS_TO_START} s. Said: {log.read_text()}")
            time.sleep(1)
        yield {"PREFECT_API_URL": api, "CLUSTER": f"127.0.0.1:{ports[0]}"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url).is_success
    return False


def prepare_on_cluster(data: DataParameters, data_dir: str) -> dict[str, Any]:
    """Run `prepare` anew in another folder."""
    with start_cluster() as environment:
        os.environ |= environment
        return run_flow(data.model_copy(update={"data_dir": data_dir, "cluster": environment["CLUSTER"]}))


def find_peak(looks: list[tuple[float, float]], first: float, last: float) -> float:
    """Return the most memory from one look before a time to the first look after another."""
    times, memory = zip(*looks, strict=True)
    return max(memory[max(0, bisect(times, first) - 1) : bisect(times, last) + 1])


def read_spans(flow_run: UUID) -> dict[str, tuple[float, float]]:
    """Return when a flow run began and ended ("all"), and each of its stages, once Prefect's server knows."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        for _ in range(MAX_SECONDS_TO_RECORD):
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])))
            if runs and all(run.end_time for run in runs):
                break
            time.sleep(1)
        flow = client.read_flow_run(flow_run)
    spans = {"all": (flow.start_time.timestamp(), flow.end_time.timestamp())}
    for run in sorted(runs, key=lambda run: run.start_time):
        name = re.sub(r"^(download|index|compare hash tables|compare pairs|train) .+|-[0-9a-f]{3}$", r"\1", run.name)
        begin, end = run.start_time.timestamp(), run.end_time.timestamp()
        first, last = spans.get(name, (begin, end))
        spans[name] = (min(first, begin), max(last, end))
    return spans


def measure_floors(folder: Path) -> dict[str, float]:
    """Measure reading, hashing, decoding, copying and bare steps: per second and, of pictures, at each size."""
    from benchmarks.training_speed import RECIPE, measure_candidate
    from deepfake_core.models import CANDIDATES
    from deepfake_core.training.devices import choose_precision

    rates: dict[str, float] = {}
    archives = list(folder.glob("*.zip"))
    rates["read_bytes"] = sum(file.stat().st_size for file in archives) / time_once(lambda: read_whole(archives))
    for side, source, part in ((SMALL, 2, "real_vs_fake/"), (LARGE, 0, "real_and_fake_face/")):
        images = read_images(folder / f"{KAGGLE_SOURCES[source].short_name}.zip", part)[:SAMPLE]

        def decode_grey(data: bytes) -> None:
            simplejpeg.decode_jpeg(data, "GRAY", min_height=MIN_DECODED_PIXELS, min_width=MIN_DECODED_PIXELS)

        def decode(data: bytes) -> None:
            with open_image(data) as image:
                image.load()

        def decode_and_resize(data: bytes) -> None:
            with open_image(data) as image:
                resize_image(image, CANDIDATES["cnn"].RECIPE.image_size)

        if side == SMALL:
            seconds = time_once(lambda images=images: each(hashlib.sha256, images))
            rates["hash_bytes"] = sum(map(len, images)) / seconds
        rates[f"grey_{side}"] = len(images) / time_once(lambda images=images: each(decode_grey, images))
        rates[f"decode_{side}"] = len(images) / time_once(lambda images=images: each(decode, images))
        rates[f"resize_{side}"] = len(images) / time_once(lambda images=images: each(decode_and_resize, images))
        rates[f"copy_{side}"] = len(images) / measure_copying(images, folder)
    rates["steps"] = measure_candidate("cnn", choose_precision("auto", CANDIDATES["cnn"].build(RECIPE)))
    return rates


def time_once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_whole(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 20):
                pass


def measure_copying(images: list[bytes], folder: Path) -> float:
    """Return the seconds in which files are copied from folder to folder."""
    with tempfile.TemporaryDirectory(dir=folder) as one, tempfile.TemporaryDirectory(dir=folder) as other:
        files = [Path(one) / f"{number}.jpg" for number in range(len(images))]
        for file, data in zip(files, images, strict=True):
            file.write_bytes(data)
        with ThreadPoolExecutor(CORES) as pool:
            return time_once(lambda: list(pool.map(lambda file: shutil.copyfile(file, f"{other}/{file.name}"), files)))


def measure_decoding(address: str) -> dict[str, float]:
    """Decode the validation split anew for `cnn`, as before an accelerator is used, and keep the pixels."""
    from deepfake_core.models import CANDIDATES

    dataset, size = open_dataset(address), CANDIDATES["cnn"].RECIPE.image_size
    shutil.rmtree(dataset.store.batches(dataset.version, size))
    start = time.perf_counter()
    images = load_images(dataset, "val", size)
    return {"images": len(images), "seconds": time.perf_counter() - start}


def add_floors(
    flows: dict[str, Any], decoding: dict[str, float], rates: dict[str, float], folder: Path, counts: dict[str, int]
) -> None:
    """Put beside the stages what their bytes and pictures take alone."""
    dataset = open_dataset(flows["prepare"]["value"])
    kept = dataset.manifest[dataset.manifest["kept"]]

    def count(rows: Any, kind: str) -> float:
        small = int((rows["width"] <= SMALL).sum())
        return small / rates[f"{kind}_{SMALL}"] + (len(rows) - small) / rates[f"{kind}_{LARGE}"]

    first, new, training = (flows[name]["stages"] for name in ("prepare", "prepare with 1 % new", "train"))
    read = sum(file.stat().st_size for file in folder.glob("*.zip")) / rates["read_bytes"]
    first["download"]["floor_seconds"] = new["download"]["floor_seconds"] = read
    first["index"]["floor_seconds"] = (
        counts["small"] / rates[f"grey_{SMALL}"] + (counts["real"] + counts["fake"]) / rates[f"grey_{LARGE}"]
    )
    grown = (folder / f"{KAGGLE_SOURCES[2].short_name}.zip").stat().st_size  # the others are unchanged
    new["index"]["floor_seconds"] = grown / rates["hash_bytes"] + counts["new"] / rates[f"grey_{SMALL}"]
    first["merge"]["floor_seconds"] = count(kept, "copy")
    new["merge"]["floor_seconds"] = counts["new"] / rates[f"copy_{SMALL}"]
    val = kept[kept["split"] == "val"]
    decoding |= {"floor_seconds": count(val, "decode"), "resized_floor_seconds": count(val, "resize")}
    training["epochs"]["floor_seconds"] = EPOCHS * int((kept["split"] == "train").sum()) / rates["steps"]


def plot_stages(flows: dict[str, Any]) -> Figure:
    """Draw the seconds of each stage that takes one or more, beside its floor."""
    bars = [
        (f"{flow}: {name}", stage["seconds"], stage.get("floor_seconds", 0))
        for flow, result in flows.items()
        for name, stage in result["stages"].items()
        if stage["seconds"] >= 1
    ]
    names, seconds, floors = zip(*reversed(bars), strict=True)
    figure = Figure(figsize=(8, 1 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(bars))
    axes.barh(places + 0.2, seconds, 0.4, color="#2c7fb8", label="measured")
    axes.barh(places - 0.2, floors, 0.4, color="#969696", label="floor")
    axes.set(yticks=places, yticklabels=names, xlabel="seconds", xscale="log")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="upper right")
    return figure


def run_alone(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Run in a new process, so that memory is the function's own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(archives: Path, folder: Path, pictures: int) -> dict[str, Any]:
    counts = {name: max(8, round(count * pictures / TRUE_SIZE["small"])) for name, count in TRUE_SIZE.items()}
    counts["new"] = max(1, round(SHARE_NEW * counts["small"]))
    made = folder / "archives"
    made.mkdir(parents=True)
    small, large = (read_faces(archives, KAGGLE_SOURCES[i].short_name, side) for i, side in ((2, SMALL), (0, LARGE)))
    write_large(made, large, {label: counts[label] for label in CLASS_NAMES})
    write_small(made, small, 0, counts["small"])
    sources = tuple(one.model_copy(update={"name": f"{made}/{one.short_name}.zip"}) for one in KAGGLE_SOURCES)
    data = DataParameters(sources=sources, data_dir=f"{folder}/data")
    rates = run_alone(measure_floors, made)
    flows: dict[str, Any] = {}
    for name in ("prepare", "prepare again", "prepare with 1 % new", "train"):
        if "new" in name:
            write_small(made, small, counts["small"], counts["small"] + counts["new"])
        dataset = flows["prepare"]["value"] if name == "train" else ""
        flows[name] = run_alone(run_flow, data, dataset)
        flows[name]["disk_gb"] = measure_disk(folder / "data") / 1e9
        print(f"{name}: {flows[name]}", flush=True)
        if name == "prepare":
            flows[ON_CLUSTER] = there = run_alone(prepare_on_cluster, data, f"{folder}/there")
            there["disk_gb"] = measure_disk(folder / "there") / 1e9
            if Path(there["value"]).name != Path(flows[name]["value"]).name:
                raise ValueError(f"A cluster must make the same data set. Received: {there['value']}.")
            shutil.rmtree(folder / "there")
            print(f"{ON_CLUSTER}: {there}", flush=True)
    decoding = run_alone(measure_decoding, flows["prepare"]["value"])
    add_floors(flows, decoding, rates, made, counts)
    for result in flows.values():
        del result["value"]
    return {
        "machine": f"{CORES} cores, {platform.machine()}, {platform.system()}",
        "counts": counts,
        "archives_gb": measure_disk(made) / 1e9,
        "rates": rates,
        "flows": flows,
        "decoding": decoding,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--pictures", type=int, default=TRUE_SIZE["small"])
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; emptied afterwards")
    parser.add_argument("--output", type=Path, default=RESULTS / "full_size.json")
    options = parser.parse_args()
    archives, output = options.archives.absolute(), options.output.absolute()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        os.environ |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{name}/mlflow.db",
            "PREFECT_HOME": f"{name}/prefect",
            "PREFECT_PROFILE": "ephemeral",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
        }
        os.chdir(name)
        results = measure(archives, Path(name), options.pictures)
    plot_stages(results["flows"]).savefig(output.with_suffix(".png"), dpi=110)
    write_json(output, results)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
