"""The rules of the house: small modules and functions that say what they are, and names that exist if listed."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import manyicl

PACKAGE = Path(manyicl.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in MODULES if path.name == "__init__.py" and len(path.parts) == 2)
MOST_LINES = 60
MOST_MODULE_LINES = 450
MOST_MODULES = 12

modules = pytest.mark.parametrize("module", MODULES, ids=str)
packages = pytest.mark.parametrize("package", PACKAGES, ids=str)


def parse(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 100
    assert [str(package) for package in PACKAGES] == [
        "cli",
        "comparison",
        "conversion",
        "demo",
        "episodes",
        "evaluation",
        "harness",
        "inference",
        "models",
        "planning",
        "report",
        "server",
        "service",
        "tasks",
        "training",
    ]


@modules
def test_a_module_says_in_one_line_what_it_is(module):
    first, *_ = (ast.get_docstring(parse(module)) or "").splitlines() or [""]
    assert first.endswith((".", "?"))
    assert len(first.split()) >= 3


@pytest.mark.parametrize("module", [m for m in MODULES if ">>> " in (PACKAGE / m).read_text(encoding="utf-8")], ids=str)
def test_examples_in_docstrings_give_what_they_say(module):
    name = ".".join(("manyicl", *module.with_suffix("").parts))
    assert not doctest.testmod(importlib.import_module(name)).failed


@modules
def test_no_function_is_endless(module):
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            num_lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert num_lines <= MOST_LINES, f"{module}: {node.name} has {num_lines} lines"


@modules
def test_no_module_is_endless(module):
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= MOST_MODULE_LINES


@packages
def test_a_package_has_few_modules(package):
    names = [path for path in MODULES if path.parent == package and path.name != "__init__.py"]
    assert 2 <= len(names) <= MOST_MODULES


@packages
def test_what_a_package_exports_exists_and_is_what_type_checkers_see(package):
    found = importlib.import_module(f"manyicl.{package}")
    stub = ast.parse((PACKAGE / package / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(found.__all__) == sorted(imported)
    for name in found.__all__:
        assert getattr(found, name) is not None


def test_what_the_library_exports_has_its_name_and_a_docstring():
    assert sorted(dir(manyicl)) == sorted(manyicl.__all__)
    for name in manyicl.__all__:
        assert getattr(manyicl, name).__name__ == name
        assert getattr(manyicl, name).__doc__


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="trian"):
        manyicl.trian  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["check", "diff", "--help"])
def test_commands_that_need_no_model_import_no_torch(verb):
    """They answer in half a second; torch alone takes two."""
    arguments = [verb] if verb == "--help" else [verb, "--help"]
    run = f"from manyicl.cli.app import app; app({arguments!r}, standalone_mode=False)"
    code = f"import sys; {run}; print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'typer'" in ran.stdout
    assert "'torch'" not in ran.stdout


@pytest.mark.slow
def test_the_library_for_4_bits_does_not_write_into_the_terminal():
    pytest.importorskip("bitsandbytes")  # imported here already, so its warning, if there is one, is past
    ran = subprocess.run(
        [sys.executable, "-c", "import manyicl, bitsandbytes"], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
