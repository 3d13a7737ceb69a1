"""The domain of the deepfake retraining pipeline: data, models, metrics, registry.

Whatever imports a part of it first sets the switches of its libraries, which read them on import: telemetry is off, and
TensorFlow uses oneDNN. What the environment sets counts instead.
"""

import os

TELEMETRY = {
    "DO_NOT_TRACK": "true",  # Prefect's client, Hugging Face's hub
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Each library's switch, off; deployments/stack.env and the Dockerfile have the same."""

for _switch, _off in TELEMETRY.items():
    os.environ.setdefault(_switch, _off)

# By itself, TensorFlow uses oneDNN's kernels only on CPUs with AVX512-VNNI or AMX. With AVX2 alone, steps of four
# candidates took 0.55 to 0.75 of the CPU time by them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
