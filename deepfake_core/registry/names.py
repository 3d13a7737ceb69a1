"""The names that this project uses in MLflow."""

from deepfake_core.config import NOT_PROMOTED as NOT_PROMOTED
from deepfake_core.config import PRODUCTION as PRODUCTION
from deepfake_core.config import PROMOTED as PROMOTED
from deepfake_core.config import WAITS as WAITS

EXPERIMENT = "deepfake-detection"

# Aliases of versions
PREVIOUS = "previous"
CHALLENGER = "challenger"
"""The newest version that was not promoted, which may run beside production (`--shadow`); a person may move it."""
NO_VERSION = "none"
"""Where a tag names a version, and there was none."""

# Artifacts of runs and versions
DETECTOR = "detector"
CHECKPOINT_FOLDER = "checkpoint"
MANIFEST = "dataset/manifest.parquet"
PROBE = "probe"
REPORT = "report.html"
METRICS_TABLE = "evaluation/metrics.csv"
SCORES = "evaluation/scores.csv"
CROSS_SOURCES = "evaluation/cross_sources.csv"
ROBUSTNESS = "evaluation/robustness.csv"
REGRESSION_TABLE = "evaluation/regression.csv"
REFERENCE = "evaluation/reference.parquet"

# Parameters of candidates' runs, besides the recipe's
THRESHOLD = "threshold"

# Tags of the registered model
RECORDED_PRODUCTION = "recorded_production"
"""The version that the audit trail says is in production, then where rollbacks from it lead.

If the alias is elsewhere, someone moved it in MLflow. It outlives versions that are deleted there."""
OUTSIDE_MOVE = "moved_outside"
"""What to say of such moves, until `production.health` has announced it."""

# Tags of runs
DATA_FOLDER = "data_folder"
"""What tells the data folder, which one run at a time uses, from others."""
PARENT = "mlflow.parentRunId"
PREFECT_FLOW_RUN_ID = "prefect.flow_run_id"
HARDWARE = "hardware"
BEGAN_FROM = "began_from"
"""Of a candidate's run: run and data set of the version from whose network its training began."""
SCORED_BY = "model_version"
"""Of a run of the flow `score`: name/number of the version that scored."""

# Tags of versions, and the first ones of runs too
DATASET_VERSION = "dataset_version"
DRAWN_IMAGES = "drawn_images"
FILES_REMOVED = "files_removed"
"""When the model files were removed."""
SEAL = "files_sha256"
"""JSON: the SHA-256 of each file, by its path in the version's folder (`seals`)."""
ARCHITECTURE = "architecture"
FLOW_RUN_ID = "flow_run_id"
FINGERPRINT = "fingerprint"
TEST_AUC = "test_auc"
DECISION = "decision"
"""`PROMOTED`, `NOT_PROMOTED` or `WAITS`."""
ANSWER_UNTIL = "answer_until"
"""When a version that waits for approval is refused, as ISO 8601 in UTC."""
REASONS = "reasons"
COMPARED_WITH = "compared_with"
MOVE = "move_to_production"
"""A move of production that has begun, as JSON; removed when the other tags say it."""
ROLLS_BACK_TO = "rolls_back_to"
"""Where rollbacks from this version lead, one after the other."""
REPLACED = "replaced"
REPLACED_BY = "replaced_by"
REPLACED_BECAUSE = "replaced_because"
PRODUCTION_SINCE = "production_since"
PRODUCTION_UNTIL = "production_until"
PRODUCTION_BY = "production_by"
PRODUCTION_BECAUSE = "production_because"
