"""What the README shows is true: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyicl.cli.app import app
from tests.trajectory.setting import write_setting

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_example_runs_and_is_eight_lines(tmp_path, monkeypatch, capsys):
    example = re.search(r"<!-- python-example -->\n```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    statements = [line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 8
    write_setting(tmp_path, num_steps=2)
    (tmp_path / "tasks").rename(tmp_path / "my-tasks")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    audits, counts, points, last, answer = printed
    assert audits.startswith("[('animals', ")
    assert "examples" in counts
    assert "trained: " in counts
    assert points.startswith("[(0, ")
    assert last.startswith("ShotPoint(shots=")
    assert answer


@pytest.mark.slow
def test_the_commands_exist_with_the_options_that_are_shown():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "manyicl " in line.split("#")[0]]
    assert len(commands) >= 7
    for command in commands:
        words = shlex.split(command.split("#")[0].split("| ")[-1])
        verb, options = words[1], [word for word in words if word.startswith("--")]
        text = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        assert all(option in text for option in options), command


def test_the_first_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing == []
