"""Events about the production model, which automations listen to (deployments/alerts.py)."""

from typing import Literal

from prefect.events import emit_event

Announcement = Literal["promoted", "not-promoted", "rolled-back", "moved-outside"]


def announce(outcome: Announcement, model: str, version: str, text: str) -> None:
    """Emit `deepfake.version.<outcome>`; the text says what was decided and why."""
    emit_event(
        f"deepfake.version.{outcome}",
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
