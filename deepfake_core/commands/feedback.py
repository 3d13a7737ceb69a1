"""`deepfake feedback`: reports on wrong verdicts, and what is decided about them."""

import argparse
import getpass
import sys
from collections.abc import Callable
from pathlib import Path

from deepfake_core.commands.model import MODEL_HELP, load_named_model
from deepfake_core.commands.named_images import find_images
from deepfake_core.commands.production import confirm as ask
from deepfake_core.config import CLASS_NAMES, DEFAULT_FEEDBACK, PRODUCTION_URI
from deepfake_core.detector import UnreadableImageError
from deepfake_core.errors import ConfigurationError
from deepfake_core.feedback.records import STATUSES, FeedbackEntry
from deepfake_core.feedback.reports import Feedback, open_feedback
from deepfake_core.serving.predictor import Predictor, read_image
from deepfake_core.serving.wrong_verdict import pick_verdict

SHOWN_DIGITS = 12
"""Characters of a SHA-256 that are shown, and that the commands take for all of it."""

WHAT_IS_KEPT = (
    "A report keeps the image's bytes, the verdict, the label, the note and the time, and nothing about the sender. "
    "`deepfake feedback forget` removes it."
)
ADDRESS_HELP = f"folder or URL that keeps the reports (default: {DEFAULT_FEEDBACK})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    adding = commands.add_parser("add", help="report wrong verdicts on images", description=WHAT_IS_KEPT)
    adding.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP file, folder of these, or glob")
    adding.add_argument("--label", required=True, choices=CLASS_NAMES, help="what the images are")
    adding.add_argument("--note", default="", metavar="TEXT", help="why, in at most 1,000 characters")
    adding.add_argument("--to", dest="address", default=DEFAULT_FEEDBACK, metavar="DIR_OR_URL", help=ADDRESS_HELP)
    adding.add_argument("--model", default=PRODUCTION_URI, help=f"what judges them: {MODEL_HELP}")
    adding.add_argument(
        "--no-detect", action="store_true", help="judge whole images: they are cropped to a face already"
    )
    adding.set_defaults(run=add)

    listing = commands.add_parser("list", help="list the images that were reported")
    listing.add_argument("--status", choices=STATUSES, help="only these")
    listing.set_defaults(run=list_entries)
    showing = commands.add_parser("show", help="show what is kept of an image")
    showing.add_argument("--save", type=Path, metavar="FILE", help="write the image there")
    confirming = commands.add_parser("confirm", help="decide what an image is: it may be trained on")
    confirming.add_argument("--label", choices=CLASS_NAMES, help="what it is (default: what all of its reports say)")
    rejecting = commands.add_parser("reject", help="decide that nothing is to be learned from an image")
    withdrawing = commands.add_parser("withdraw", help="take the last decision back")
    forgetting = commands.add_parser("forget", help="remove an image, its reports and its decisions for good")
    forgetting.add_argument("--yes", action="store_true", help="don't ask for confirmation")
    for command, run in (
        (showing, show),
        (confirming, confirm),
        (rejecting, reject),
        (withdrawing, withdraw),
        (forgetting, forget),
    ):
        command.add_argument("sha256", metavar="SHA256", help="the image's, or its first 8 or more characters")
        command.set_defaults(run=run)
    for command in (confirming, rejecting, withdrawing):
        command.add_argument("--why", default="", metavar="TEXT", help="recorded with the decision")
        command.add_argument("--by", metavar="NAME", help="who decides; recorded too (default: this user's name)")
    for command in (listing, showing, confirming, rejecting, withdrawing, forgetting):
        command.add_argument("--in", dest="address", default=DEFAULT_FEEDBACK, metavar="DIR_OR_URL", help=ADDRESS_HELP)


def add(options: argparse.Namespace) -> int:
    """Judge the images and report them; return 2 if one could not be read."""
    named, _ = find_images(options.images)
    feedback = open_feedback(options.address)
    detector, version = load_named_model(options.model)
    predictor = Predictor(detector, detect=not options.no_detect)
    failed = False
    for name, data in named:
        try:
            image = read_image(data)
        except (UnreadableImageError, OSError) as exc:
            print(f"deepfake: {name}: {getattr(exc, 'strerror', None) or exc}", file=sys.stderr)
            failed = True
            continue
        (judged,) = predictor.judge([(name, image)])
        if judged.verdicts[0].unreadable:
            print(f"deepfake: {name}: {judged.verdicts[0].error}", file=sys.stderr)
            failed = True
            continue
        entry = feedback.add(image, pick_verdict(judged.verdicts, version), options.label, options.note)
        print(f"{entry.sha256[:SHOWN_DIGITS]}  {name}: {_sum_up(entry)}")
    return 2 if failed else 0


def _sum_up(entry: FeedbackEntry) -> str:
    if not entry.reports:
        return "was rejected before; nothing is kept"
    last = entry.reports[-1]
    return f"{last.verdict.describe()}; reported as {last.label}, {entry.counted}, {entry.status}"


def list_entries(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    feedback = open_feedback(options.address)
    entries = feedback.list_entries(options.status)
    if not entries:
        print(f"No reports{f' that are {options.status}' if options.status else ''} in {feedback.address}.")
        return 0
    table = Table(
        Column("SHA-256", no_wrap=True), "status", "reports", "says", Column("verdict, note", overflow="fold")
    )
    for entry in sorted(entries, key=lambda one: one.first_time):
        told = [entry.reports[-1].verdict.describe(), entry.reports[-1].note] if entry.reports else []
        cells = (entry.sha256[:SHOWN_DIGITS], entry.label or entry.status, str(entry.count), ", ".join(entry.claimed))
        table.add_row(*cells, escape("\n".join(filter(None, (*told, *entry.problems)))))
    Console().print(table)
    return 0


def show(options: argparse.Namespace) -> int:
    feedback = open_feedback(options.address)
    entry = feedback.read(options.sha256)
    kept = f"{entry.size:,} bytes" if entry.size else "the image is not kept"
    print(f"{entry.sha256}: {entry.status}, {entry.counted}, {kept} in {feedback.address}")
    for report in entry.reports:
        note = f": {report.note}" if report.note else ""
        print(f"{report.time:%Y-%m-%d %H:%M} UTC  reported as {report.label}{note} ({report.verdict.describe()})")
    for decision in entry.decisions:
        label, why = f" as {decision.label}" if decision.label else "", f": {decision.why}" if decision.why else ""
        print(f"{decision.time:%Y-%m-%d %H:%M} UTC  {decision.decision}{label} by {decision.by or 'unknown'}{why}")
    for problem in entry.problems:
        print(problem, file=sys.stderr)
    if options.save:
        options.save.write_bytes(feedback.read_image(entry.sha256))
        print(f"The image is in {options.save}.")
    return 2 if entry.problems else 0


def confirm(options: argparse.Namespace) -> int:
    def decide(feedback: Feedback, by: str) -> FeedbackEntry:
        claimed = feedback.read(options.sha256).claimed
        if not options.label and len(claimed) != 1:
            raise ConfigurationError(
                "--label must say what the image is. Received: none, and the reports say "
                f"{' and '.join(claimed) or 'nothing'}."
            )
        return feedback.confirm(options.sha256, options.label or claimed[0], by, options.why)

    return _decide(options, decide)


def reject(options: argparse.Namespace) -> int:
    return _decide(options, lambda feedback, by: feedback.reject(options.sha256, by, options.why))


def withdraw(options: argparse.Namespace) -> int:
    return _decide(options, lambda feedback, by: feedback.withdraw(options.sha256, by, options.why))


def _decide(options: argparse.Namespace, decide: Callable[[Feedback, str], FeedbackEntry]) -> int:
    entry = decide(open_feedback(options.address), options.by or _name_user())
    label = f" as {entry.label}" if entry.label else ""
    undo = "" if entry.status == "unreviewed" else " `deepfake feedback withdraw` takes it back."
    print(f"{entry.sha256[:SHOWN_DIGITS]} is {entry.status}{label}.{undo}")
    return 0


def _name_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError) as exc:
        raise ConfigurationError("--by must say who decides. Received: none, and this user has no name.") from exc


def forget(options: argparse.Namespace) -> int:
    feedback = open_feedback(options.address)
    sha256 = feedback.find(options.sha256)
    if not ask(options, f"Remove {sha256[:SHOWN_DIGITS]} with its reports and decisions for good?"):
        return 1
    feedback.forget(sha256)
    print(
        f"{sha256[:SHOWN_DIGITS]} is forgotten in {feedback.address}. Data sets that hold it keep it until they are "
        "removed: `deepfake gc`."
    )
    return 0
