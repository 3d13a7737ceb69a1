"""The README and docs/ hold: the site builds strictly, its reference is whole, and every command and example exists."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from prefect.cli import deployment as prefect_deployment
from prefect.cli import worker as prefect_worker
from prefect.client.schemas.objects import BlockDocument
from prefect.flows import load_flow_from_entrypoint

from deepfake_core import errors
from deepfake_core.cli import _build_parser
from deepfake_core.models import CANDIDATES
from deployments.alerts import BLOCK, make_automations
from docs.generate_reference import GROUPS
from flows.command_line import RetrainSettings, read_settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]


def find_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def read_commands(page: Path) -> list[list[str]]:
    """Return the commands of a page as words; quotations and lines that end with a backslash go on."""
    commands, pending = [], ""
    for line in "".join(find_blocks(page, "sh")).splitlines():
        pending += f"{line}\n"
        try:
            words = shlex.split(pending.replace("\\\n", " "), comments=True)
        except ValueError:  # inside a quotation
            continue
        if not line.endswith("\\"):
            pending = ""
            commands += [words] if words else []
    assert not pending, f"{page.name}: a quotation is not closed: {pending}"
    return commands


COMMANDS = [pytest.param(words, id=f"{page.stem}: {words[0]}") for page in PAGES for words in read_commands(page)]


@pytest.fixture(scope="module")
def flows():
    """Return the flow of every deployment, by the name that both have together."""
    loaded = {one["entrypoint"]: load_flow_from_entrypoint(str(ROOT / one["entrypoint"])) for one in DEPLOYMENTS}
    return {f"{loaded[one['entrypoint']].name}/{one['name']}": loaded[one["entrypoint"]] for one in DEPLOYMENTS}


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """Write the files that pages show under their names, and stand beside them."""
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for block in find_blocks(page, "yaml"):
            if name := re.match(r"# (\S+\.yaml)\n", block):
                (tmp_path / name[1]).write_text(block)


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.usefixtures("example_files")
def test_a_command_exists_and_takes_its_arguments(words, flows):
    program, *arguments = (word.replace("tiny", "cnn") for word in words)  # what own-model.md adds
    if program.startswith(".venv/"):
        program = Path(program).name
        assert (Path(sys.executable).parent / program).is_file()
    if program == "deepfake":
        _build_parser().parse_args(arguments)
    elif program == "make":
        assert next(word for word in arguments if "=" not in word) in TARGETS
    elif program == "python" and arguments[1].startswith("flows."):
        assert (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file()
        if arguments[2:] == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                read_settings(["--help"])
        else:
            assert "sample" in RetrainSettings.model_fields
            read_settings([flag for flag in arguments[2:] if flag != "--sample"])  # it would draw hundreds of images
    elif program == "python" and arguments[0].startswith("deployments/"):
        known = subprocess.run([sys.executable, ROOT / arguments[0], "--help"], capture_output=True, text=True).stdout
        assert set(arguments[1:]) <= set(re.findall(r"[\w-]+", known))
    elif program == "python":
        assert arguments[:2] == ["-m", "pytest"]
        assert (ROOT / arguments[2]).is_file()
    elif program == "prefect":
        check_prefect(arguments, flows)
    elif program == "curl":
        assert set(re.findall(r"/name/([\w./-]+)", " ".join(arguments))) <= set(flows)
        if "-d" in arguments:
            flows["retrain/manual"].validate_parameters(json.loads(arguments[-1])["parameters"])
    else:
        assert program in {
            "export",
            "git",
            "kubectl",
            "mlflow",
            "pg_dump",
            "pip",
            "rm",
            "tar",
            "uv",
        } or program.startswith("id=")


def check_prefect(arguments, flows):
    """Hold a command to the signature of Prefect's, and a deployment's parameters to its flow."""
    if arguments[:2] == ["worker", "start"]:
        source = inspect.getsource(prefect_worker.start)
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
        return
    *group, command = (word for word in arguments[:3] if word in {"deployment", "schedule", "run", "pause", "resume"})
    function = getattr(prefect_deployment, "_".join([command, *group[1:]]))
    known = [name.strip("_").replace("_", "-") for name in inspect.signature(function).parameters] + ["param"]
    assert {word for word in arguments if word.startswith("--")} <= {f"--{name}" for name in known}
    if command == "run":
        values = dict(value.split("=", 1) for option, value in pairwise(arguments) if option == "--param")
        flows[arguments[2]].validate_parameters({name: read_value(value) for name, value in values.items()})


def read_value(text):
    """Read a parameter as `prefect deployment run` does: JSON, or else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "json")], ids=lambda page: page.stem)
def test_parameters_to_paste_are_known_and_in_range(page, flows):
    for block in find_blocks(page, "json"):
        flows["retrain/manual"].validate_parameters(json.loads(block))


def test_the_readme_names_files_that_exist():
    for name in re.findall(r"\]\(([\w./-]+)[)#]", PAGES[0].read_text()):
        assert (ROOT / name).exists(), name


def test_the_example_of_a_candidate_is_one():
    (block, *_) = find_blocks(DOCS / "how-to" / "own-model.md", "python")
    example: dict = {}
    exec(compile(block, "tiny.py", "exec"), example)
    model = example["build"](example["RECIPE"])
    assert model.name == "tiny"
    assert model.output_shape == (None, 1)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as `make docs` does, elsewhere; a broken link or a page missing from the navigation ends it."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_the_reference_names_every_parameter_command_and_flow(site, flows):
    parameters = (site / "reference" / "parameters.html").read_text()
    names = [f"{group}.{name}" for group, model in GROUPS.items() for name in model.model_fields]
    assert len(names) > 40
    for name in [*names, *CANDIDATES]:
        assert f"<code>{name}</code>" in parameters, name
    commands = (site / "reference" / "command-line.html").read_text()
    for name in ("predict", "serve", "versions", "compare", "promote", "rollback", "pull"):
        assert f"usage: deepfake {name} " in commands
    assert "--training.epochs" in commands
    for target in TARGETS:
        assert f"<code>make {target}</code>" in commands
    page = (site / "reference" / "flows.html").read_text()
    for name in flows:
        assert f"<code>{name}</code>" in page
    for cron in (schedule["cron"] for one in DEPLOYMENTS for schedule in one.get("schedules", [])):
        assert f"<code>{cron}</code>" in page


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", page.read_text())
        loaded += re.findall(r"<link[^>]*\shref=\"?([^\s\">]+)", page.read_text())
        assert loaded
        assert not [address for address in loaded if "//" in address]


def test_every_alert_is_explained_by_its_name():
    page = (DOCS / "operations.md").read_text()
    alerts = make_automations(BlockDocument(name=BLOCK, block_type_id=uuid4(), block_schema_id=uuid4()))
    assert len(alerts) >= 4
    for alert in alerts:
        assert f"\n### {alert.name}\n" in page


def test_every_error_is_explained():
    page = (DOCS / "operations.md").read_text()
    kinds = [kind for group in (errors.TransientError, errors.PermanentError) for kind in group.__subclasses__()]
    for kind in kinds:
        assert f"| `{kind.__name__}` |" in page
