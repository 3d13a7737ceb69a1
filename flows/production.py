"""What a person, or a schedule, does with the model in production."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from deepfake_core import registry
from deepfake_core.errors import ModelError
from tasks.announcement import announce

MOST_DRIFT = 0.001


@flow(name="promote")
def promote(version: int, reason: str, force: bool = False, model_name: str = registry.DEFAULT_MODEL) -> str:
    """Put a version into production that a person has chosen.

    Args:
        version: Number of the version.
        reason: Why, for whoever asks later.
        force: Even if the version failed the promotion rule, or was never compared.
        model_name: Name in MLflow's model registry.

    Returns:
        What was done, as a sentence.
    """
    registry.connect()
    former = registry.promote_by_hand(model_name, str(version), reason, force)
    done = f"Version {version} of {model_name} is in production instead of {former or 'none'}: {reason}"
    announce("promoted", model_name, str(version), done)
    return _report(done)


@flow(name="rollback")
def roll_back(reason: str, model_name: str = registry.DEFAULT_MODEL) -> str:
    """Put the version back into production that production replaced.

    Args:
        reason: Why, for whoever asks later.
        model_name: Name in MLflow's model registry.

    Returns:
        What was done, as a sentence.
    """
    registry.connect()
    restored, former = registry.roll_back(model_name, reason)
    done = f"Version {restored} of {model_name} is back in production instead of {former}: {reason}"
    announce("rolled-back", model_name, restored, done)
    return _report(done)


@flow(name="production.health")
def health(model_name: str = registry.DEFAULT_MODEL) -> str:
    """Load the production model as its users do, and fail if its scores are not those that were recorded with it.

    Args:
        model_name: Name in MLflow's model registry.

    Returns:
        What was found, as a sentence.
    """
    registry.connect()
    current = registry.find_production(model_name)
    if current is None:
        raise ModelError(f"There must be a production model to check. Received: none of the name {model_name}.")
    differences = registry.check_probe(registry.read_version(model_name, current))
    found = (
        f"Version {current} of {model_name}: the scores of {len(differences)} probe images differ by "
        f"{max(differences):.2g} at most from those recorded with it (allowed: {MOST_DRIFT:g})"
    )
    _report(found)
    if max(differences) > MOST_DRIFT:
        raise ModelError(
            f"{found}. What serves it has changed: compare its packages with the version's requirements.txt, then "
            "roll back or retrain."
        )
    return found


def _report(sentence: str) -> str:
    get_run_logger().info(sentence)
    create_markdown_artifact(sentence, key="production")
    return sentence
