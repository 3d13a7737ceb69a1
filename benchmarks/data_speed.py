"""Speed of index, pair search and merge, each beside what it is held against, in one run.

    python benchmarks/data_speed.py ARCHIVES

ARCHIVES holds real-and-fake-face-detection.zip and 140k-real-and-fake-faces.zip. Measured are, with a thread per core:

- index: from a zip to the finished index, against libjpeg-turbo's scaled grey decoding of the same bytes in memory (the
  floor), and against `imagehash.phash` with Pillow;
- growth: the index of an archive that grew by 1 %, against that of the same archive from nothing;
- merge: publishing split folders from a zip, against copying the same images from folder to folder;
- pair search: 20,000 to 1,000,000 simulated hashes with neighbours planted at known distances, against faiss's exact
  search, each in a process of its own; and 140,000 images through all views;
- engines: 20,000 pictures of seven views with such neighbours, searched for by the product (which compares all pairs of
  so few), by its hash tables alone, by faiss's exact search and by faiss's IndexBinaryMultiHash.

Each round measures all sides in turn; its numbers are medians of the rounds. The results go into
benchmarks/results/data_speed.json and pair_search.png, which docs/benchmarks.md quotes.
"""

import argparse
import io
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import faiss
import imagehash
import numpy as np
import simplejpeg
from matplotlib.figure import Figure
from PIL import Image

from deepfake_core.config import KAGGLE_SOURCES, DataParameters, Source
from deepfake_core.data import hashes, neighbours
from deepfake_core.data.archive import Archive
from deepfake_core.data.contents import MIN_DECODED_PIXELS
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import MAX_HASH_DISTANCE_BITS
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.data.splits import assign_splits
from deepfake_core.storage.files import write_json
from deepfake_core.storage.store import open_store

FOLDER = Path(__file__).parent / "results"
CORES = os.cpu_count() or 1
SIZES = (20_000, 50_000, 100_000, 140_000, 200_000, 500_000, 1_000_000)
MAX_FLAT_HASHES = 200_000
DISTANCES = (20, 30, 40, 50, 60)
PLANTED = 1000
"""Pairs planted at each distance."""

PICTURES = 20_000
"""So many are searched by each engine."""

MULTI_HASHES = ((16, 16, 1), (12, 20, 2), (16, 16, 2))
"""Settings of faiss's multi-hash: tables, bits in each, and bits that may differ in a table (`nflip`)."""


def time_rounds(rounds: int, **sides: Callable[[], object]) -> dict[str, float]:
    """Time each side once a round, in turn; return the medians in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def each(run: Callable[[bytes], object], images: Sequence[bytes]) -> None:
    """Run a function on all images, a thread per core."""
    parts = [images[start : start + 64] for start in range(0, len(images), 64)]
    with ThreadPoolExecutor(CORES) as pool:
        for _ in pool.map(lambda part: [run(data) for data in part], parts):
            pass


def read_images(path: Path, part: str) -> list[bytes]:
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith(".jpg") and name.startswith(part)]


def repeat(images: Iterable[bytes], times: int) -> list[bytes]:
    """Make JPEGs of other bytes with the same pixels, by a comment that numbers them."""
    return [data[:2] + b"\xff\xfe\x00\x06%04d" % number + data[2:] for number in range(times) for data in images]


def write_zip(path: Path, images: Sequence[bytes]) -> Archive:
    with zipfile.ZipFile(path, "w") as archive:
        for number, data in enumerate(images):
            archive.writestr(f"{('real', 'fake')[number % 2]}/{number}.jpg", data)
    return fetch_archive(Source(name=str(path)), open_store(path.parent))


def measure_index(images: Sequence[bytes], folder: Path, rounds: int) -> dict[str, float]:
    archive = write_zip(folder / "images.zip", images)

    def index() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as data_dir:
            build_index(archive, open_store(data_dir))

    def decode(data: bytes) -> None:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=MIN_DECODED_PIXELS, min_width=MIN_DECODED_PIXELS)

    seconds = time_rounds(
        rounds,
        index=index,
        decoding=lambda: each(decode, images),
        phash=lambda: each(lambda data: imagehash.phash(Image.open(io.BytesIO(data))), images),
    )
    return {
        "images": len(images),
        **{f"{name}_images_per_second": len(images) / value for name, value in seconds.items()},
        "of_decoding": seconds["decoding"] / seconds["index"],
        "times_phash": seconds["phash"] / seconds["index"],
    }


def measure_growth(images: Sequence[bytes], folder: Path) -> dict[str, float]:
    source = folder / "growing.zip"
    before, after = images[: len(images) * 100 // 101], images
    seconds: dict[str, list[float]] = {"first": [], "grown": [], "afresh": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir=folder) as first, tempfile.TemporaryDirectory(dir=folder) as second:
            for name, part, data_dir in (("first", before, first), ("grown", after, first), ("afresh", after, second)):
                archive = write_zip(source, part)
                start = time.perf_counter()
                build_index(archive, open_store(data_dir))
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"images": len(after), "new_images": len(after) - len(before)} | {
        f"{name}_seconds": value for name, value in medians.items()
    }


def measure_merge(images: Sequence[bytes], folder: Path) -> dict[str, float]:
    archive = write_zip(folder / "images.zip", images)
    index = build_index(archive, open_store(folder))
    rows = index.assign(group=index["sha256"], kept=True, reason="kept", copy_of="")  # all, though they are copies
    links = index[["sha256"]].iloc[:0].assign(image="", other="")
    originals, copies, data_dir = folder / "originals", folder / "copies", folder / "data"
    originals.mkdir()
    names = [originals / f"{number}.jpg" for number in range(len(images))]
    for name, data in zip(names, images, strict=True):
        name.write_bytes(data)
    rows = assign_splits(rows, links, {}, 0.15, 0.15)

    def copy() -> None:
        shutil.rmtree(copies, ignore_errors=True)
        copies.mkdir()
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda name: shutil.copyfile(name, copies / name.name), names))

    def publish() -> None:
        shutil.rmtree(data_dir, ignore_errors=True)
        publish_dataset(rows, [archive], open_store(data_dir), DataParameters())

    seconds = time_rounds(5, copying=copy, merge=publish)
    return {
        "images": len(images),
        **{f"{name}_images_per_second": len(images) / value for name, value in seconds.items()},
        "of_copying": seconds["copying"] / seconds["merge"],
    }


def plant_neighbours(count: int) -> tuple[np.ndarray, dict[int, set[tuple[int, int]]]]:
    """Simulate random hashes, with pairs at each distance."""
    random = np.random.default_rng(count)
    simulated = random.integers(0, 256, (count, hashes.HASH_BYTES), dtype=np.uint8)
    places = random.permutation(count)[: 2 * PLANTED * len(DISTANCES)].reshape(len(DISTANCES), PLANTED, 2)
    for distance, pairs in zip(DISTANCES, places, strict=True):
        for one, other in pairs:
            flipped = np.zeros(8 * hashes.HASH_BYTES, bool)
            flipped[random.choice(flipped.size, distance, replace=False)] = True
            simulated[other] = simulated[one] ^ np.packbits(flipped)
    pairs_at = {
        distance: {(int(min(pair)), int(max(pair))) for pair in pairs}
        for distance, pairs in zip(DISTANCES, places, strict=True)
    }
    return simulated, pairs_at


def read_peak_memory() -> float:
    """Return this process's largest resident set so far, in GB; `getrusage` would tell the parent's, if larger."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def measure_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; of one with several names once."""
    found = [file.stat() for file in [path, *path.rglob("*")] if file.is_file()]
    return sum({each.st_ino: each.st_size for each in found}.values())


def search(count: int, exact: bool | None) -> dict:
    """Search `count` simulated hashes; `exact` forces one of the two ways, None leaves the choice to the product."""
    simulated, pairs_at = plant_neighbours(count)
    if exact is not None:
        neighbours.MAX_EXACT_COMPARISONS = 10**15 if exact else 0
    start = time.perf_counter()
    near = neighbours.find_neighbours(simulated[None], MAX_HASH_DISTANCE_BITS)
    seconds = time.perf_counter() - start
    found = set(zip(near.images.tolist(), near.viewed.tolist(), strict=True))
    return {
        "seconds": seconds,
        "recall": {distance: len(pairs & found) / len(pairs) for distance, pairs in pairs_at.items()},
        "peak_memory_gb": read_peak_memory(),
    }


def search_flat(count: int) -> dict:
    """Search with nothing but faiss's exact index."""
    simulated, _ = plant_neighbours(count)
    start = time.perf_counter()
    index = faiss.IndexBinaryFlat(8 * hashes.HASH_BYTES)
    index.add(simulated)
    index.range_search(simulated, MAX_HASH_DISTANCE_BITS + 1)
    return {"seconds": time.perf_counter() - start}


def search_views(count: int) -> dict:
    """Search as `find_links` does, through all views."""
    simulated, _ = plant_neighbours(count * len(hashes.VIEWS))
    start = time.perf_counter()
    neighbours.find_neighbours(simulated.reshape(len(hashes.VIEWS), count, -1), MAX_HASH_DISTANCE_BITS)
    return {"images": count, "seconds": time.perf_counter() - start, "peak_memory_gb": read_peak_memory()}


def plant_in_views(count: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Simulate the hashes of pictures through all views; plant pairs, each through one view that is drawn.

    Returns:
        uint8 of shape (views, count, 32), and for each distance the planted pairs as smaller * count + larger position.
    """
    random = np.random.default_rng(count)
    simulated = random.integers(0, 256, (len(hashes.VIEWS), count, hashes.HASH_BYTES), dtype=np.uint8)
    places = random.permutation(count)[: 2 * PLANTED * len(DISTANCES)].reshape(len(DISTANCES), PLANTED, 2)
    for distance, pairs in zip(DISTANCES, places, strict=True):
        for one, other in pairs:
            flipped = np.zeros(8 * hashes.HASH_BYTES, bool)
            flipped[random.choice(flipped.size, distance, replace=False)] = True
            simulated[random.integers(len(simulated)), other] = simulated[0, one] ^ np.packbits(flipped)
    planted = zip(DISTANCES, places.min(axis=2), places.max(axis=2), strict=True)
    return simulated, {distance: smaller * count + larger for distance, smaller, larger in planted}


def search_pictures(count: int, engine: str, setting: tuple[int, int, int] | None = None) -> dict:
    """Search the views of `count` pictures for whole pictures.

    Args:
        engine: "ours", "tables" (ours, never exact), "flat" or "multi-hash" (faiss's, on their own).
        setting: tables, bits and flips of the multi-hash.
    """
    simulated, planted = plant_in_views(count)
    if engine == "tables":
        neighbours.MAX_EXACT_COMPARISONS = 0
    start, start_of_work = time.perf_counter(), time.process_time()
    if engine in ("ours", "tables"):
        near = neighbours.find_neighbours(simulated, MAX_HASH_DISTANCE_BITS)
        one, other = near.images, near.viewed
    else:
        index = faiss.IndexBinaryFlat(8 * hashes.HASH_BYTES)
        if setting is not None:
            index = faiss.IndexBinaryMultiHash(8 * hashes.HASH_BYTES, *setting[:2])
            index.nflip = setting[2]
        index.add(simulated[0])
        limits, _, one = index.range_search(simulated.reshape(-1, hashes.HASH_BYTES), MAX_HASH_DISTANCE_BITS + 1)
        other = np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64))) % count
    seconds, work = time.perf_counter() - start, time.process_time() - start_of_work
    found = np.minimum(one, other) * count + np.maximum(one, other)
    return {
        "seconds": seconds,
        "cpu_seconds": work,
        "recall": {distance: float(np.isin(pairs, found).mean()) for distance, pairs in planted.items()},
        "peak_memory_gb": read_peak_memory(),
    }


def run_alone(function: Callable[..., dict], *arguments: object) -> dict:
    """Run in a new process, so that memory is the function's own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
    print(f"{function.__name__}{arguments}: {result}", flush=True)
    return result


def describe_machine() -> str:
    """Name the machine, and how busy other work keeps it."""
    return f"{CORES} cores, {platform.machine()}, {platform.system()}, after a load of {os.getloadavg()[0]:.1f}"


def measure_search() -> dict:
    machine, curve = describe_machine(), {}
    for count in SIZES:
        curve[count] = {"ours": run_alone(search, count, None), "tables": run_alone(search, count, False)}
        if count <= MAX_FLAT_HASHES:
            curve[count]["flat"] = run_alone(search_flat, count)
    return {
        "machine": machine,
        "radius": MAX_HASH_DISTANCE_BITS,
        "curve": curve,
        "growth_100k_to_1m": curve[1_000_000]["ours"]["seconds"] / curve[100_000]["ours"]["seconds"],
        "growth_100k_to_1m_tables_alone": curve[1_000_000]["tables"]["seconds"] / curve[100_000]["tables"]["seconds"],
        "all_views": run_alone(search_views, 140_000),
        "engines": compare_engines(),
    }


def compare_engines() -> dict:
    """Search the same simulated pictures by each engine in turn, twice; keep the faster time of each."""
    engines: dict[str, tuple] = {name: (name,) for name in ("ours", "tables", "flat")}
    for tables, bits, flips in MULTI_HASHES:
        name = f"multi-hash, {tables} tables of {bits} bits, {flips} flip{'s' if flips > 1 else ''}"
        engines[name] = ("multi-hash", (tables, bits, flips))
    machine = describe_machine()
    rounds = [{name: run_alone(search_pictures, PICTURES, *given) for name, given in engines.items()} for _ in "12"]
    fastest = {name: min((one[name] for one in rounds), key=lambda found: found["seconds"]) for name in engines}
    return {"machine": machine, "pictures": PICTURES, "found": fastest}


def plot_search(curve: dict[int, dict]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = np.array(list(curve))
    flat = {count: sides["flat"]["seconds"] for count, sides in curve.items() if "flat" in sides}
    largest = max(flat)
    axes.plot(list(flat), list(flat.values()), "s-", color="#777", label="faiss, exact (flat)")
    beyond = sizes[sizes >= largest]
    axes.plot(
        beyond,
        flat[largest] * (beyond / largest) ** 2,
        ":",
        color="#777",
        label="the same, if it grows with the square",
    )
    axes.plot(
        sizes,
        [sides["tables"]["seconds"] for sides in curve.values()],
        "^--",
        color="#d95f0e",
        label="hash tables alone",
    )
    axes.plot(
        sizes, [sides["ours"]["seconds"] for sides in curve.values()], "o-", color="#2c7fb8", label="find_neighbours"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="hashes",
        ylabel="seconds",
        title=f"All pairs within {MAX_HASH_DISTANCE_BITS} of 256 bits",
    )
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    archives = parser.parse_args().archives
    small = read_images(archives / f"{KAGGLE_SOURCES[2].short_name}.zip", "")
    large = read_images(archives / f"{KAGGLE_SOURCES[0].short_name}.zip", "real_and_fake_face/")
    results: dict = {"machine": describe_machine()}
    many = repeat(small, max(1, 16_000 // len(small)))
    for name, measure in {
        "index_256": lambda folder: measure_index(many, folder, 5),
        "index_600_progressive": lambda folder: measure_index(large, folder, 3),
        "growth": lambda folder: measure_growth(many, folder),
        "merge": lambda folder: measure_merge(many, folder),
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(Path(folder))
        print(f"{name}: {results[name]}", flush=True)
    results["search"] = measure_search()
    plot_search(results["search"]["curve"]).savefig(FOLDER / "pair_search.png", dpi=120)
    write_json(FOLDER / "data_speed.json", results)
    print(f"written: {FOLDER}/data_speed.json and pair_search.png")


if __name__ == "__main__":
    main()
