"""What a person, or a schedule, does with the model in production."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from deepfake_core.config import DEFAULT_MODEL, NOT_PROMOTED, PROMOTED, WAITS
from deepfake_core.registry import approval, production
from deepfake_core.registry.aliases import explain_passed, find_production
from deepfake_core.registry.connection import connect
from deepfake_core.registry.names import NO_VERSION
from deepfake_core.registry.probe import check_production
from deepfake_core.registry.versions import read_version
from tasks.announcement import announce
from tasks.remote import ask_for_approval, close_questions


class Answer(RunInput):
    """What a person decides about a version that waits for approval."""

    approve: bool = Field(default=False, description="Put the version into production. Otherwise it is refused.")
    reason: str = Field(min_length=1, description="Why; recorded with the version.")
    by: str = Field(default="", description="Who decides; recorded with the version.")

    @property
    def text(self) -> str:
        return f"{self.reason} ({self.by})" if self.by else self.reason


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
    passed = explain_passed(model_name)
    restored, former = production.roll_back(model_name, reason)
    instead = f"instead of {former or 'none'}{passed}"
    done = f"Version {restored} of {model_name} is back in production {instead}: {reason}"
    announce("rolled back", model_name, restored, done)
    return _report(done)


@flow(name="approve", persist_result=True)
def approve(version: int, model_name: str = DEFAULT_MODEL) -> str:
    """Ask a person whether a version that waits for approval goes into production; no worker is held meanwhile.

    Args:
        version: Number of the version.
        model_name: Name in MLflow's model registry.

    Returns:
        What was done, as a sentence.
    """
    connect()
    waiting = read_version(model_name, str(version))
    if waiting.decision != WAITS:
        return _report(f"Version {version} of {model_name} waits for no approval: it is {waiting.decision}.")
    question = Answer.with_initial_data(description=approval.describe_question(waiting))
    answer = suspend_flow_run(wait_for_input=question, timeout=approval.limit_seconds(waiting), key="answer")
    if answer.approve:
        production.promote_by_hand(model_name, str(version), answer.text)
    else:
        approval.refuse(model_name, str(version), answer.text)
    decision = PROMOTED if answer.approve else NOT_PROMOTED
    done = f"Version {version} of {model_name} is {decision}, as a person decided: {answer.text}"
    announce(decision, model_name, str(version), done)
    return _report(done)


@flow(name="production.health")
def health(model_name: str = DEFAULT_MODEL) -> str:
    """Load the production model as its users do, and fail if its scores differ from those recorded with it.

    Before that, versions that waited for approval for too long are refused, and a run asks about each that waits, if
    none did yet: the training that should have started it may have been killed. An alias that someone moved in MLflow
    itself is announced, and is in the audit trail from then on. Whatever of this
    fails, production is checked, and the run fails at its end.

    Args:
        model_name: Name in MLflow's model registry.

    Returns:
        What was found, as a sentence.
    """
    connect()
    try:
        _settle(model_name)
    finally:  # whatever fails there, users must get right answers
        result = check_production(model_name)
        _report(result.text)
        result.require_agreement()
    return result.text


def _settle(model_name: str) -> None:
    with production.take_outside_moves(model_name) as moved:
        if moved:
            announce("moved outside", model_name, find_production(model_name) or NO_VERSION, moved)
    for version in approval.refuse_unanswered(model_name):
        text = f"Version {version} of {model_name} is not promoted, as nobody approved it."
        announce(NOT_PROMOTED, model_name, version, text)
    for waiting in approval.list_waiting(model_name):
        ask_for_approval(model_name, waiting.version)
    close_questions()


def _report(sentence: str) -> str:
    get_run_logger().info(sentence)
    create_markdown_artifact(sentence, key="production")
    return sentence
