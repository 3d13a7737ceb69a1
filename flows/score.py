"""Scores of many images by a registered version."""

from pathlib import Path

from prefect import flow, runtime
from prefect.artifacts import create_table_artifact

from deepfake_core.config import PRODUCTION_URI, Cluster
from deepfake_core.monitoring.observer import open_observer
from deepfake_core.registry import names, runs
from deepfake_core.registry.connection import connect
from deepfake_core.registry.detectors import resolve
from deepfake_core.registry.versions import read_version
from deepfake_core.serving.batch_scoring import cut_images, place_shards
from deepfake_core.serving.load_versions import pull_judge
from deepfake_core.storage.files import remove_folder
from deepfake_core.storage.locks import lock_folder
from tasks.scoring import join_scores, score_shard
from tasks.shards import run_shards


@flow(name="score")
def score(
    images: str,
    output: str = "scores.parquet",
    model: str = PRODUCTION_URI,
    detect: bool = True,
    observe: str = "",
    shadow: bool = False,
    cluster: Cluster = "",
) -> str:
    """Judge a folder's or a table's images, and log which version judged which images in MLflow.

    A run that was stopped goes on with the same parameters: what is finished lies in a folder beside the output.

    Args:
        images: Folder, or Parquet file with a column `image` of encoded bytes and, if they have names, `name`.
        output: Parquet file to write: a row per face with label, probability and box, or an error.
        model: Registry URI of the version.
        detect: Look for faces. Without, each image is judged as a whole.
        observe: Folder or URL to which is appended what was said and measured of each face. Empty: nowhere.
        shadow: Let the version with the alias challenger judge too; what it says is observed only.
        cluster: Ray cluster that judges: host:6379 or auto on a machine of the cluster, ray://host:10001 from
            elsewhere. Empty: this machine's cores.

    Returns:
        The table's path.
    """
    connect()
    name, version = resolve(model)
    written = Path(output).expanduser().absolute()
    folder = place_shards(written)
    with (
        open_observer(observe, shadow) as observer,
        lock_folder(folder, f"flow run {runtime.flow_run.name}", "choose another `output`"),
        runs.open_run(runtime.flow_run.name, tags={names.PREFECT_FLOW_RUN_ID: runtime.flow_run.id}) as run_id,
    ):
        runs.log_parameters(run_id, {"images": images, "output": str(written), "model": model, "detect": detect})
        judge = pull_judge(folder, name, version, detect, shadow=shadow, observed=bool(observe))
        shards = cut_images(Path(images).expanduser().absolute(), written, judge)
        run_shards(score_shard, [shard for shard in shards if not shard.is_done], cluster, at_once=1)
        scored = join_scores(shards, written, observer)
        runs.log_scoring(run_id, read_version(name, version), images, scored.digest, scored.images)
        runs.log_metrics(run_id, {key.replace(" ", "_"): float(count) for key, count in scored.outcomes.items()})
        runs.log_file(run_id, written, "scores")
        remove_folder(folder)
    create_table_artifact(
        [{"verdict": verdict, "rows": count} for verdict, count in sorted(scored.outcomes.items())],
        key="scores",
        description=f"{scored.images} images by {name} version {version}: {written}",
    )
    return str(written)
