"""Scores of many images by a registered version."""

from pathlib import Path

from prefect import flow, runtime
from prefect.artifacts import create_table_artifact

from deepfake_core.config import PRODUCTION_URI
from deepfake_core.registry import names, runs
from deepfake_core.registry.connection import connect
from deepfake_core.registry.detectors import resolve
from deepfake_core.registry.versions import read_version
from tasks.scoring import judge


@flow(name="score")
def score(
    images: str,
    output: str = "scores.parquet",
    model: str = PRODUCTION_URI,
    detect: bool = True,
    observe: str = "",
    shadow: bool = False,
) -> str:
    """Judge a folder's or a table's images, and log which version judged which images in MLflow.

    Args:
        images: Folder, or Parquet file with a column `image` of encoded bytes and, if they have names, `name`.
        output: Parquet file to write: a row per face with label, probability and box, or an error.
        model: Registry URI of the version.
        detect: Look for faces. Without, each image is judged as a whole.
        observe: Folder or URL to which is appended what was said and measured of each face. Empty: nowhere.
        shadow: Let the version with the alias challenger judge too; what it says is observed only.

    Returns:
        The table's path.
    """
    connect()
    name, version = resolve(model)
    written = Path(output).expanduser().absolute()
    with runs.open_run(runtime.flow_run.name, tags={names.PREFECT_FLOW_RUN_ID: runtime.flow_run.id}) as run_id:
        runs.log_parameters(run_id, {"images": images, "output": str(written), "model": model, "detect": detect})
        scored = judge(Path(images).expanduser(), written, name, version, detect, observe, shadow)
        runs.log_scoring(run_id, read_version(name, version), images, scored.digest, scored.images)
        runs.log_metrics(run_id, {key.replace(" ", "_"): float(count) for key, count in scored.outcomes.items()})
        runs.log_file(run_id, written, "scores")
    create_table_artifact(
        [{"verdict": verdict, "rows": count} for verdict, count in sorted(scored.outcomes.items())],
        key="scores",
        description=f"{scored.images} images by {name} version {version}: {written}",
    )
    return str(written)
