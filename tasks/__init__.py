"""Core functions declared as Prefect tasks: names, retries, tags, progress. No logic."""
