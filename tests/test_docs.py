"""What docs/data-flow.md says of packages and functions is so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import manyicl

PACKAGE = Path(manyicl.__file__).parent
DATA_FLOW = (Path(__file__).parents[1] / "docs" / "data-flow.md").read_text(encoding="utf-8")
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
# `package.module.name`, or a method of it
NAMES = sorted(set(re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+){{2,}})`", DATA_FLOW)))


def test_the_walks_name_functions_of_many_packages():
    assert len(NAMES) > 25
    assert {name.split(".")[0] for name in NAMES} >= {
        "tasks",
        "episodes",
        "models",
        "inference",
        "training",
        "evaluation",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_a_walk_names_is_there(name):
    found = manyicl
    for part in name.split("."):
        place = f"{found.__name__}.{part}" if hasattr(found, "__path__") else ""
        found = importlib.import_module(place) if place else getattr(found, part)
    assert found.__doc__


def test_the_table_of_packages_is_whole():
    table = re.findall(r"^\| `(\w+)` \|", DATA_FLOW, flags=re.MULTILINE)
    assert set(table) >= PACKAGES
    assert len(set(table)) == len(table)
