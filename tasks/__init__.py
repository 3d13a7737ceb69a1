"""Core functions declared as Prefect tasks: names, retries, tags, progress. No logic."""

from deepfake_core.redaction import redact_logs

redact_logs()
