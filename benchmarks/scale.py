"""Near copies, groups, splits and manifest of many images: seconds and memory of each step, and what is found.

    python benchmarks/scale.py [--rows 100000 300000 1000000] [--more-rows 1000000 3000000 10000000] [--output FILE]

Indexes are simulated: pictures of 32 x 32 greys whose frequencies fall off as a photograph's do, and no image files.
One picture in 20 has an edit, of which a part is another picture's; hashes of most edits are 1 to 60 bits away. One row
in 100 has the bytes of another row.

- `--rows`: all steps. Recall is by distance of the whole pictures' hashes: pairs that the search gives to the second
  look, and pairs that are linked after it.
- `--more-rows`: the pair search of random hashes in 8 of its hash tables, from which the time of all follows; and
  grouping, split and manifest of an index without pictures, with the planted pairs as links.

Each size runs in a process of its own, through the product's own functions. Memory is read 20 times a second: the
process's own (anonymous), and with the pages of mapped files that are resident, which the system may drop. The results
go into benchmarks/results/scale.json, where other sizes stay, and scale.png; docs/scale.md quotes them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from deepfake_core.config import DataParameters, Source
from deepfake_core.data import duplicates, links, publishing, splits
from deepfake_core.data.archive import Archive
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.hash_tables import MAX_NEIGHBOURS, choose_tables
from deepfake_core.data.hashes import HASH_BYTES, THUMBNAIL_SIZE, VIEWS, hash_thumbnails
from deepfake_core.data.index import read_facts
from deepfake_core.data.neighbours import compare_tables
from deepfake_core.storage.files import write_json
from deepfake_core.storage.store import Store, open_store

RESULTS = Path(__file__).parent / "results"
SIZES = (100_000, 300_000, 1_000_000)
MORE_SIZES = (1_000_000, 3_000_000, 10_000_000)
TABLES_TIMED = 8
ROWS_AT_ONCE = 10_000
EDITED, REPEATED = 20, 100
"""One picture in so many has an edit, one row in so many has the bytes of another."""
BINS = ((1, 10), (11, 20), (21, 30), (31, 40), (41, 50), (51, 60))
FREQUENCIES = 24


def draw_pictures(random: np.random.Generator, count: int) -> np.ndarray:
    """Draw grey pictures; returns uint8 of shape (count, 32, 32)."""
    places = (np.arange(THUMBNAIL_SIZE) + 0.5) / THUMBNAIL_SIZE
    waves = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * places).astype(np.float32)
    falls = 1 / (1 + np.hypot(*np.indices((FREQUENCIES, FREQUENCIES)))).astype(np.float32)
    falls[0, 0] = 0
    amplitudes = random.standard_normal((count, FREQUENCIES, FREQUENCIES), np.float32) * falls
    greys = waves.T @ amplitudes @ waves
    greys *= 40 / greys.std((1, 2), keepdims=True)
    return np.clip(greys + 128, 0, 255).astype(np.uint8)


def edit_pictures(random: np.random.Generator, pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Paste a part of another picture into each."""
    edited = pictures.copy()
    for one, other in zip(edited, others, strict=True):
        height, width = random.integers(2, 20, 2)
        top, left = random.integers(0, THUMBNAIL_SIZE - height), random.integers(0, THUMBNAIL_SIZE - width)
        part = np.s_[top : top + height, left : left + width]
        one[part] = other[part]
    return edited


def write_simulated(file: Path, rows: int, has_pictures: bool = True) -> pd.DataFrame:
    """Write an index; return the planted pairs: `image`, `other` (SHA-256, the smaller first) and `distance`."""
    random = np.random.default_rng(rows)
    planted = []
    writer = None
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        edited, repeated = count // EDITED, count // REPEATED
        fresh = count - edited - repeated
        names = [random.bytes(32).hex() for _ in range(count - repeated)]
        names += names[:repeated]
        distances = np.zeros(edited, int)
        looks: dict[str, list[bytes]] = {}
        if has_pictures:
            drawn = draw_pictures(random, fresh)
            edits = edit_pictures(random, drawn[:edited], drawn[edited : 2 * edited])
            pictures = np.concatenate([drawn, edits, drawn[:repeated]])
            hashes = hash_thumbnails(pictures)
            distances = np.bitwise_count(hashes[:edited] ^ hashes[fresh : fresh + edited]).sum(1)
            looks = {"hash": [one.tobytes() for one in hashes], "thumbnail": [one.tobytes() for one in pictures]}
        for one, other, distance in zip(names, names[fresh : fresh + edited], distances.tolist(), strict=False):
            planted.append((*sorted((one, other)), distance))
        numbers = np.arange(start, start + count)
        labels = np.where(random.random(count) < 0.5, "real", "fake")
        labels[-repeated:] = labels[:repeated]
        table = pd.DataFrame(
            {
                "source": "simulated",
                "member": [f"{n // 1000:06}/{n:09}-{label}.jpg" for n, label in zip(numbers, labels, strict=True)],
                "sha256": names,
                "label": labels,
                "width": np.int32(256),
                "height": np.int32(256),
                "bytes": random.integers(5_000, 30_000, count),
                "format": "JPEG",
                "jpeg_table": random.choice(["75 a1b2c3d4", "90 0f1e2d3c", "95 99887766"], count),
                "reason": "",
            }
            | looks
        )
        chunk = pa.Table.from_pandas(table, preserve_index=False)
        writer = writer or pq.ParquetWriter(file, chunk.schema.remove_metadata())
        writer.write_table(chunk.cast(writer.schema))
    assert writer is not None
    writer.close()
    return pd.DataFrame(planted, columns=["image", "other", "distance"])


def read_memory() -> tuple[float, float]:
    """Return this process's anonymous memory, and all that is resident, in GB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, whole = (int(lines[name].split()[0]) / 1e6 for name in ("RssAnon", "VmRSS"))
    return own, whole


class Steps:
    """Seconds and the most memory of each step."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        peaks, over = [read_memory()], threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                peaks.append(read_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            over.set()
            watcher.join()
        own, whole = (max(column) for column in zip(*peaks, strict=True))
        self.measured[name] = {"seconds": seconds, "own_gb": own, "resident_gb": whole}
        print(f"  {name}: {self.measured[name]}", flush=True)

    def watch(self, module: Any, name: str, step: str, kept: dict[str, Any]) -> None:
        """Measure each call of a module's function as a step, and keep what it returns."""
        function = getattr(module, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.step(step):
                kept[step] = function(*args, **kwargs)
            return kept[step]

        setattr(module, name, measured)


def measure_recall(planted: pd.DataFrame, found: set[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Return how many pairs were planted in each range of distances, and the share of them that was found."""
    is_found = np.array([pair in found for pair in zip(planted["image"], planted["other"], strict=True)])
    ranges = {f"{low}-{high}": planted["distance"].between(low, high).to_numpy() for low, high in BINS}
    return {
        name: {"planted": int(inside.sum()), "found": float(is_found[inside].mean())}
        for name, inside in ranges.items()
        if inside.any()
    }


def measure_size(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, planted_file = folder / "index.parquet", folder / "planted.parquet"
        run_alone(simulate, file, planted_file, rows)
        return run_alone(run_steps, file, planted_file, folder / "data")


def measure_more(rows: int) -> dict[str, Any]:
    """Measure the search in some tables, and what follows it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, planted_file = folder / "index.parquet", folder / "planted.parquet"
        search = run_alone(search_tables, folder / "hashes", rows)
        (folder / "hashes").unlink()
        run_alone(simulate, file, planted_file, rows, False)
        return {"search": search, "steps": run_alone(run_tables, file, planted_file, folder / "data")}


def simulate(file: Path, planted_file: Path, rows: int, has_pictures: bool = True) -> dict[str, Any]:
    write_simulated(file, rows, has_pictures).to_parquet(planted_file)
    return {}


def search_tables(file: Path, count: int) -> dict[str, Any]:
    """Search random hashes in some hash tables."""
    random = np.random.default_rng(count)
    with file.open("wb") as written:
        for start in range(0, count * len(VIEWS), 1_000_000):
            written.write(random.bytes(min(1_000_000, count * len(VIEWS) - start) * HASH_BYTES))
    hashes = np.asarray(np.memmap(file, np.uint8, "r", shape=(len(VIEWS), count, HASH_BYTES)))
    all_tables, bits = choose_tables(count)
    tables, cores = range(TABLES_TIMED), os.cpu_count() or 1
    steps = Steps()
    with steps.step("pair search"):
        found = compare_tables(hashes, links.MAX_HASH_DISTANCE_BITS, tables, cores)
    measured: dict[str, Any] = dict(steps.measured["pair search"])
    measured |= {"tables": all_tables, "bits": bits, "all_pairs_of_buckets_compared": found.fullest <= MAX_NEIGHBOURS}
    return measured | {"hours_of_all_tables": measured["seconds"] * all_tables / TABLES_TIMED / 3600}


def run_tables(file: Path, planted_file: Path, data_dir: Path) -> dict[str, Any]:
    """Group, split and publish an index, with the planted pairs as links."""
    store = open_store(data_dir)
    store.indexes().mkdir(parents=True)
    near = pd.read_parquet(planted_file)
    near = near.assign(likeness=np.float32(0.7), difference=np.float32(20), same_picture=near["image"] < "4")
    steps = Steps()
    group_and_publish(steps, file, near, store)
    return steps.measured


def group_and_publish(steps: Steps, file: Path, near: pd.DataFrame, store: Store) -> Dataset:
    with steps.step("grouping"):
        rows = duplicates.mark_duplicates(read_facts([file]), near)
    with steps.step("split"):
        rows = splits.assign_splits(rows, near, {}, 0.15, 0.15)
    archive = Archive(Source(name=str(file.with_name("simulated.zip"))), file, "0" * 64, 0)
    publishing._copy_images = lambda *args: args[2].mkdir(parents=True)  # a simulated index has no image files
    with steps.step("manifest"):
        return publishing.publish_dataset(rows, [archive], store, DataParameters())


def run_steps(file: Path, planted_file: Path, data_dir: Path) -> dict[str, Any]:
    """Do what the flow `prepare` does between index and image files."""
    store = open_store(data_dir)
    store.indexes().mkdir(parents=True)
    before, before_whole = read_memory()
    steps, kept = Steps(), dict[str, Any]()
    steps.watch(links, "list_pictures", "list the pictures", kept)
    steps.watch(links, "lay_out", "write thumbnails and hashes", kept)
    steps.watch(links, "find_in_shards", "pair search", kept)
    steps.watch(links, "measure_in_shards", "second look", kept)
    start = time.perf_counter()
    near = links.find_or_read_links([file], store)
    searched = time.perf_counter() - start
    pictures, found = kept["list the pictures"], kept["pair search"]
    stands = pictures.stands
    candidates = set(zip(*(pictures.name(stands[each]) for each in (found.images, found.viewed)), strict=True))
    rows_searched, complete = len(pictures), found.fullest <= MAX_NEIGHBOURS
    del pictures, found, stands
    kept.clear()
    planted = pd.read_parquet(planted_file)
    recall = {
        "pair_search": measure_recall(planted, candidates),
        "links": measure_recall(planted, set(zip(near["image"], near["other"], strict=True))),
    }
    del candidates, planted
    first, steps.measured = steps.measured, {}
    with steps.step("search again, nothing new"):
        near = links.find_or_read_links([file], store)
    steps.measured = first | {"search again, nothing new": steps.measured["search again, nothing new"]}
    kept.clear()
    dataset = group_and_publish(steps, file, near, store)
    seconds = searched + sum(steps.measured[name]["seconds"] for name in ("grouping", "split", "manifest"))
    return {
        "rows": dataset.description["counts"]["files"],
        "pictures": rows_searched,
        "links": len(near),
        "kept": dataset.description["counts"]["kept"],
        "version": dataset.version,
        "all_pairs_of_buckets_compared": complete,
        "start_gb": before,
        "start_resident_gb": before_whole,
        "seconds": seconds,
        "own_gb": max(one["own_gb"] for one in steps.measured.values()),
        "resident_gb": max(one["resident_gb"] for one in steps.measured.values()),
        "steps": steps.measured,
        "recall": recall,
    }


def run_alone(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Run in a new process, so that memory is the function's own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plot_curves(results: dict[str, Any]) -> Figure:
    """Draw seconds and the process's own memory of each step by rows; dashed where few tables were timed."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for rows, size in results["sizes"].items():
        for step, measured in size["steps"].items():
            curves.setdefault(step, {})[int(rows)] = measured
    implied = f"pair search, implied by {results['tables_timed']} tables"
    for rows, size in results["more_sizes"].items():
        hours = size["search"]["hours_of_all_tables"]
        curves.setdefault(implied, {})[int(rows)] = size["search"] | {"seconds": 3600 * hours}
        for step, measured in size["steps"].items():
            curves.setdefault(step, {}).setdefault(int(rows), measured)
    for axes, key, title in zip(
        figure.subplots(1, 2), ("seconds", "own_gb"), ("Seconds", "Own memory, GB"), strict=True
    ):
        for step, curve in curves.items():
            line = "x--" if step == implied else "o-"
            axes.plot(list(curve), [max(one[key], 1e-2) for one in curve.values()], line, label=step)
        axes.set(xscale="log", yscale="log", xlabel="rows", title=title)
        axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=SIZES)
    parser.add_argument("--more-rows", type=int, nargs="*", default=MORE_SIZES)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"sizes": {}, "more_sizes": {}}
    if options.output.exists():
        results |= json.loads(options.output.read_text())
    results["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    results["tables_timed"] = TABLES_TIMED
    for measure, counts, key in (
        (measure_size, options.rows, "sizes"),
        (measure_more, options.more_rows, "more_sizes"),
    ):
        for rows in counts:
            print(f"{rows:,} rows", flush=True)
            found = results[key] | {str(rows): measure(rows)}
            results[key] = {size: found[size] for size in sorted(found, key=int)}
            write_json(options.output, results)
    plot_curves(results).savefig(options.output.with_suffix(".png"), dpi=110)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
