"""Scores of many images."""

from collections.abc import Sequence
from pathlib import Path

from prefect import task

from deepfake_core.monitoring.observer import Observer
from deepfake_core.serving import batch_scoring
from deepfake_core.serving.batch_scoring import ScoredTable, ScoreShard, load_predictor
from tasks.options import ONCE, SHARD


@task(name="score shard", task_run_name="score shard {shard}", **SHARD)
def score_shard(shard: ScoreShard, threads: int) -> None:
    """Write the scores of some hundred images, unless they are there."""
    batch_scoring.score_shard(shard, threads)


@task(name="join scores", **ONCE)
def join_scores(shards: Sequence[ScoreShard], output: Path, observer: Observer | None) -> ScoredTable:
    """Write the table of scores, and append what was observed, if it is to be."""
    load_predictor.cache_clear()
    return batch_scoring.join_shards(shards, output, observer)
