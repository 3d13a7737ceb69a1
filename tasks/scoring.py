"""Scores of many images by a registered version."""

import tempfile
from pathlib import Path

from prefect import flow, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from deepfake_core import registry
from deepfake_core.batch_scoring import Scored, score_images
from deepfake_core.detector import Detector
from deepfake_core.predictor import Predictor
from tasks.progress import report_progress

PRODUCTION = f"models:/{registry.DEFAULT_MODEL}@{registry.PRODUCTION}"


@flow(name="score")
def score(images: str, output: str = "scores.parquet", model: str = PRODUCTION, detect: bool = True) -> str:
    """Judge a folder's or a table's images, and log which version judged which images in MLflow.

    Args:
        images: Folder, or Parquet file with a column `image` of encoded bytes and, if they have names, `name`.
        output: Parquet file to write: a row per face with label, probability and box, or an error.
        model: Registry URI of the version.
        detect: Look for faces. Without, each image is judged as a whole.

    Returns:
        The table's path.
    """
    registry.connect()
    name, version = registry.resolve(model)
    written = Path(output).expanduser().absolute()
    with registry.open_run(runtime.flow_run.name, tags={"prefect.flow_run_id": runtime.flow_run.id}) as run_id:
        registry.log_parameters(run_id, {"images": images, "output": str(written), "model": model, "detect": detect})
        scored = judge(Path(images).expanduser(), written, f"models:/{name}/{version}", detect)
        registry.log_scoring(run_id, registry.read_version(name, version), images, scored.digest, scored.images)
        registry.log_metrics(run_id, {key.replace(" ", "_"): float(count) for key, count in scored.outcomes.items()})
        registry.log_file(run_id, written, "scores")
    create_table_artifact(
        [{"verdict": verdict, "rows": count} for verdict, count in sorted(scored.outcomes.items())],
        key="scores",
        description=f"{scored.images} images by {name} version {version}: {written}",
    )
    return str(written)


@task(name="score images", tags=["cpu"], cache_policy=NO_CACHE)
def judge(images: Path, output: Path, model: str, detect: bool) -> Scored:
    """Write the table of scores."""
    with tempfile.TemporaryDirectory() as folder, report_progress("score images") as on_progress:
        predictor = Predictor(Detector(registry.pull_detector(model, Path(folder))), detect)
        return score_images(predictor, images, output, on_progress)
