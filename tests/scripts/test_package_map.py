"""The maps of the packages in README.md and docs/house.md are those of today's docstrings."""

from __future__ import annotations

import pytest
from scripts.package_map import BEGIN, END, SOURCE, fill_in, list_layers, renew_pages, write_full_map


@pytest.mark.slow
def test_both_maps_are_those_of_today():
    stale = [path.name for path, text in renew_pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python scripts/package_map.py"


@pytest.mark.slow
def test_every_module_has_one_line():
    modules = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE and path.name != "__init__.py"]
    lines = [line for line in write_full_map().splitlines() if line.startswith("| `")]
    beside = {f"{name}.py" for name in list_layers() if not (SOURCE / name).is_dir()}
    assert beside == {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py"}
    inner = [path for path in SOURCE.rglob("__init__.py") if len(path.relative_to(SOURCE).parts) == 3]
    assert len(lines) == len(modules) + len(beside) + len(inner)
    assert len(set(lines)) == len(lines)


def test_a_page_without_a_place_for_the_map_is_refused():
    assert fill_in(f"a\n{BEGIN}\nold\n{END}\nz", "new") == f"a\n{BEGIN}\nnew\n{END}\nz"
    with pytest.raises(ValueError, match="once each"):
        fill_in(f"a\n{BEGIN}\nz", "new")
