"""The command line of whoever uses the production model: `deepfake predict`, `versions`, `pull`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepfake_core.detector import MAX_BYTES, Detector, Prediction
from deepfake_core.errors import DeepfakeError, ModelError

PRODUCTION_URI = "models:/deepfake-detector@production"
MODEL_HELP = (
    f"folder of a pulled model, or a registry URI such as models:/deepfake-detector/3 (default: {PRODUCTION_URI})"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 if an image could not be read or the command failed."""
    options = _build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except DeepfakeError as exc:
        print(f"deepfake: {exc}", file=sys.stderr)
        return 2


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepfake", description="Tell fake faces from real ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="judge images: real or fake")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file")
    predict.add_argument("--model", default=PRODUCTION_URI, help=MODEL_HELP)
    predict.add_argument("--json", action="store_true", help="print one JSON object per line")
    predict.set_defaults(run=_predict)

    versions = commands.add_parser("versions", help="list the registered versions and why each was promoted")
    versions.add_argument("--model-name", default="deepfake-detector", help="name in the registry")
    versions.set_defaults(run=_list_versions)

    pull = commands.add_parser("pull", help="copy a model out of the registry")
    pull.add_argument("folder", type=Path, metavar="DIR", help="folder to write, empty or new")
    pull.add_argument("--model", default=PRODUCTION_URI, help=MODEL_HELP)
    pull.set_defaults(run=_pull)
    return parser


def _predict(options: argparse.Namespace) -> int:
    detector = _load_detector(options.model)
    rows = [(path, _judge_file(detector, path)) for path in options.images]
    if options.json:
        for path, prediction in rows:
            print(json.dumps({"image": str(path), **asdict(prediction)}))
    else:
        table = Table("image", "label", "P(fake)", caption=f"fake from {detector.threshold:g} up")
        for path, prediction in rows:
            if prediction.fake_probability is None:
                table.add_row(str(path), "unreadable", str(prediction.error))
            else:
                table.add_row(str(path), prediction.label, f"{prediction.fake_probability:.4f}")
        Console().print(table)
    return 2 if any(prediction.error for _, prediction in rows) else 0


def _judge_file(detector: Detector, path: Path) -> Prediction:
    try:
        if path.stat().st_size > MAX_BYTES:
            return Prediction(None, None, detector.threshold, f"may hold {MAX_BYTES:,} bytes at most")
        return detector.predict([path.read_bytes()])[0]
    except OSError as exc:
        return Prediction(None, None, detector.threshold, f"can't be read ({exc.strerror})")


def _load_detector(model: str) -> Detector:
    if not model.startswith("models:/"):
        if not (Path(model) / "detector.json").is_file():
            raise ModelError(
                f"--model must be a folder written by `deepfake pull`, or a registry URI. Received: {model!r}"
            )
        return Detector(model)
    from deepfake_core import registry

    with tempfile.TemporaryDirectory() as folder:
        return Detector(registry.pull_detector(model, Path(folder)))


def _list_versions(options: argparse.Namespace) -> int:
    from deepfake_core import registry

    versions = registry.list_versions(options.model_name)
    table = Table("version", "created", "on its test split", "decision")
    table.show_lines = True
    for version in versions:
        figures = {name: version.metrics.get(f"test/{name}") for name in ("precision", "recall", "auc")}
        table.add_row(
            "\n".join((version.version, *version.aliases)),
            version.created,
            "\n".join(f"{name} {figure:.4f}" for name, figure in figures.items() if figure is not None),
            "\n".join((version.tags.get("decision", ""), *version.tags.get("reasons", "").split("; "))),
        )
    if versions:
        Console().print(table)
    else:
        print(f"No version of {options.model_name} yet: `make demo` or `python -m flows.retrain` makes one.")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from deepfake_core import registry

    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        raise ModelError(f"DIR must be an empty or new folder. Received: {options.folder}, which holds files.")
    registry.pull_detector(options.model, options.folder)
    print(f"{options.model} is in {options.folder}. Try: deepfake predict FACE.jpg --model {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
