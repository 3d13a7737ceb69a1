"""The domain of the deepfake retraining pipeline: data, models, metrics, registry.

Whatever imports a part of it first turns off the telemetry of its libraries, which read their switches on import. What
the environment sets counts instead.
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
