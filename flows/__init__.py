"""Composition only: each flow reads as the sentence that describes it."""

import deepfake_core  # noqa: F401 - before Prefect, whose telemetry it turns off
