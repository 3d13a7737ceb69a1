"""The command `deepfake`: its parser and exit status. What each command does is in `deepfake_core.commands`.

`deepfake predict`, `serve`, `pull`, `versions`, `compare`, `promote`, `refuse`, `rollback`, `seal`, `gc`, `feedback`.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from deepfake_core.commands import feedback, model, predict, production, versions
from deepfake_core.config import (
    DEFAULT_DATA_DIR,
    DEFAULT_KEEP,
    DEFAULT_KEEP_OBSERVATIONS_DAYS,
    DEFAULT_KEEP_REJECTED_DAYS,
    DEFAULT_MODEL,
    DEFAULT_OBSERVATIONS,
    PRODUCTION_URI,
)
from deepfake_core.errors import DeepfakeError
from deepfake_core.redaction import redact, redact_logs
from deepfake_core.storage.files import translate_disk_errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    That is 0; 1 if a person declines, or for `--fail-on`; 2 if it failed or an image could not be read.
    """
    options = build_parser().parse_args(arguments)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # in a new folder it logs how it makes its tables
    redact_logs()
    try:
        with translate_disk_errors(Path.cwd()):
            return options.run(options)
    except DeepfakeError as exc:
        print(f"deepfake: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndeepfake: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:  # noqa: BLE001 - Python would end with status 1, which means a fake with `--fail-on fake`
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; of what it parses, `run` is the command's function."""
    parser = argparse.ArgumentParser(prog="deepfake", description="Tell fake faces from real ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    judge = commands.add_parser("predict", help="judge images: real or fake")
    predict.add_arguments(judge)
    judge.add_argument("--model", default=PRODUCTION_URI, help=model.MODEL_HELP)
    judge.set_defaults(run=predict.run)

    serve = commands.add_parser("serve", help="serve a page that judges what is dropped on it, on loopback")
    serve.add_argument(
        "--model", default=PRODUCTION_URI, help=f"{model.MODEL_HELP}; an alias is followed when it moves"
    )
    serve.add_argument(
        "--no-detect", action="store_true", help="judge whole images: they are cropped to a face already"
    )
    serve.add_argument("--observe", default="", metavar="DIR_OR_URL", help=model.OBSERVE_HELP)
    serve.add_argument(
        "--shadow",
        action="store_true",
        help="let the version with the alias `challenger` judge images too; what it says is observed, never shown",
    )
    serve.add_argument("--port", type=int, default=7860, help="default: 7860")
    serve.add_argument(
        "--feedback", metavar="DIR_OR_URL", help="take reports on wrong verdicts there (default: the page takes none)"
    )
    serve.set_defaults(run=model.serve)

    feedback.add_arguments(commands.add_parser("feedback", help="report wrong verdicts, and review the reports"))

    listing = commands.add_parser("versions", help="list the registered versions and why each was promoted or not")
    listing.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
    listing.set_defaults(run=versions.list_versions)

    compare = commands.add_parser("compare", help="compare two versions on the same images")
    compare.add_argument("versions", nargs=2, metavar="N", help="numbers of versions")
    compare.add_argument(
        "--split",
        type=Path,
        metavar="DIR",
        help="folder with real/ and fake/ images; default: the test images that both versions' runs hold scores of",
    )
    compare.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
    compare.set_defaults(run=versions.compare)

    promote = commands.add_parser("promote", help="put a version into production")
    promote.add_argument("version", metavar="N", help="number of the version")
    promote.add_argument("--force", action="store_true", help="even if it failed the promotion rule")
    refuse = commands.add_parser("refuse", help="refuse a version that waits for approval")
    refuse.add_argument("version", metavar="N", help="number of the version")
    rollback = commands.add_parser("rollback", help="put back the version that production replaced")
    for command in (promote, refuse, rollback):
        command.add_argument("--reason", required=True, help="why; recorded with the version")
    seal = commands.add_parser(
        "seal", help="check that a version's files are those that were registered; seal a version without seal"
    )
    seal.add_argument("version", metavar="N", help="number of the version")
    for command, run in ((promote, production.promote), (rollback, production.roll_back), (seal, production.seal)):
        command.add_argument("--yes", action="store_true", help="don't ask for confirmation")
        command.set_defaults(run=run)
    refuse.set_defaults(run=production.refuse)
    for command in (promote, refuse, rollback, seal):
        command.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")

    pull = commands.add_parser("pull", help="copy a model out of the registry")
    pull.add_argument("folder", type=Path, metavar="DIR", help="folder to write, empty or new")
    pull.add_argument("--model", default=PRODUCTION_URI, help=model.MODEL_HELP)
    pull.set_defaults(run=model.pull)

    gc = commands.add_parser(
        "gc", help="remove old data sets, archives, caches, rejected reports and model files that nothing needs"
    )
    gc.add_argument(
        "--keep",
        type=int,
        default=DEFAULT_KEEP,
        metavar="N",
        help="newest data sets, archives of each source, and versions' model files that stay, besides those in use "
        f"(default: {DEFAULT_KEEP})",
    )
    gc.add_argument(
        "--data-dir",
        default=DEFAULT_DATA_DIR,
        metavar="DIR",
        help=f"data folder, or its URL (default: {DEFAULT_DATA_DIR})",
    )
    gc.add_argument(
        "--keep-rejected-days",
        type=int,
        default=DEFAULT_KEEP_REJECTED_DAYS,
        metavar="N",
        help=f"how long images and notes of rejected reports stay (default: {DEFAULT_KEEP_REJECTED_DAYS})",
    )
    gc.add_argument(
        "--feedback", default="", metavar="DIR_OR_URL", help="where reports are (default: feedback in the data folder)"
    )
    gc.add_argument(
        "--observations",
        default=DEFAULT_OBSERVATIONS,
        metavar="DIR_OR_URL",
        help=f"where --observe put observations (default: {DEFAULT_OBSERVATIONS})",
    )
    gc.add_argument(
        "--keep-observations-days",
        type=int,
        default=DEFAULT_KEEP_OBSERVATIONS_DAYS,
        metavar="DAYS",
        help=f"days of observations that stay (default: {DEFAULT_KEEP_OBSERVATIONS_DAYS})",
    )
    gc.add_argument("--dry-run", action="store_true", help="only list what would be removed, why, and how much")
    gc.add_argument("--yes", action="store_true", help="don't ask for confirmation")
    gc.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
    gc.set_defaults(run=production.clean)
    return parser


if __name__ == "__main__":
    sys.exit(main())
