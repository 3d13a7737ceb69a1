"""The README holds: its commands exist, and its figures come from a file that a benchmark wrote."""

import json
import re
from pathlib import Path

import pytest

from deepfake_core.cli import _build_parser
from deepfake_core.config import SPLITS
from flows.command_line import read_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "retrain.json").read_text())


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    named = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert named >= {"demo", "test"}
    assert named <= set(targets)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "deepfake " in command])
def test_deepfake_commands_parse(command):
    _build_parser().parse_args(command.split()[1:])


@pytest.mark.parametrize("command", [command for command in COMMANDS if "flows.retrain" in command])
def test_retrain_flags_exist(command, capsys):
    arguments = command.split("flows.retrain")[1].split()
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as caught:
            read_settings(arguments)
        assert caught.value.code == 0
        assert "--training.epochs" in capsys.readouterr().out
    else:
        read_settings(arguments)


def test_named_files_exist():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name


def render_results() -> str:
    """Write the results section from the benchmark's file."""
    counts, metrics, seconds = RESULTS["counts"], RESULTS["metrics"], RESULTS["seconds"]
    lines = [
        "| source | files | duplicates | no image | kept |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for source, mine in {**counts["sources"], "all": {"files": counts["files"], **counts["reasons"]}}.items():
        cells = (mine.get(name, 0) for name in ("files", "duplicate", "not_an_image", "kept"))
        lines.append(f"| {source} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    splits = (f"{split} {sum(counts['splits'][split].values()):,}" for split in SPLITS)
    lines += ["", f"Split: {', '.join(splits)}. On the test split, at threshold 0.5:", ""]
    lines += ["| source | accuracy | precision | recall | AUC |", "| --- | ---: | ---: | ---: | ---: |"]
    for source in [*counts["sources"], ""]:
        prefix = f"test/{source}/" if source else "test/"
        if f"{prefix}auc" in metrics:
            cells = (f"{metrics[prefix + name]:.3f}" for name in ("accuracy", "precision", "recall", "auc"))
            lines.append(f"| {source or 'all'} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Version 1: {RESULTS['decision']}, with the floors at their defaults. On {RESULTS['machine']}: preparing took "
        f"{seconds['prepare']:.0f} s, preparing again {seconds['prepare again']:.1f} s, and the retrain "
        f"{seconds['retrain'] / 60:.0f} minutes; the checkpoint kept is epoch {metrics['best_epoch']:.0f}'s.",
    ]
    return "\n".join(lines)


SECTION = re.compile(r"(?<=test_readme.py -->\n).*?(?=\n<!-- end of results -->)", re.S)


def test_results_are_the_benchmarks():
    (section,) = SECTION.findall(README)
    assert section == render_results()


if __name__ == "__main__":  # `make bench` writes the section anew
    (ROOT / "README.md").write_text(SECTION.sub(lambda _: render_results(), README))
