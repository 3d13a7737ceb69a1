"""How soon and how fast `deepfake predict` answers, beside bare ONNX Runtime and bare decoding in the same run.

    python benchmarks/serving_speed.py ARCHIVES [--images 512] [--rounds 5]

ARCHIVES holds the three zips, of which images of 140k-real-and-fake-faces.zip are judged. Cold: a process of its own,
from its start to its end, for one image; beside it a script that decodes, resizes and scores it with Pillow and ONNX
Runtime alone. Throughput: the predictor, decoding alone (its threads, its functions) and scoring alone (batches that
are there already); nothing that does both is faster than one after the other on the same cores: the `floor`. The sides
take turns; figures are medians. Weights don't matter for speed: networks are as they are before training. Results go
into benchmarks/results/serving_speed.json.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deepfake_core.detector import Detector, decode_image, resize_image
from deepfake_core.models import CANDIDATES
from deepfake_core.serving.predictor import Predictor
from deepfake_core.storage.files import write_json
from deepfake_core.training.export import CHECKPOINT, export_detector

RESULTS = Path(__file__).parent / "results"
BARE = """
import sys
import numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
given = session.get_inputs()[0]
side = given.shape[1]
image = Image.open(sys.argv[2]).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
print(session.run(None, {given.name: numpy.asarray(image, numpy.float32)[None]})[0][0, 0])
"""


def make_model(architecture: str, folder: Path) -> Path:
    recipe = CANDIDATES[architecture].RECIPE
    folder.mkdir()
    CANDIDATES[architecture].build(recipe).save(folder / CHECKPOINT)
    export_detector(folder / CHECKPOINT, folder, {"architecture": architecture, "image_size": recipe.image_size})
    return folder


def measure_cold(model: Path, image: Path, rounds: int) -> dict[str, float]:
    deepfake = [str(Path(sys.executable).parent / "deepfake")]
    predict = [*deepfake, "predict", str(image), "--json", "--model", str(model)]
    commands = {
        "help": [*deepfake, "--help"],
        "bare": [sys.executable, "-c", BARE, str(model), str(image)],
        "predict_no_detect": [*predict, "--no-detect"],
        "predict": predict,
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / bare for ours, bare in zip(seconds["predict_no_detect"], seconds["bare"], strict=True)]
    return {**medians, "times_bare": statistics.median(ratios)}


def measure_throughput(model: Path, files: list[Path], rounds: int) -> dict[str, float]:
    detector = Detector(model)
    plain, detecting = Predictor(detector, detect=False), Predictor(detector)
    sources = [(str(file), file) for file in files]
    size = detector.image_size
    pixels = np.stack([resize_image(decode_image(file.read_bytes()), size) for file in files])

    def decode_all() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: resize_image(decode_image(file.read_bytes()), size), files))

    sides: dict[str, Callable[[], Any]] = {
        "decoding": decode_all,
        "scoring": lambda: detector.score(pixels),
        "predict_no_detect": lambda: list(plain.judge(sources)),
        "predict": lambda: list(detecting.judge(sources)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            rates[name].append(len(files) / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    floor = 1 / (1 / medians["decoding"] + 1 / medians["scoring"])
    return {
        **medians,
        "floor": floor,
        "of_slower": medians["predict_no_detect"] / min(medians["decoding"], medians["scoring"]),
        "of_floor": medians["predict_no_detect"] / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = zipfile.ZipFile(options.archives / "140k-real-and-fake-faces.zip")
        names = [
            name for name in archive.namelist() if name.endswith(".jpg") and archive.getinfo(name).file_size > 5000
        ]
        files = []
        for number, name in enumerate(names[: options.images]):
            files.append(folder / f"{number}.jpg")
            files[-1].write_bytes(archive.read(name))
        cold, throughput = {}, {}
        for architecture in ("efficientnet_lite0", "cnn"):
            model = make_model(architecture, folder / architecture)
            cold[architecture] = measure_cold(model, files[0], 2 * options.rounds + 1)
            throughput[architecture] = measure_throughput(model, files, options.rounds)
            print(architecture, cold[architecture], throughput[architecture], sep="\n", flush=True)
        machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
        write_json(
            RESULTS / "serving_speed.json",
            {"machine": machine, "images": len(files), "cold_seconds": cold, "images_per_second": throughput},
        )


if __name__ == "__main__":
    main()
