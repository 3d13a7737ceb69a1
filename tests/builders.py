"""Small real things that tests share: drawn images, zips, data sets, clips, a process that holds a lock."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from deepfake_core.config import (
    DEFAULT_MODEL,
    AugmentationParameters,
    DataParameters,
    PromotionParameters,
    Recipe,
    Source,
)
from deepfake_core.data.archive import Archive
from deepfake_core.data.confirmed import fetch_confirmed
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.images import Images
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_links
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.data.split_memory import read_memory
from deepfake_core.data.splits import assign_splits
from deepfake_core.demo.faces import Pose
from deepfake_core.demo.forgeries import take_photograph
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.evaluation import Estimate, Evaluation
from deepfake_core.evaluation.promotion import Comparison, Cost
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.serving.batch_scoring import ScoredTable, cut_images, join_shards, score_shard
from deepfake_core.serving.load_versions import Judge
from deepfake_core.storage.files import hash_file, write_json
from deepfake_core.storage.store import Store, open_store

T = TypeVar("T")

ROOT = Path(__file__).parents[1]

FACES = Path(os.environ.get("DEEPFAKE_FACES") or ROOT.parent / "shared")
"""Where real face images are, which are no part of the project: DEEPFAKE_FACES, else a folder beside the checkout."""

needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="jax is not installed")
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
needs_faces = pytest.mark.skipif(
    not (FACES / "build_archives.py").is_file(), reason=f"real face images are not at {FACES}: set DEEPFAKE_FACES"
)


FORMER = ROOT / "tests" / "registry" / "former_model"
"""A model as commit ea14cf4 wrote it, with that commit's code."""


def copy_former(folder: Path) -> Path:
    """Copy the three files of a detector that former code wrote into a new folder."""
    return Path(shutil.copytree(FORMER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def draw_image(seed: int, size: int = 48, cells: int = 6) -> Image.Image:
    """Draw a random picture of so many smooth cells a side; other seeds give other pictures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def draw_portrait(seed: int, size: int = 160) -> Image.Image:
    """Draw a person, whose face a detector finds."""
    random = np.random.default_rng(seed)
    return take_photograph(random, Pose.draw(random), size)


def draw_scene(people: Mapping[tuple[int, int], Image.Image], width: int = 640, height: int = 480) -> Image.Image:
    """Paste people at their left and top onto a background without faces."""
    scene = draw_image(99, max(width, height), cells=4).crop((0, 0, width, height))
    for corner, person in people.items():
        scene.paste(person, corner)
    return scene


def jpeg(seed: int, size: int = 48) -> bytes:
    return encode(draw_image(seed, size), quality=90)


def mpo(image: Image.Image) -> bytes:
    """Encode an image as phones and cameras do: Exif, and a smaller picture behind the first."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Maker", "Phone"
    return encode(image, "MPO", save_all=True, append_images=[image.resize((64, 64))], exif=exif, quality=90)


def recode(data: bytes) -> bytes:
    """Return other bytes with the same pixels: a JPEG with a comment segment."""
    return data[:2] + b"\xff\xfe\x00\x07hello" + data[2:]


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def keep_download(file: Path, source: Source, store: Store) -> Archive:
    """Copy a zip to where the store keeps version 1 of a Kaggle source, as if it had been downloaded."""
    path = store.archives(source.name) / "1.zip"
    path.parent.mkdir(parents=True)
    shutil.copy(file, path)
    state = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    write_json(path.with_suffix(".json"), {**state, "version": 1, "licence": None, "downloaded_at": None})
    return fetch_archive(source, store)


def faces(count: int, start: int = 0) -> dict[str, bytes]:
    """Return `count` images per class, as members of a zip."""
    members = {f"real/{i}.jpg": jpeg(start + i) for i in range(count)}
    return members | {f"fake/{i}.jpg": jpeg(10_000 + start + i) for i in range(count)}


def free_port() -> int:
    """Return a port on loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], T]) -> T:
    """Return the condition's value once it is true. How long that may take is the limit of every test."""
    while not (result := condition()):
        time.sleep(0.2)
    return result


def find_events(name: str, since: datetime) -> list[dict[str, Any]]:
    """Return the events of a name that Prefect's server has got since a time, the newest first."""
    from prefect.client.orchestration import get_client

    wanted = {"occurred": {"since": since.isoformat()}, "event": {"name": [name]}}
    with get_client(sync_client=True) as client:
        return client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"]


@contextmanager
def hold_data(data_dir: Path, holder: str) -> Iterator[subprocess.Popen]:
    """Let another process hold the data folder's lock; it is killed at the end."""
    code = (
        "import sys, time; from pathlib import Path; from deepfake_core.storage.locks import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(data_dir), holder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


NAME = DEFAULT_MODEL
SIZE = 32
STILL = AugmentationParameters(rotation=0, width_shift=0, height_shift=0, zoom=0, horizontal_flip=False)
RECIPE = Recipe(
    image_size=SIZE, batch_size=16, epochs=4, patience=10, learning_rate=0.001, augmentation=STILL, precision="float32"
)
"""Of the reference CNN, small."""


def stripes(count: int, seed: int) -> Images:
    """Make images that differ by class: fakes have a bright left half."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 120, (count, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[labels == 1, :, : SIZE // 2] += 100
    return Images(pixels, labels.astype(np.int8), pd.DataFrame({"source": ["drawn"] * count, "group": range(count)}))


def prepare(
    data_dir: str | Path, *zips: Path, test_fraction: float = 0.25, val_fraction: float = 0.25, **more: object
) -> Dataset:
    """Publish a data set of local zips, as the flow `prepare` does."""
    sources, store = tuple(Source(name=str(path)) for path in zips), open_store(data_dir)
    confirmed = fetch_confirmed("auto", store)
    data = DataParameters(sources=sources, test_fraction=test_fraction, val_fraction=val_fraction, **more)
    archives = [fetch_archive(source, store) for source in (*data.sources, *confirmed)]
    index = pd.concat([build_index(archive, store) for archive in archives])
    links = find_links(index)
    rows = assign_splits(mark_duplicates(index, links), links, read_memory(store), val_fraction, test_fraction)
    return publish_dataset(rows, archives, store, data)


def draw_scores(count: int, seed: int = 0, gain: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and scores that are the higher for fakes the greater the gain."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return labels, 1 / (1 + np.exp(-random.normal(gain * (labels - 0.5), 1)))


def write_clip(
    file: Path, frames: Sequence[Image.Image], gop: int = 50, codec: str = "libx264", rate: int = 25
) -> Path:
    """Encode images as a clip with a key frame every `gop` frames."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", gop, 2_000_000
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "quality 30": lambda image: Image.open(io.BytesIO(encode(image, quality=30))),
    "a quarter": lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
    "twice": lambda image: image.resize((512, 512), Image.Resampling.LANCZOS),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "darker": lambda image: image.point(lambda value: value * 0.9),
}
"""What becomes of pictures of 256 pixels on their way through the web, which leaves them the same picture."""


def forbid(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """Fail the test if any of these functions, by their dotted names, is called."""
    for target in targets:

        def refuse(*_: object, target: str = target, **__: object) -> None:
            raise AssertionError(f"{target} must not be called")

        monkeypatch.setattr(target, refuse)


NO_FLOORS = PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)
CHEAP = Cost(latency=5, size=10)
GOOD = Confusion(true_positives=80, false_positives=20, true_negatives=80, false_negatives=20)


def make_evaluation(confusion: Confusion = GOOD, auc: float = 0.9, recall: float = 0.8) -> Evaluation:
    source = Evaluation(confusion, {"recall": Estimate(recall, recall - 0.1, recall + 0.1)})
    return Evaluation(confusion, {"auc": Estimate(auc, auc - 0.02, auc + 0.02)}, {"source": {"a": source}})


def make_comparison(probability: float, auc: float = 0.9, other: float = 0.85, recall: float = 0.8) -> Comparison:
    difference = Estimate(auc - other, 0.01, 0.09)
    return Comparison(
        make_evaluation(auc=auc, recall=recall), make_evaluation(auc=other), "auc", difference, probability
    )


VERDICT = GivenVerdict(label="real", probability=0.1, sure=True, version="a model version 1", box=(0, 0, 9, 9), faces=1)


def score_images(judge: Judge, images: Path, output: Path) -> ScoredTable:
    """Write a table of scores, as the flow `score` does."""
    shards = cut_images(images, output, judge)
    for shard in shards:
        score_shard(shard)
    return join_shards(shards, output)
