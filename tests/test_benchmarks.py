"""Benchmarks that need an accelerator run tiny on the CPU, and count what they say."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.data_speed import DISTANCES, search_pictures
from benchmarks.gpu_training import count_work
from benchmarks.near_copies import hash_as_imagededup
from benchmarks.render import render_full_size
from deepfake_core.config import KAGGLE_SOURCES
from deepfake_core.models import CANDIDATES
from tests.builders import draw_image, encode, faces, write_zip

ROOT = Path(__file__).parents[1]


def test_the_floors_count_what_the_network_computes():
    operations, elements = count_work(CANDIDATES["cnn"].build(CANDIDATES["cnn"].RECIPE))
    convolutions = 148**2 * 32 * 27 + 72**2 * 64 * 9 * 32 + 34**2 * 128 * 9 * 64
    dense = 17**2 * 128 * 256 + 256
    assert operations == 2 * (convolutions + dense)
    pooled = 74**2 * 32 + 36**2 * 64 + 17**2 * 128
    outputs = 150**2 * 3 + 148**2 * 32 + 72**2 * 64 + 34**2 * 128 + pooled + 17**2 * 128 + 256 + 1
    assert elements == outputs


@pytest.mark.slow
def test_a_backbone_is_counted_with_its_model():
    recipe = CANDIDATES["efficientnet_lite0"].RECIPE.model_copy(update={"weights": "none", "image_size": 224})
    operations, _ = count_work(CANDIDATES["efficientnet_lite0"].build(recipe))
    assert operations / 2 == pytest.approx(407e6, rel=0.06)  # multiply-adds that the authors give, less the classifier


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
@pytest.mark.sweep
def test_gpu_training_runs_tiny_on_the_cpu(backend, tmp_path):
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    file = tmp_path / "gpu.json"
    sizes = ["--images", "48", "--quick", "--epochs", "2", "--candidates", "cgface"]
    subprocess.run(
        [sys.executable, "benchmarks/gpu_training.py", *sizes, "--output", str(file)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    result = json.loads(file.read_text())
    assert backend in result["hardware"]
    (run,) = result["runs"]
    assert (run["candidate"], run["feeding"]) == ("cgface", "resident")
    assert 0 < run["seconds_per_epoch"] < run["first_epoch_seconds"]
    assert 0 <= run["waiting_share"] <= 1
    assert run["memory_floor_seconds"] > run["arithmetic_floor_seconds"] > 0


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.sweep
def test_the_rehearsal_at_full_size_runs_small(tmp_path):
    """`make bench-full-size` is the large one."""
    for source, folder in ((KAGGLE_SOURCES[0], "training_"), (KAGGLE_SOURCES[2], "real_vs_fake/real-vs-fake/test/")):
        members = {f"{folder}{name}": data for name, data in faces(60).items()}
        write_zip(tmp_path / f"{source.short_name}.zip", members)
    file = tmp_path / "full_size.json"
    sizes = ["--pictures", "300", "--folder", str(tmp_path), "--output", str(file)]
    subprocess.run(
        [sys.executable, "benchmarks/full_size.py", str(tmp_path), *sizes],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    result = json.loads(file.read_text())
    flows = {name: flow["stages"] for name, flow in result["flows"].items()}
    assert list(flows) == ["prepare", "prepare on a cluster", "prepare again", "prepare with 1 % new", "train"]
    preparing = {"download", "index", "find near copies", "deduplicate", "split", "merge", "report on data"}
    assert all(preparing <= set(flows[name]) for name in list(flows)[:4])
    assert {"epochs", "evaluate", "register", "promote"} <= set(flows["train"])
    for flow, stages in (("prepare", ("download", "index", "merge")), ("train", ("epochs",))):
        assert all(flows[flow][stage]["floor_seconds"] > 0 for stage in stages)
    assert result["decoding"]["images"] > 0
    assert result["decoding"]["seconds"] > result["decoding"]["floor_seconds"] > 0
    for flow in result["flows"].values():
        assert flow["seconds"] > sum(flow["stages"][stage]["seconds"] for stage in preparing & set(flow["stages"]))
        assert flow["memory_gb"] >= max(stage["memory_gb"] for stage in flow["stages"].values()) > 0
    assert result["flows"]["prepare"]["disk_gb"] < result["flows"]["train"]["disk_gb"]
    assert file.with_suffix(".png").exists()
    assert "| epochs |" in render_full_size({"full_size": result})


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.sweep
def test_what_runs_for_long_stays_flat(tmp_path):
    """A short soak; `make bench-soak` is the long one."""
    file = tmp_path / "soak.json"
    counts = ["--photos", "120", "--requests", "20", "--clips", "6"]
    subprocess.run(
        [sys.executable, "benchmarks/soak.py", *counts, "--only", "predict", "serve", "clips", "--output", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    for part in json.loads(file.read_text())["parts"].values():
        assert part["summary"]["memory_mb_max"] < 700
        assert part["summary"]["memory_mb_growth"] < 100  # of 120 photographs, 3 MB each would be kept
        assert part["summary"]["open_files_growth"] < 10
        assert part["summary"]["threads_growth"] < 10
    assert file.with_suffix(".png").exists()


def test_the_peers_hashes_are_those_that_imagededup_makes():
    phash, dhash = hash_as_imagededup(encode(draw_image(1), "PNG"))
    assert (phash.hex(), dhash.hex()) == ("a1d6a939ec0c17f3", "8fdce4640c1b1b83")  # of imagededup 0.3.3.post2


@pytest.mark.slow
def test_each_engine_searches_the_planted_pairs():
    exact = dict.fromkeys(DISTANCES, 1.0)
    assert search_pictures(10_000, "ours")["recall"] == exact
    assert search_pictures(10_000, "flat")["recall"] == exact
    few_tables = search_pictures(10_000, "multi-hash", (8, 16, 1))["recall"]
    assert few_tables[20] == 1
    assert few_tables[60] < 0.7
