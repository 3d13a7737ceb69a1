"""Rules of layout: sizes of files and functions, and what may import what."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.builders import ROOT

CORE, DECLARED = ROOT / "deepfake_core", (ROOT / "tasks", ROOT / "flows")
MAX_LINES = 260
MAX_STATEMENT_LINES = 25


def list_files(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob("*.py"))]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def count_lines(function: ast.FunctionDef) -> int:
    """Count the lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("file", list_files(CORE), ids=name)
def test_a_file_of_the_core_is_a_few_screens_long(file):
    assert file.name == "config.py" or len(file.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("file", list_files(CORE), ids=name)
def test_only_one_package_imports_when_it_is_imported(file):
    """Importing the command line must not import TensorFlow; `models` is the list of candidates."""
    if file == CORE / "__init__.py":
        imported = [
            node.names[0].name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import)
        ]
        assert imported == ["os"], "it turns telemetry off before anything else is imported"
    elif file.name == "__init__.py" and file.parent.name != "models":
        statements = ast.parse(file.read_text()).body
        assert [type(one) for one in statements] == [ast.Expr], "an __init__.py holds a docstring alone"
        assert ast.get_docstring(ast.parse(file.read_text()))


@pytest.mark.parametrize("file", list_files(*DECLARED), ids=name)
def test_tasks_and_flows_hold_no_logic(file):
    tree = ast.parse(file.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            assert count_lines(function) <= MAX_STATEMENT_LINES, function.name
    annotations = {
        id(part)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for note in [function.returns, *(argument.annotation for argument in function.args.args)]
        if note
        for part in ast.walk(note)
    }
    used = [
        node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in ("np", "numpy", "pd", "pandas")
    ]
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert all(id(node) in annotations for node in used) or {one for one in calls if one[:3] == "pd."} == {"pd.concat"}


def test_imports_run_one_way_in_few_layers():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert len(layers) <= 10
    named = {name for layer in layers for name in layer.replace(" ", "").split(":")} - {"flows", "tasks"}
    found = {f"deepfake_core.{path.stem}" for path in CORE.iterdir() if path.name[0] != "_"}
    assert named == found


def test_no_file_outside_storage_writes_out_a_path_below_the_data_folder():
    folders = {"archives", "indexes", "splits", "batches", "training", "memory.parquet"}
    for file in list_files(CORE, *DECLARED):
        if file.parent.name == "storage":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                assert node.right.value not in folders, f"{name(file)}:{node.lineno}"
