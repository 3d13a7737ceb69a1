"""The command line of whoever uses or answers for the production model.

`deepfake predict`, `serve`, `pull`, `versions`, `compare`, `promote`, `rollback`, `gc`.
"""

import argparse
import csv
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepfake_core import predict_command
from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError, DeepfakeError, ModelError
from deepfake_core.predictor import Predictor, load_detector

DEFAULT_MODEL = "deepfake-detector"
PRODUCTION_URI = f"models:/{DEFAULT_MODEL}@production"
MODEL_HELP = (
    f"folder of a pulled model, or a registry URI such as models:/deepfake-detector/3 (default: {PRODUCTION_URI})"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 if it failed or an image could not be read."""
    options = _build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except DeepfakeError as exc:
        print(f"deepfake: {exc}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001 - Python would end with status 1, by which `--fail-on fake` tells of a fake
        traceback.print_exc()
        return 2


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepfake", description="Tell fake faces from real ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="judge images: real or fake")
    predict_command.add_arguments(predict)
    predict.add_argument("--model", default=PRODUCTION_URI, help=MODEL_HELP)
    predict.set_defaults(run=lambda options: predict_command.run(options, _load_detector))

    serve = commands.add_parser("serve", help="serve a page that judges what is dropped on it, on loopback")
    serve.add_argument("--model", default=PRODUCTION_URI, help=f"{MODEL_HELP}; an alias is followed when it moves")
    serve.add_argument(
        "--no-detect", action="store_true", help="judge whole images: they are cropped to a face already"
    )
    serve.add_argument("--port", type=int, default=7860, help="default: 7860")
    serve.set_defaults(run=_serve)

    versions = commands.add_parser("versions", help="list the registered versions and why each was promoted")
    versions.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
    versions.set_defaults(run=_list_versions)

    compare = commands.add_parser("compare", help="compare two versions on the same images")
    compare.add_argument("versions", nargs=2, metavar="N", help="numbers of versions")
    compare.add_argument(
        "--split",
        type=Path,
        metavar="DIR",
        help="folder with real/ and fake/ images; default: the test images that both versions' runs hold scores of",
    )
    compare.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
    compare.set_defaults(run=_compare)

    promote = commands.add_parser("promote", help="put a version into production")
    promote.add_argument("version", metavar="N", help="number of the version")
    promote.add_argument("--force", action="store_true", help="even if it failed the promotion rule")
    rollback = commands.add_parser("rollback", help="put the version back that production replaced")
    for command, run in ((promote, _promote), (rollback, _roll_back)):
        command.add_argument("--reason", required=True, help="why, for whoever asks later")
        command.add_argument("--yes", action="store_true", help="don't ask for confirmation")
        command.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
        command.set_defaults(run=run)

    pull = commands.add_parser("pull", help="copy a model out of the registry")
    pull.add_argument("folder", type=Path, metavar="DIR", help="folder to write, empty or new")
    pull.add_argument("--model", default=PRODUCTION_URI, help=MODEL_HELP)
    pull.set_defaults(run=_pull)

    gc = commands.add_parser("gc", help="remove old data sets, archives, caches and model files that nothing needs")
    gc.add_argument(
        "--keep",
        type=int,
        default=3,
        metavar="N",
        help="newest data sets, archives of each source, and versions' model files that stay, besides those in use "
        "(default: 3)",
    )
    gc.add_argument("--data-dir", default="data", metavar="DIR", help="data folder, or its URL (default: data)")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go, why, and how much")
    gc.add_argument("--yes", action="store_true", help="don't ask for confirmation")
    gc.add_argument("--model-name", default=DEFAULT_MODEL, help="name in the registry")
    gc.set_defaults(run=_clean)
    return parser


def _load_detector(model: str) -> Detector:
    _check_model(model)
    if not model.startswith("models:/"):
        return load_detector(model)
    from deepfake_core import registry

    with tempfile.TemporaryDirectory() as folder:
        return load_detector(registry.pull_detector(model, Path(folder)))


def _check_model(model: str) -> None:
    if not model.startswith("models:/") and not (Path(model) / "detector.json").is_file():
        raise ModelError(f"--model must be a folder written by `deepfake pull`, or a registry URI. Received: {model!r}")


def _serve(options: argparse.Namespace) -> int:
    from deepfake_core.page_server import serve

    _check_model(options.model)
    serve(options.model, not options.no_detect, options.port)
    return 0


def _list_versions(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from deepfake_core import registry

    versions = registry.list_versions(options.model_name)
    table = Table("version", "created, data set", "on its test split", Column("decision", overflow="fold"))
    table.show_lines = True
    for version in versions:
        figures = {name: version.metrics.get(f"test/{name}") for name in ("precision", "recall", "auc")}
        table.add_row(
            "\n".join((version.version, *version.aliases)),
            f"{version.created}\n{version.tags.get('dataset_version', '')}",
            "\n".join(f"{name} {figure:.4f}" for name, figure in figures.items() if figure is not None),
            "\n".join(_tell_history(version.tags)),
        )
    if versions:
        Console().print(table)
    else:
        print(f"No version of {options.model_name} yet: `make demo` or `python -m flows.retrain` makes one.")
    return 0


def _tell_history(tags: Mapping[str, str]) -> list[str]:
    lines = [tags.get("decision", ""), *tags.get("reasons", "").split("; ")]
    if "production_since" in tags:
        lines.append(f"in production {tags['production_since']}, by {tags['production_by']}")
        if tags["production_because"] != tags.get("reasons"):
            lines.append(tags["production_because"])
    if "replaced_by" in tags:
        lines.append(f"replaced {tags['production_until']} by version {tags['replaced_by']}")
    if "files_removed" in tags:
        lines.append(f"model files removed {tags['files_removed']}")
    return lines


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from deepfake_core import registry
    from deepfake_core.metrics import FIGURES
    from deepfake_core.promotion import Scored, compare_scores

    registry.connect()
    versions = [registry.read_version(options.model_name, number) for number in options.versions]
    if options.split:
        labels, rows, scored = _score_folder(versions, options.split)
    else:
        tables = [_read_scores(version) for version in versions]
        common = sorted(set(tables[0][0]) & set(tables[1][0]))
        if not common:
            raise ModelError(
                f"Two versions must share test images. Received: {options.versions[0]} and {options.versions[1]}, "
                "which have none in common. Name a folder of labelled images with --split."
            )
        images = [tables[0][0][sha256] for sha256 in common]
        labels = np.array([int(image["label"] == "fake") for image in images])
        rows = {name: [image[name] for image in images] for name in ("source", "member", "group")}
        scored = [
            Scored(np.array([float(table[sha256]["score"]) for sha256 in common]), threshold)
            for table, threshold in tables
        ]
    comparison = compare_scores(labels, rows, *scored)
    table = Table(Column("95 % intervals", overflow="fold"), *(f"version {number}" for number in options.versions))
    for name, title in FIGURES.items():
        sides = (comparison.challenger.figures.get(name), comparison.production.figures.get(name))
        table.add_row(title, *(str(side) if side else "-" for side in sides))
    for source, ours in comparison.challenger.sources.items():
        for name in ("auc", "recall"):
            sides = (ours.figures.get(name), comparison.production.sources[source].figures.get(name))
            table.add_row(f"{FIGURES[name]} on {source}", *(str(side) if side else "-" for side in sides))
    Console().print(table)
    if comparison.difference:
        print(
            f"On {len(labels)} images, version {options.versions[0]}'s AUC is {comparison.difference} above version "
            f"{options.versions[1]}'s; it is better with probability {comparison.probability:.3f}."
        )
    if not options.split:
        print("Where one version was trained on another data set, it may have seen some of these images.")
    return 0


def _read_scores(version: Any) -> tuple[dict[str, dict[str, str]], float]:
    """Return the rows of a version's logged test scores by SHA-256, and its threshold."""
    from deepfake_core import registry

    text = registry.read_text(version.run_id, registry.SCORES)
    if text is None:
        raise ModelError(
            f"A version's run must hold its test scores. Received: version {version.version}, run {version.run_id}, "
            "which does not. Name a folder of labelled images with --split."
        )
    threshold = float(registry.read_parameters(version.run_id)["threshold"])
    return {row["sha256"]: row for row in csv.DictReader(text.splitlines())}, threshold


def _score_folder(versions: Sequence[Any], folder: Path) -> tuple[np.ndarray, dict[str, list[str]], list[Any]]:
    from deepfake_core.config import CLASS_NAMES
    from deepfake_core.promotion import Scored

    files = [(file, label) for label, name in enumerate(CLASS_NAMES) for file in sorted((folder / name).rglob("*"))]
    images = [(file, label) for file, label in files if file.is_file()]
    if {label for _, label in images} != {0, 1}:
        raise ModelError(f"--split must be a folder with images in real/ and in fake/. Received: {folder}")
    detectors = [_load_detector(f"models:/{version.name}/{version.version}") for version in versions]
    sources = [(str(file), file) for file, _ in images]
    scores = [
        [judged.verdicts[0].fake_probability for judged in Predictor(detector, detect=False).judge(sources)]
        for detector in detectors
    ]
    usable = [position for position, score in enumerate(scores[0]) if score is not None]
    if len(usable) < len(images):
        print(f"{len(images) - len(usable)} files could not be read and are left out.", file=sys.stderr)
    kept = [images[position] for position in usable]
    rows = {
        "source": [folder.name] * len(kept),
        "member": [str(file) for file, _ in kept],
        "group": [str(file) for file, _ in kept],
    }
    scored = [
        Scored(np.array([one[position] for position in usable], np.float64), detector.threshold)
        for one, detector in zip(scores, detectors, strict=True)
    ]
    return np.array([label for _, label in kept]), rows, scored


def _promote(options: argparse.Namespace) -> int:
    from deepfake_core import registry

    registry.connect()
    current = registry.find_production(options.model_name)
    if not _confirm(options, f"Put version {options.version} into production instead of {current or 'none'}?"):
        return 1
    former = registry.promote_by_hand(options.model_name, options.version, options.reason, options.force)
    print(f"Version {options.version} is in production instead of {former or 'none'}. `deepfake rollback` undoes it.")
    return 0


def _roll_back(options: argparse.Namespace) -> int:
    from deepfake_core import registry

    registry.connect()
    current, previous = registry.find_production(options.model_name), registry.find_previous(options.model_name)
    if previous and not _confirm(options, f"Put version {previous} back into production instead of {current}?"):
        return 1
    restored, former = registry.roll_back(options.model_name, options.reason)
    print(f"Version {restored} is back in production instead of {former}. `deepfake promote {former}` undoes it.")
    return 0


def _confirm(options: argparse.Namespace, question: str) -> bool:
    if options.yes:
        return True
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError as exc:
        raise ModelError("A person must confirm. Received: no answer. Where nobody can, pass --yes.") from exc
    return answer.strip().lower() in ("y", "yes")


def _pull(options: argparse.Namespace) -> int:
    from deepfake_core import registry

    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        raise ModelError(f"DIR must be an empty or new folder. Received: {options.folder}, which holds files.")
    registry.pull_detector(options.model, options.folder)
    print(f"{options.model} is in {options.folder}. Try: deepfake predict FACE.jpg --model {options.folder}")
    return 0


def _clean(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    try:
        from deepfake_core import housekeeping
        from deepfake_core.store import open_store
    except ImportError as exc:
        raise ModelError(
            "Housekeeping needs what retrains are made with. Received: an installation without. Install "
            "deepfake-retraining[train]."
        ) from exc
    if not open_store(options.data_dir).folder.is_dir():
        raise ConfigurationError(f"--data-dir must be the data folder of a retrain. Received: {options.data_dir}")
    goes = housekeeping.clean(options.data_dir, options.model_name, options.keep, dry_run=True)
    if not goes:
        print("Nothing goes.")
        return 0
    table = Table(Column("what", overflow="fold"), "why", Column("MB", justify="right"))
    for removal in goes:
        table.add_row(removal.what, removal.why, f"{removal.bytes / 1e6:,.1f}")
    Console().print(table)
    total = f"{len(goes)} things, {sum(removal.bytes for removal in goes) / 1e6:,.1f} MB"
    if options.dry_run:
        print(f"{total}; none was removed.")
        return 0
    if not _confirm(options, f"Remove {total}?"):
        return 1
    gone = housekeeping.clean(options.data_dir, options.model_name, options.keep, agreed=goes)
    print(f"Removed: {len(gone)} things, {sum(removal.bytes for removal in gone) / 1e6:,.1f} MB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
