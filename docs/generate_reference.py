"""Hook of mkdocs that writes the reference pages from the code, at each build, so that they can't differ from it."""

import argparse
import importlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic_settings import CliSettingsSource

from deepfake_core.cli import build_parser
from deepfake_core.config import (
    AugmentationParameters,
    DataParameters,
    EvaluationParameters,
    PromotionParameters,
    ReviewDecision,
    Source,
    TrainingParameters,
    WatchParameters,
)
from deepfake_core.models import CANDIDATES
from flows.command_line import RetrainSettings

ROOT = Path(__file__).parents[1]
GROUPS = {
    "data": DataParameters,
    "data.sources": Source,
    "training": TrainingParameters,
    "training.augmentation": AugmentationParameters,
    "evaluation": EvaluationParameters,
    "promotion": PromotionParameters,
    "decisions": ReviewDecision,
    "watch": WatchParameters,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and what the benchmarks wrote, to the pages that lie in docs/."""
    pages = {"parameters": write_parameters, "command-line": write_command_line, "flows": write_flows}
    for name, write in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=write()))
    for path in (ROOT / "benchmarks" / "results").iterdir():
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def write_parameters() -> str:
    """List every parameter under the name that Prefect's form, YAML files and flags use."""
    lines = [
        "# Parameters",
        "",
        "The same in Prefect's form, in the YAML file of `--config`, as flags (`--training.epochs 20`) and in MLflow. "
        "An unknown name or a value out of bounds is refused before anything runs.",
        "",
    ]
    for group, model in GROUPS.items():
        lines += [f"## {group}", "", str(model.__doc__).splitlines()[0], ""]
        lines += tabulate_parameters(model.model_json_schema(), f"{group}.")
    lines += [
        "## Recipes of the candidates",
        "",
        "What a candidate is trained with if a parameter of `training` is empty. Each recipe is in the "
        "candidate's file in `deepfake_core/models`.",
        "",
        f"| | {' | '.join(f'`{name}`' for name in CANDIDATES)} |",
        f"| --- |{' --- |' * len(CANDIDATES)}",
    ]
    recipes = [flatten(candidate.RECIPE.model_dump()) for candidate in CANDIDATES.values()]
    for name in recipes[0]:
        lines.append(f"| `{name}` | {' | '.join(str(recipe[name]) for recipe in recipes)} |")
    return "\n".join(lines) + "\n"


def write_command_line() -> str:
    """Show every command's own help text."""
    parser = build_parser()
    parsers = list_parsers("deepfake", parser)
    parsers["python -m flows.retrain"] = CliSettingsSource(RetrainSettings).root_parser
    targets = re.findall(r"^([a-z-]+):.*## (.*)", (ROOT / "Makefile").read_text(), re.M)
    lines = ["# Command line", "", "In a checkout, `deepfake` is `.venv/bin/deepfake`.", ""]
    for title, one in parsers.items():
        one.formatter_class = partial(argparse.HelpFormatter, width=100)
        lines += [f"## {title}", "", "```text", one.format_help().rstrip(), "```", ""]
    lines += [
        "`python -m flows.leave_one_out` takes the same flags. [Parameters](parameters.md) has them as tables.",
        "",
        "## make",
        "",
        "| target | what it does |",
        "| --- | --- |",
        *(f"| `make {name}` | {escape(text)} |" for name, text in targets),
    ]
    return "\n".join(lines) + "\n"


def list_parsers(name: str, parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return a command's parser, and those of the commands below it, by their names."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    commands = {f"{name} {choice}": one for action in below for choice, one in action.choices.items()}
    return {name: parser} | {k: v for each, one in commands.items() for k, v in list_parsers(each, one).items()}


def write_flows() -> str:
    """List every deployment, and its flow's parameters."""
    deployments: dict[str, list[dict]] = {}
    for deployment in yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]:
        deployments.setdefault(deployment["entrypoint"], []).append(deployment)
    flows = {entrypoint: load_flow(entrypoint) for entrypoint in deployments}
    lines = [
        "# Flows and deployments",
        "",
        "What `make up` and `make deploy` apply, from `deployments/prefect.yaml`. Schedules are cron lines.",
        "",
        "| deployment | what it does | pool | schedule | one at a time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entrypoint, mine in deployments.items():
        name = flows[entrypoint].name
        for deployment in mine:
            schedules = (f"`{one['cron']}` {one['timezone']}" for one in deployment.get("schedules", []))
            cells = [
                f"[`{name}/{deployment['name']}`](#{re.sub('[^a-z-]', '', name)})",
                deployment["description"],
                deployment["work_pool"]["name"],
                ", ".join(schedules) or "-",
                "yes" if deployment.get("concurrency_limit") else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for entrypoint, flow in flows.items():
        text = str(flow.fn.__doc__)
        summary, _, rest = text.partition("Args:")
        _, _, returned = rest.partition("Returns:")
        lines += ["", f"## {flow.name}", "", " ".join(summary.split()), "", f"In `{entrypoint.split(':')[0]}`.", ""]
        lines += tabulate_parameters(flow.parameters.model_dump())
        if returned:
            lines += ["", f"Returns: {' '.join(returned.split())}"]
    return "\n".join(lines) + "\n"


def load_flow(entrypoint: str) -> Any:
    file, name = entrypoint.split(":")
    return getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)


def tabulate_parameters(schema: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a table of a JSON schema's properties."""
    lines = ["| parameter | type | default | what it is |", "| --- | --- | --- | --- |"]
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        group = find_group(field)
        default = "required" if name in required else tell_default(field.get("default"), group)
        description = escape(field.get("description") or str(GROUPS[group].__doc__) if group else field["description"])
        lines.append(f"| `{prefix}{name}` | {tell_type(field, group)} | {default} | {description} |")
    return [*lines, ""]


def find_group(field: Mapping[str, Any]) -> str | None:
    """Return the group of parameters that a property refers to, if it does."""
    reference = re.search(r"'\$ref': '#/(?:\$defs|definitions)/(\w+)'", str(field))
    return next((group for group, model in GROUPS.items() if reference and model.__name__ == reference[1]), None)


def tell_type(field: Mapping[str, Any], group: str | None) -> str:
    """Say what a property takes; every one with an empty default may be left empty."""
    if field.get("type") == "array":
        return f"list of {tell_type(field['items'], group)}"
    if group:
        return f"[{group}](parameters.md#{group.replace('.', '')})"
    if "anyOf" in field:
        return tell_type(field["anyOf"][0], group)  # the other is null
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    return "path" if field.get("format") == "path" else str(field["type"])


def tell_default(default: Any, group: str | None) -> str:
    """Say what is used if nothing is given."""
    if default in (None, "", [], ()):
        return "empty"
    if isinstance(default, list):
        return ", ".join(f"`{one['name'] if isinstance(one, dict) else one}`" for one in default)
    return "its own defaults" if group else f"`{default}`"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def escape(text: str) -> str:
    """Keep a text in its cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
