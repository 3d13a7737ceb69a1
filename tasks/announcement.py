"""Events about the production model, which automations listen to (deployments/alerts.py)."""

from prefect.events import emit_event


def announce(outcome: str, model: str, version: str, text: str) -> None:
    """Emit `deepfake.version.<outcome>`; the text says what was decided and why.

    Args:
        outcome: promoted, not promoted, waits for approval, rolled back, or moved outside.
    """
    emit_event(
        f"deepfake.version.{outcome.replace(' ', '-')}",
        resource={"prefect.resource.id": f"deepfake.version.{model}.{version}", "prefect.resource.name": model},
        payload={"model": model, "version": version, "text": text},
    )


def announce_drift(model: str, version: str, text: str, lasts: bool) -> None:
    """Emit `deepfake.drift`; `lasts` says whether a retrain may start (`registry.windows`)."""
    emit_event(
        "deepfake.drift",
        resource={
            "prefect.resource.id": f"deepfake.version.{model}.{version}",
            "prefect.resource.name": model,
            "deepfake.drift.lasts": str(lasts).lower(),
        },
        payload={"model": model, "version": version, "text": text},
    )
