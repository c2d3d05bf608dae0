"""Put results where the documents show them: docs/example and the blocks of output in the README.

    manyicl demo --seeds 5 --out OUT
    python scripts/renew_example.py OUT                          # both halves of the demo

    manyicl compare recipes/compare-smollm2.toml --out runs/smollm2
    python scripts/renew_example.py runs/smollm2 --pictures      # one comparison

It writes the reports to docs/example (with --pictures, six pictures of the first one too, which needs what
screenshot_report.py needs) and the README's block of that name, if it has one, and prints the tables of
docs/results.md. Only comparison.json is read, so models may be missing from OUT. Sentences are for a person to look at
again.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from rich.console import Console
from screenshot_report import VIEWS, set_view, start_chromium

from manyicl.comparison.comparison_file import Comparison, read_comparison
from manyicl.comparison.schema import Change, PairDifference, Scored
from manyicl.models.places import NEUTRAL_TEXT
from manyicl.report.document import write_report
from manyicl.report.numbers import DASH, count_noun, is_known, tell_change, tell_interval, tell_percent
from manyicl.report.tables import COST_COLUMNS, mean_costs
from manyicl.report.terminal import comparison_plot
from manyicl.report.verdict import tell_verdict

ROOT = Path(__file__).parents[1]
REGIMES = ("many_tasks", "few_tasks")
# What the documents call the folder of a demo, wherever it was run.
SHOWN_FOLDER = "runs/demo"
# An absolute path within a quoted recipe; its last part is shown.
ABSOLUTE = re.compile(r'(?<=\\")/(?:[^/"\\]+/)*([^/"\\]+)(?=\\")')


def write_reports(comparisons: Sequence[Path], folder: Path, *, with_examples: bool) -> None:
    """Write comparisons' reports into `folder` as pages and as text, without the paths of the machine of the run.

    with_examples: show queries with their shots; False if the tasks' rows are not ours to publish.
    """
    for comparison in comparisons:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place)
            content = (comparison / "comparison.json").read_text(encoding="utf-8")
            ran_in = re.search(r'folder = \\"([^"\\]+)/' + comparison.name + "/tasks", content)
            if ran_in is not None:
                content = content.replace(ran_in[1], SHOWN_FOLDER)
            content = re.sub(r'[^"\\]*/' + re.escape(NEUTRAL_TEXT.name), NEUTRAL_TEXT.name, content)
            content = ABSOLUTE.sub(r"\1", content)
            if not with_examples:
                content = json.dumps(json.loads(content) | {"examples": []})
            (copy / "comparison.json").write_text(content, encoding="utf-8")
            page = write_report(copy)
            shutil.copyfile(page, folder / f"{comparison.name}.html")
            shutil.copyfile(page.with_suffix(".md"), folder / f"{comparison.name}.md")


def take_pictures(page: Path, folder: Path) -> None:
    """Write the first screen and the whole page: light, dark, and as a phone shows it."""
    with start_chromium() as browser:
        for name in ("light", "dark", "phone"):
            width, height, scale, scheme = VIEWS[name]
            for whole in (False, True):
                set_view(browser, width=width, height=height, scale=1 if whole else scale, scheme=scheme)
                browser.get(page.absolute().as_uri())
                shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
                target = folder / f"{name}{'-whole' if whole else ''}.png"
                target.write_bytes(base64.b64decode(shot["data"]))


def tell_scored(scored: Scored | None) -> str:
    """Return a score in % with its interval."""
    if scored is None or not is_known(scored.score):
        return DASH
    return f"{tell_percent(scored.score)} {tell_interval(scored.low, scored.high)}"


def tell_difference(change: Change, *, unit: str) -> str:
    """Return a difference in points or bits (per byte) with its interval."""
    middle = tell_change(change.difference, unit=unit, low=change.low, high=change.high)
    return f"{middle} {tell_interval(change.low, change.high, unit=unit)}"


def tell_lost_text(comparison: Comparison, arm: str) -> str:
    """Return the bits per byte that the arm lost on the first text."""
    change = next((one for one in comparison.forgetting.text if one.arm == arm), None)
    if change is None or not is_known(change.difference):
        return DASH
    return tell_difference(change, unit="bits")


def readme_block(comparison: Comparison) -> str:
    """Return what the README shows: the verdict, the arms with most shots, and the plot of the held-out tasks."""
    most = comparison.headline_score("manyicl", "held-out", "most")
    shots = "most" if most is None or most.shots == "fill" else most.shots
    rows = [("arm", f"trained, {shots} shots", f"held out, {shots} shots", "forgetting, bits per byte")]
    for arm in comparison.arms:
        cells = [comparison.headline_score(arm.arm, role, "most") for role in ("trained", "held-out")]
        if cells[1] is not None:  # a model of one task has no held-out ones
            rows.append((arm.title, *map(tell_scored, cells), tell_lost_text(comparison, arm.arm)))
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    table = [
        "   ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(columns))
        for columns in (tuple(zip(row, widths, strict=True)) for row in rows)
    ]
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(comparison_plot(comparison, width=74, colour=False))
    plot, _, _ = capture.get().partition("trained tasks: mean score")
    lines = [line.rstrip() for line in plot.rstrip().splitlines()]
    marks = capture.get().rstrip().splitlines()[-1].split("   ")
    key = "   ".join(mark for mark in marks if mark[2:] in [row[0] for row in rows])
    return "\n".join([fill(tell_verdict(comparison), 100, break_on_hyphens=False), "", *table, "", *lines, "", key, ""])


def pair_rows(comparison: Comparison, role: str) -> list[list[str]]:
    """Return, for each other arm, ManyICL's difference from it at the chosen shots, at none and at the most."""
    pairs: dict[str, dict[str, PairDifference]] = {}
    for pair in comparison.differences:
        if pair.role == role and pair.a == "manyicl" and pair.asked in ("chosen", "zero", "most"):
            pairs.setdefault(pair.b, {})[pair.asked] = pair

    def tell(pair: PairDifference | None) -> str:
        if pair is None or not is_known(pair.difference):
            return DASH
        return tell_difference(pair, unit="points")

    return [
        [
            comparison.title_of(arm),
            count_noun(max(one.tasks for one in asked.values()), f"{role} task"),
            *(tell(asked.get(kind)) for kind in ("chosen", "zero", "most")),
        ]
        for arm, asked in pairs.items()
    ]


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of docs/results.md."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def print_tables(comparison: Comparison) -> None:
    """Print the tables of docs/results.md for one regime."""
    asked = (("trained", "chosen"), ("trained", "zero"), ("trained", "most"))
    asked += (("held-out", "most"), ("held-out", "zero"))
    heads = ["arm", "trained, chosen k", "trained, 0 shots", "trained, most shots", "held out, most shots"]
    heads += ["held out, 0 shots", "bits per byte lost"]
    rows = [
        [
            arm.title,
            *(tell_scored(comparison.headline_score(arm.arm, *one)) for one in asked),
            tell_lost_text(comparison, arm.arm),
        ]
        for arm in comparison.arms
    ]
    print(f"\n{comparison.name}\n\n{markdown_table(heads, rows)}")
    heads = ["other arm", "tasks", "at each one's chosen k", "without shots", "with most shots"]
    print(markdown_table(heads, [row for role in ("trained", "held-out") for row in pair_rows(comparison, role)]))
    changes = [
        [
            change.kind,
            str(change.asked),
            str(len(change.tasks)),
            comparison.title_of(change.arm),
            tell_difference(change, unit="points"),
        ]
        for change in comparison.forgetting.tasks
        if is_known(change.difference)
    ]
    print(markdown_table(["kind", "shots", "tasks", "arm", "less the base, points"], changes))
    costs = [[arm.title, *(cell.text for cell in cells)] for arm, cells in mean_costs(comparison)]
    print(markdown_table(["spent a seed", *(head for _, head, _ in COST_COLUMNS)], costs))


def renew_block(readme: Path, name: str, block: str) -> bool:
    """Write the README's block of output of that name anew; return whether it has one.

    Raises:
        SystemExit: it has several.
    """
    pattern = re.compile(rf"(<!-- {name}-output -->\n```text\n).*?(```)", flags=re.DOTALL)
    text, count = pattern.subn(lambda found: found[1] + block + found[2], readme.read_text(encoding="utf-8"))
    if count > 1:
        raise SystemExit(f"{readme}: has {count} blocks after <!-- {name}-output -->, not one")
    readme.write_text(text, encoding="utf-8")
    return count == 1


def main() -> None:
    """Read the arguments, renew the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of a finished demo or comparison")
    parser.add_argument("--pictures", action="store_true", help="take the pictures of the first report too")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository whose documents are renewed")
    args = parser.parse_args()
    example, readme = args.root / "docs" / "example", args.root / "README.md"
    is_demo = not (args.out / "comparison.json").is_file()
    folders = [args.out / regime for regime in REGIMES] if is_demo else [args.out]
    comparisons = [read_comparison(folder) for folder in folders]
    for folder, comparison in zip(folders, comparisons, strict=True):
        if not comparison.finished:
            parser.error(f"{folder}: is not finished; go on: manyicl compare --resume {folder}")
    write_reports(folders, example, with_examples=is_demo)  # the demo's tasks are generated
    has_block = renew_block(readme, "demo" if is_demo else args.out.name, readme_block(comparisons[0]))
    if args.pictures:
        take_pictures(example / f"{folders[0].name}.html", example)
    for comparison in comparisons:
        print_tables(comparison)
    print(f"\nrenewed {example}" + (f" and the block of {readme}" if has_block else ""))


if __name__ == "__main__":
    main()
