"""`deepfake predict`: files, folders, globs and standard input become a table, JSON lines or CSV."""

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from deepfake_core.commands.model import OBSERVE_HELP, load_model, observe, resolve_version
from deepfake_core.commands.named_images import NamedImage, find_images
from deepfake_core.description import describe_rates
from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError, ModelError
from deepfake_core.serving.file_kinds import is_clip, list_names
from deepfake_core.serving.predictor import Predictor
from deepfake_core.serving.verdict import VERDICT_COLUMNS, Judged, Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="JPEG, PNG or WebP file, clip, folder of these, or glob; - reads an image, or names line by line, from "
        "standard input",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per line")
    output.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument(
        "--no-detect", action="store_true", help="judge whole images: they are cropped to a face already"
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="DIR",
        help="write pictures there that show by a heat map where the model looked",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="call fake from this P(fake) up, 0 to 1, instead of the model's own; what that meant on test images is "
        "printed",
    )
    parser.add_argument(
        "--observe",
        default="",
        metavar="DIR_OR_URL",
        help=OBSERVE_HELP,
    )
    parser.add_argument(
        "--fail-on",
        choices=["fake", "unsure"],
        action="append",
        default=[],
        help="end with status 1 if any verdict is this; may be given twice",
    )


def run(options: argparse.Namespace) -> int:
    """Judge what was named; return 1 if `--fail-on` applies, else 2 if a file could not be read, or a clip in part."""
    named, skipped = find_images(options.images)
    model, version = resolve_version(options.model) if options.observe else (options.model, "")
    detector = load_model(model)
    if options.threshold is not None:
        try:
            detector = detector.at(options.threshold)
        except ValueError as exc:
            raise ConfigurationError(f"--{exc}.") from exc
        version = ""  # these are not the version's verdicts: `watch` must not compare them
    predictor = Predictor(detector, not options.no_detect, version)
    if options.explain and not detector.explains:
        raise ModelError(
            "For --explain, a model must have heat maps. Received: one that was exported before there were any. "
            "Retrain, or name a newer version by --model."
        )
    if "unsure" in options.fail_on and detector.description.get("bounds") is None:
        raise ModelError(
            "For --fail-on unsure, a model must say which verdicts are sure. Received: one that was registered before "
            "there were bounds. Retrain, or name a newer version by --model."
        )
    if options.explain:
        try:
            options.explain.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigurationError(
                f"--explain must be a folder, or one that can be made. Received: {options.explain} ({exc.strerror})"
            ) from exc
    verdicts: list[Verdict] = []
    counts: Counter[str] = Counter()
    show: Callable[[Sequence[Verdict]], None] = verdicts.extend
    if options.json:
        show = _print_json
    elif options.csv:
        show = _make_csv_printer()
    names: set[str] = set()
    incomplete, unsure = False, 0
    quiet = (options.json or options.csv) and sys.stdout.isatty()
    with _show_progress(len(named), quiet) as advance, observe(options.observe) as observer:
        for judged in _judge(predictor, named, bool(options.explain), advance):
            if observer:
                observer.add(judged)
            if options.explain:
                _write_pictures(judged, options.explain, names, detector.threshold)
            counts.update(verdict.outcome for verdict in judged.verdicts)
            unsure += sum(verdict.sure is False for verdict in judged.verdicts)
            show(judged.verdicts)
            first = judged.verdicts[0]  # has what is true of the whole file
            incomplete |= first.unreadable or bool(first.warning)
            if (first.unreadable or first.warning) and (options.json or options.csv):
                print(f"deepfake: {first.image}: {first.error or first.warning}", file=sys.stderr)
    if not (options.json or options.csv):
        _print_table(verdicts, counts, unsure, detector)
    elif options.threshold is not None:
        print(_describe_threshold(detector), file=sys.stderr)
    if skipped:
        print(f"Skipped {len(skipped):,} that are neither image nor clip: {list_names(skipped)}", file=sys.stderr)
    if any({"fake": counts["fake"], "unsure": unsure}[one] for one in options.fail_on):
        return 1
    return 2 if incomplete else 0


def _judge(
    predictor: Predictor, named: Sequence[NamedImage], explain: bool, advance: Callable[[float], None]
) -> Iterator[Judged]:
    """Judge images and clips in order, and advance by 1 for each, by parts of it for the frames of a clip."""

    for clips, some in groupby(named, lambda one: isinstance(one[1], Path) and is_clip(one[1])):
        if clips:
            from deepfake_core.serving.video import MAX_FRAMES, judge_clip

            for _, file in some:
                assert isinstance(file, Path)
                yield judge_clip(predictor, file, MAX_FRAMES, explain, lambda new, total: advance(new / total))
        else:
            for judged in predictor.judge(some, explain):
                advance(1)
                yield judged


def _print_json(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        print(json.dumps(verdict.as_row()), flush=True)


def _make_csv_printer() -> Callable[[Sequence[Verdict]], None]:
    writer = csv.DictWriter(sys.stdout, VERDICT_COLUMNS)
    writer.writeheader()

    def show(verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            box = " ".join(map(str, verdict.box)) if verdict.box else None
            writer.writerow({**verdict.as_row(), "box": box})

    return show


def _print_table(verdicts: Sequence[Verdict], counts: Counter[str], unsure: int, detector: Detector) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("image", overflow="fold"), "face", "verdict", "P(fake)", Column("", overflow="fold"))
    last = None
    for verdict in verdicts:
        outcome = verdict.outcome
        image, last = verdict.image if verdict.image != last else "", verdict.image
        style = {"fake": "bold red", "real": "green"}.get(outcome, "yellow")
        if verdict.sure is False:
            outcome, style = f"{outcome}?", "yellow"
        probability = "" if verdict.fake_probability is None else f"{verdict.fake_probability:.4f}"
        clip = verdict.clip
        spread = f"{clip.low:.2f} to {clip.high:.2f}, {clip.frames} frames" if clip else ""
        face = str(verdict.face or "")
        remarks = "; ".join(filter(None, (verdict.error or spread, verdict.reason, verdict.warning)))
        table.add_row(escape(image), face, f"[{style}]{outcome}", probability, escape(remarks))
    Console().print(table)
    found = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common())
    print(f"{found}; {unsure:,} of the verdicts are not sure, marked by ?." if unsure else f"{found}.")
    print(_describe_threshold(detector))


def _describe_threshold(detector: Detector) -> str:
    rates = describe_rates(detector.description, detector.threshold)
    return f"Fake from {detector.threshold:g} up. {rates or 'What this meant on test images is not known.'}"


def _write_pictures(judged: Judged, folder: Path, names: set[str], threshold: float) -> None:
    """Write a judged image's picture, and a clip's timeline, under names that no other has in this run."""
    stem = name = Path(judged.name).stem or "image"
    number = 1
    while name in names:
        number += 1
        name = f"{stem}-{number}"
    names.add(name)
    if judged.picture:
        judged.picture.save(folder / f"{name}.explained.png")
    if judged.timelines:
        from deepfake_core.serving.video import plot_timeline

        figure = plot_timeline(judged, threshold, Path(judged.name).name)
        figure.savefig(folder / f"{name}.timeline.png", dpi=110)


def _show_progress(total: int, quiet: bool) -> Any:
    if quiet or not sys.stderr.isatty():
        return nullcontext(lambda _: None)
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    @contextmanager
    def show() -> Iterator[Callable[[float], None]]:
        columns = (TextColumn(f"judging {total:,}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda done: progress.advance(task, done)

    return show()
