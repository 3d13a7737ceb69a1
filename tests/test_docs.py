"""The README and docs/ are true: the site builds strictly, its reference is complete, commands and examples exist."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import click
import pytest
import yaml
from markdown.extensions.toc import slugify
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mlflow.cli import cli as mlflow_cli
from prefect.cli._app import _app as prefect_cli
from prefect.cli._utilities import load_json_key_values
from prefect.cli.deployment import run as run_deployment
from prefect.client.schemas.objects import BlockDocument
from prefect.flows import load_flow_from_entrypoint

from deepfake_core import errors
from deepfake_core.cli import build_parser
from deepfake_core.models import CANDIDATES
from deployments.alerts import BLOCK, make_automations
from docs.generate_reference import GROUPS
from flows.command_line import RetrainSettings, read_settings
from tests.conftest import COLLECTED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ARCHITECTURE = DOCS / "architecture.md"
MAX_LINE = 120
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
ADDED_CANDIDATES = {"own-model": "tiny"}
"""Candidates that a page tells how to add: its commands are checked with `cnn` instead."""
UNCHECKED = {"docker", "export", "git", "kubectl", "mkdir", "mv", "pg_dump", "pg_restore", "pip", "tar"}
"""Programs in the pages whose arguments no test reads: the shell's and the system's."""
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]


def find_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def read_commands(page: Path) -> list[list[str]]:
    """Return the commands of a page as words; quotations and lines that end with a backslash go on."""
    commands, pending = [], ""
    script = "".join(find_blocks(page, "sh"))
    if page.stem in ADDED_CANDIDATES:
        script = re.sub(rf"\b{ADDED_CANDIDATES[page.stem]}\b", "cnn", script)
    for line in script.splitlines():
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


def find_program(words: list[str]) -> str:
    """Return the name of a command's program, also of one in id=$(...)."""
    return Path(words[0].removeprefix("id=$(")).name


def find_in_venv(program: str) -> Path:
    return Path(sys.executable).parent / program


COMMANDS = [pytest.param(words, id=f"{page.stem}: {words[0]}") for page in PAGES for words in read_commands(page)]
PROGRAMS = {find_program(words) for page in PAGES for words in read_commands(page)}


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


def check_deepfake(arguments, _flows):
    build_parser().parse_args(arguments)


def check_make(arguments, _flows):
    targets = [word for word in arguments if "=" not in word]
    assert targets
    assert set(targets) <= set(TARGETS)


def check_python(arguments, _flows):
    """Find the module or script that Python runs, and check its own arguments."""
    match arguments:
        case ["-m", "pytest", file]:
            assert (ROOT / file).is_file()
        case ["-m", "flows.retrain", "--help"]:
            with pytest.raises(SystemExit, match="0"):
                read_settings(["--help"])
        case ["-m", "flows.retrain", *flags]:
            assert "sample" in RetrainSettings.model_fields
            read_settings([flag for flag in flags if flag != "--sample"])  # it would draw hundreds of images
        case [script, *options] if script.startswith(("deployments/", "benchmarks/")):
            shown = subprocess.check_output([sys.executable, ROOT / script, "--help"], text=True)
            assert {option for option in options if not option.isdigit()} <= set(re.findall(r"[\w-]+", shown))
        case _:
            pytest.fail(f"No check of this command: python {shlex.join(arguments)}")


def check_uv(arguments, _flows):
    """Have uv read the arguments; with --help after them it does no more."""
    subprocess.run([find_in_venv("uv"), *arguments, "--help"], capture_output=True, check=True)


def check_prefect(arguments, flows):
    """Have Prefect's command line read the arguments, and the flow of a deployment its parameters."""
    function, given, _ = prefect_cli.parse_args(arguments, exit_on_error=False, print_error=False)
    if function is run_deployment:
        parameters = load_json_key_values(given.arguments.get("params", []), "parameter")
        flows[given.arguments["name"]].validate_parameters(parameters)


def check_mlflow(arguments, _flows):
    check_click(mlflow_cli, arguments)


def check_ray(arguments, _flows):
    from ray.scripts.scripts import cli as ray_cli  # here, as it takes a second

    check_click(ray_cli, arguments)


def check_click(command, arguments):
    """Have a command line read the arguments, down to the subcommand that would run."""
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(click.Context(command), arguments)
    command.make_context(name, arguments)


def check_curl(arguments, flows):
    """Find the deployment that an address names, and validate the parameters that are sent."""
    assert set(re.findall(r"/name/([\w.-]+/[\w.-]+)", " ".join(arguments))) <= set(flows)
    if "-d" in arguments:
        flows["retrain/manual"].validate_parameters(json.loads(arguments[-1])["parameters"])


CHECKERS = {
    "curl": check_curl,
    "deepfake": check_deepfake,
    "make": check_make,
    "mlflow": check_mlflow,
    "prefect": check_prefect,
    "python": check_python,
    "ray": check_ray,
    "uv": check_uv,
}


@pytest.mark.process
@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.usefixtures("example_files")
def test_a_command_exists_and_takes_its_arguments(words, flows):
    program = find_program(words)
    if words[0].startswith(".venv/"):
        assert find_in_venv(program).is_file()
    if program not in UNCHECKED:
        CHECKERS[program](words[1:], flows)


def test_the_unchecked_programs_are_those_that_are_named():
    assert PROGRAMS - set(CHECKERS) == UNCHECKED
    assert set(CHECKERS) <= PROGRAMS


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "json")], ids=lambda page: page.stem)
def test_parameters_to_paste_are_known_and_in_range(page, flows):
    for block in find_blocks(page, "json"):
        flows["retrain/manual"].validate_parameters(json.loads(block))


def test_the_readme_names_files_and_sections_that_exist():
    for name, anchor in re.findall(r"\]\(([\w./-]+)#?([\w-]*)\)", PAGES[0].read_text()):
        assert (ROOT / name).exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(), re.M)
            assert anchor in [slugify(heading, "-") for heading in headings], f"{name}#{anchor}"


def find_wide_lines(text: str) -> Iterator[str]:
    """Yield what is wider than the code, except a link or a picture alone, and rows of tables that a benchmark made."""
    is_generated = False
    for line in text.splitlines():
        if re.match(r" *<!-- .+: checked against benchmarks/results", line):
            is_generated = True
        elif re.match(r" *<!-- end of ", line):
            is_generated = False
        is_link = re.fullmatch(r"\s*([-*] )?(!\[[^]]*\]\(\S+\)|<?https?://\S+>?)", line)
        if len(line) > MAX_LINE and not is_link and not (is_generated and line.startswith("|")):
            yield line


WRAPPED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "deepfake_core").rglob("*.jinja"))]


@pytest.mark.parametrize("file", WRAPPED, ids=lambda file: file.name)
def test_lines_are_no_wider_than_the_code(file):
    assert list(find_wide_lines(file.read_text())) == []


def test_wide_lines_are_found_among_generated_ones_too():
    word, row = "x" * MAX_LINE + "x", f"| {'x' * MAX_LINE} |"
    section = f"<!-- results: checked against benchmarks/results by a test -->\n{word}\n{row}\n<!-- end of results -->"
    assert list(find_wide_lines(f"{section}\n{row}\n![{word}](a.png)\nhttps://example.org/{word}")) == [word, row]


def read_section(page: Path, title: str) -> str:
    """Return a page's text from one heading to the next of its level."""
    level = title.split()[0]
    return page.read_text().partition(f"\n{title}\n")[2].partition(f"\n{level} ")[0]


def test_the_architecture_states_the_import_layers():
    (contract, *_) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("deepfake_core.", "") for layer in contract["layers"]]
    (block,) = find_blocks(ARCHITECTURE, "text")
    assert block.splitlines() == layers


def test_the_architecture_names_every_module():
    named: dict[str, set[str]] = {}
    package = ""
    for first, files in re.findall(r"^\| (.*?) ?\| .+ \| (.+) \|$", read_section(ARCHITECTURE, "## Packages"), re.M):
        package = first or package
        named.setdefault(package, set()).update(re.findall(r"`(\w+)`", files))
    named["`models/`"] |= {*CANDIDATES, "torch_checkpoint"}  # "any other"
    for folder in (ROOT / "deepfake_core", *(file.parent for file in (ROOT / "deepfake_core").glob("*/__init__.py"))):
        modules = {file.stem for file in folder.glob("*.py")} - {"__init__"}
        assert named["(top)" if folder.name == "deepfake_core" else f"`{folder.name}/`"] == modules


def test_the_promises_name_the_tests_that_hold_them_and_how_many_cases_they_try(request):
    """Cases are counted in files that are collected, as all are by `make test`."""
    promises = re.findall(r"^- \*\*(.+?)\*\*", read_section(ARCHITECTURE, "## What always holds"), re.M)
    page = (DOCS / "promises.md").read_text()
    assert re.findall("^## (.+)$", page, re.M) == promises
    counts, file = request.config.stash[COLLECTED], ""
    rows = re.findall(r"^\| (\d*)(?: \(\d+ drawn\))? ?\| `([\w/.]+)` \|$", page, re.M)
    assert len(rows) > 80
    for count, name in rows:
        if not count:
            file, code = f"tests/{name}", (ROOT / "tests" / name).read_text()
            continue
        assert f"\ndef {name}(" in code
        assert counts.get(f"{file}::{name}", int(count)) == int(count), name


def test_the_architecture_names_files_to_change_that_exist():
    names = re.findall(r"`([a-z_]+/[\w./-]*|\w+\.py)`", read_section(ARCHITECTURE, "## Which file to change"))
    assert len(names) > 30
    for name in names:
        assert (ROOT / "deepfake_core" / name).exists() or (ROOT / name).exists(), name


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


@pytest.mark.slow
def test_the_reference_names_every_parameter_command_and_flow(site, flows):
    parameters = (site / "reference" / "parameters.html").read_text()
    names = [f"{group}.{name}" for group, model in GROUPS.items() for name in model.model_fields]
    assert len(names) > 40
    for name in [*names, *CANDIDATES]:
        assert f"<code>{name}</code>" in parameters, name
    commands = (site / "reference" / "command-line.html").read_text()
    for name in ("predict", "serve", "versions", "compare", "promote", "rollback", "seal", "pull", "feedback add"):
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
