"""Write the map of the packages and modules into docs/house.md, and the short one into README.md.

Both are made from the first line of each docstring, in the order of imports that pyproject.toml sets for import-linter.
A test fails if either is out of date: `python scripts/package_map.py` writes both anew.
"""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "manyicl"
BEGIN = "<!-- package-map: made by scripts/package_map.py -->"
END = "<!-- end of package-map -->"


def list_layers() -> list[str]:
    """Return packages and modules of `manyicl`, lowest first: each imports only from those before it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [name.strip() for layer in reversed(layers) for name in layer.split(":")]


def read_summary(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def write_short_map() -> str:
    """Return the packages, a line each, as a block of text."""
    packages = [name for name in list_layers() if (SOURCE / name).is_dir()]
    width = max(map(len, packages)) + 1
    lines = [f"{name + '/':<{width}}  {read_summary(SOURCE / name / '__init__.py')}" for name in packages]
    return "\n".join(["```text", "src/manyicl/", *(f"  {line}" for line in lines), "```"])


def write_full_map() -> str:
    """Return a section per package with a line per module, and one for the modules beside the packages."""
    layers = list_layers()
    files = [SOURCE / f"{name}.py" for name in layers if not (SOURCE / name).is_dir()]
    sections = [_section("Files beside the packages", "", files)]
    for name in layers:
        folder = SOURCE / name
        if folder.is_dir():
            modules = sorted(path for path in folder.rglob("*.py") if path != folder / "__init__.py")
            sections.append(_section(f"`{name}`", read_summary(folder / "__init__.py"), modules, within=folder))
    return "\n\n".join(sections)


def _section(heading: str, summary: str, modules: list[Path], *, within: Path = SOURCE) -> str:
    rows = []
    for path in modules:
        name = path.relative_to(within).with_suffix("").as_posix()
        summary_cell = read_summary(path).replace("|", "\\|")
        rows.append(f"| `{name.removesuffix('__init__')}` | {summary_cell} |")
    table = "\n".join(["| module | what it does |", "|---|---|", *rows])
    return "\n\n".join(part for part in (f"### {heading}", summary, table) if part)


def fill_in(page: str, text: str) -> str:
    """Return a page with `text` between the two comments that hold a map.

    Raises:
        ValueError: the page does not have both comments, once each.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have '{BEGIN}' and '{END}', once each")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)


def renew_pages() -> dict[Path, str]:
    """Return page -> its text with the map of today."""
    maps = {ROOT / "docs" / "house.md": write_full_map(), ROOT / "README.md": write_short_map()}
    return {path: fill_in(path.read_text(encoding="utf-8"), text) for path, text in maps.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # for --help, which must write nothing
    for path, text in renew_pages().items():
        path.write_text(text, encoding="utf-8")
