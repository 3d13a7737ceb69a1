"""What a person, or a schedule, does with the model in production."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from deepfake_core.config import DEFAULT_MODEL
from deepfake_core.registry import production
from deepfake_core.registry.aliases import read_production
from deepfake_core.registry.connection import connect
from deepfake_core.registry.probe import check_production
from tasks.announcement import announce


@flow(name="promote")
def promote(version: int, reason: str, force: bool = False, model_name: str = DEFAULT_MODEL) -> str:
    """Put a version that a person has chosen into production.

    Args:
        version: Number of the version.
        reason: Why; recorded with the version.
        force: Even if the version failed the promotion rule, or was never compared.
        model_name: Name in MLflow's model registry.

    Returns:
        What was done, as a sentence.
    """
    connect()
    former = production.promote_by_hand(model_name, str(version), reason, force)
    done = f"Version {version} of {model_name} is in production instead of {former or 'none'}: {reason}"
    announce("promoted", model_name, str(version), done)
    return _report(done)


@flow(name="rollback")
def roll_back(reason: str, model_name: str = DEFAULT_MODEL) -> str:
    """Put the version that production replaced back into production.

    Args:
        reason: Why; recorded with the version.
        model_name: Name in MLflow's model registry.

    Returns:
        What was done, as a sentence.
    """
    connect()
    passed = production.explain_passed(model_name)
    restored, former = production.roll_back(model_name, reason)
    instead = f"instead of {former or 'none'}{passed}"
    done = f"Version {restored} of {model_name} is back in production {instead}: {reason}"
    announce("rolled-back", model_name, restored, done)
    return _report(done)


@flow(name="production.health")
def health(model_name: str = DEFAULT_MODEL) -> str:
    """Load the production model as its users do, and fail if its scores differ from those recorded with it.

    An alias that someone moved in MLflow itself is announced, and is in the audit trail from then on.

    Args:
        model_name: Name in MLflow's model registry.

    Returns:
        What was found, as a sentence.
    """
    connect()
    if moved := production.take_outside_move(model_name):
        announce("moved-outside", model_name, read_production(model_name).version, moved)
    result = check_production(model_name)
    _report(result.text)
    result.require_agreement()
    return result.text


def _report(sentence: str) -> str:
    get_run_logger().info(sentence)
    create_markdown_artifact(sentence, key="production")
    return sentence
