"""Alerts when a run fails or production changes: automations on the Prefect server at PREFECT_API_URL.

    python deployments/alerts.py

`make deploy` runs it. They notify the block named deepfake-alerts, of any notification type: a webhook, Slack, Teams,
mail and so on. docs/operations.md says what each alert means.
"""

from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events.actions import ActionTypes, CallWebhook, ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

BLOCK = "deepfake-alerts"
RETRAIN = "retrain/manual"
"""The deployment that drift may start."""

OWN_FLOWS = {"prefect.resource.id": "prefect.tag.deepfake", "prefect.resource.role": "tag"}
"""All deployments of prefect.yaml have this tag."""

LATE = timedelta(minutes=10)
SILENT = timedelta(minutes=10)
"""Three heartbeats of a flow run (PREFECT_FLOWS_HEARTBEAT_FREQUENCY is 180 s), and some."""

HAS_A_PROCESS = {"prefect.resource.role": "flow", "prefect.resource.name": "!approve"}
"""A run of `approve` waits for a person, suspended; it sends no heartbeat then, and nothing is wrong."""

ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
RUN = "{{ flow.name }} run {{ flow_run.name }}"
PAGE = "Its page: {{ flow_run|ui_url }}"
SECRET = "'KGAT_' in word or ('?' in word and '=' in word) or ('://' in word and '@' in word)"
MESSAGE = (
    "{% for word in (flow_run.state.message or '').split(' ') %}"
    f"{{{{ '[removed]' if {SECRET} else word }}}} "
    "{% endfor %}"
)
"""A run's message, which holds no secrets if it is ours: of others', words that look like tokens and signed addresses
are removed, as `deepfake_core.redaction` does in the run."""


def find_block(client: SyncPrefectClient) -> BlockDocument | None:
    return next((block for block in client.read_block_documents(include_secrets=False) if block.name == BLOCK), None)


def find_retrain(client: SyncPrefectClient) -> UUID | None:
    try:
        return client.read_deployment_by_name(RETRAIN).id
    except ObjectNotFound:
        return None


def notify(block: BlockDocument, subject: str, body: str) -> ActionTypes:
    """Return the action that sends a text; both parts are Prefect's templates."""
    if block.block_type and block.block_type.slug == "webhook":
        text = f"{{% set text %}}{subject}\n{body}{{% endset %}}"
        return CallWebhook(block_document_id=block.id, payload=f'{text}{{"text": {{{{ text | tojson }}}}}}')
    return SendNotification(block_document_id=block.id, subject=subject, body=body)


def make_automations(
    block: BlockDocument | None,
    retrain: UUID | None = None,
    late: timedelta = LATE,
    silent_for: timedelta = SILENT,
) -> list[AutomationCore]:
    """Return the automations; without a block, only those that send no message.

    Args:
        retrain: the deployment that lasting drift starts, once a person has switched that automation on.
    """
    silent = AutomationCore(
        name="deepfake: a run that fell silent is crashed",
        description="Its process or machine is gone. Set to Crashed, it no longer blocks the next run.",
        trigger=EventTrigger(
            match_related=[OWN_FLOWS, HAS_A_PROCESS],
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ENDED},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            within=silent_for,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="It fell silent: its process or machine is gone. Check the worker and run it again; a "
                "training resumes from its last finished epoch.",
            )
        ],
    )
    lasting = (
        AutomationCore(
            name="deepfake: lasting drift starts a retrain",
            description="Off until you switch it on. Drift in 2 of the last 5 windows, the newest too, runs it.",
            enabled=False,
            trigger=EventTrigger(
                expect={"deepfake.drift"},
                match={"deepfake.drift.lasts": "true"},
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
            ),
            actions=[RunDeployment(source="selected", deployment_id=retrain)],
        )
        if retrain
        else None
    )
    silently = [one for one in (silent, lasting) if one]
    if block is None:
        return silently
    failed = AutomationCore(
        name="deepfake: a run failed",
        trigger=EventTrigger(
            match_related=OWN_FLOWS,
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,  # a default, which the client leaves out when it updates, and the server misses
        ),
        actions=[
            notify(
                block,
                f"{RUN}: {{{{ flow_run.state.name }}}}",
                f"{MESSAGE}\nIf this doesn't say what to do, the log does. Then run it again: "
                f"nothing is left half done, and what is finished is not repeated. {PAGE}",
            )
        ],
    )
    waiting = AutomationCore(
        name="deepfake: a run is late",
        trigger=EventTrigger(
            match_related=OWN_FLOWS,
            after={"prefect.flow-run.Late"},
            expect={f"prefect.flow-run.{state}" for state in ("Pending", "Running", "AwaitingConcurrencySlot")} | ENDED,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            within=late,
        ),
        actions=[
            notify(
                block,
                f"{RUN}: late",
                f"No worker has taken it for {late.total_seconds() / 60:g} minutes. See whether a worker of its pool "
                f"runs (Work Pools in Prefect; `make up` starts those of this machine). {PAGE}",
            )
        ],
    )
    decided = AutomationCore(
        name="deepfake: a version was promoted, refused or rolled back",
        trigger=EventTrigger(expect={"deepfake.version.*"}, for_each={"prefect.resource.id"}, posture=Posture.Reactive),
        actions=[
            notify(
                block,
                "{{ event.payload.model }} version {{ event.payload.version }}",
                "{{ event.payload.text }}",
            )
        ],
    )
    drifted = AutomationCore(
        name="deepfake: what production sees has changed",
        trigger=EventTrigger(expect={"deepfake.drift"}, for_each={"prefect.resource.id"}, posture=Posture.Reactive),
        actions=[
            notify(
                block,
                "{{ event.payload.model }} version {{ event.payload.version }}: drift",
                "{{ event.payload.text }}",
            )
        ],
    )
    return [*silently, failed, waiting, decided, drifted]


def apply(client: SyncPrefectClient, automations: list[AutomationCore]) -> None:
    """Create the automations, or replace those of the same name.

    One that is unchanged stays: while a server on SQLite loads an updated one, it misses what should trigger it. What
    a person has switched on or off stays so.
    """
    for automation in automations:
        existing = client.read_automations_by_name(automation.name)
        if existing:
            automation = automation.model_copy(update={"enabled": existing[0].enabled})
        if not existing:
            client.create_automation(automation)
        elif existing[0].model_dump(exclude={"id"}) != automation.model_dump():
            client.update_automation(existing[0].id, automation)


def main() -> None:
    with get_client(sync_client=True) as client:
        block = find_block(client)
        apply(client, make_automations(block, find_retrain(client)))
        if block:
            print(f"Failures, late runs and promotions are sent to the block {BLOCK}.")
        else:
            print(
                f"Nobody is notified of failures: no block is named {BLOCK}. Create one in Prefect "
                f"({client.api_url.host}: Blocks, such as Slack Webhook or Webhook), then run `make deploy` again."
            )


if __name__ == "__main__":
    main()
