"""report.md: the report without plots and examples, for places that show Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from manyicl.comparison import Comparison, tell_flatness, tell_missing, tell_progress
from manyicl.console import DASH, tell_rate
from manyicl.evaluation import tell_shot_count
from manyicl.intervals import MIN_SEEDS
from manyicl.report import tables, verdict
from manyicl.report.matchings import matching_tables, other_settings
from manyicl.report.numbers import (
    count_noun,
    join_words,
    tell_interval,
    tell_nats,
    tell_percent,
    tell_points,
    tell_shots,
)
from manyicl.report.tables import COST_COLUMNS, TableCell, TaskRow

# Characters that Markdown, or HTML in it, would take for markup.
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")

_WORDS = "FT: fine-tuning. Shots: examples before the query; k is their number, and fill as many as fit. Chosen:"
_CHOSEN = {
    True: "the number that is best on validation rows.",
    False: "the most that the arm was trained with (the base: that fits), since none was chosen on validation rows.",
}


def escape(text: str) -> str:
    """Return a text of the user's as Markdown that shows exactly this text, on one line."""
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", one_line)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table: its first column aligned left, numbers aligned right."""
    marks = ["---", *["---:"] * (len(heads) - 1)]
    return ["", *(f"| {' | '.join(row)} |" for row in (heads, marks, *rows)), ""]


def _section(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a heading with a table below it; none without a row."""
    found = list(rows)
    return ["", title, *table(heads, found)] if found else []


def render_markdown(comparison: Comparison, *, beside: Sequence[Comparison] = ()) -> str:
    """Return the report as Markdown.

    beside: the same comparison under other matchings (matchings.py).
    """
    lines = [f"# {escape(comparison.name)}", "", f"**{escape(verdict.tell_verdict(comparison))}**", ""]
    if not comparison.finished:
        lines += [f"Not finished: {tell_progress(comparison)}. Missing:", ""]
        lines += [f"- {escape(where)}: {what}" for where, what in tell_missing(comparison)] + [""]
    lines += [f"- {escape(about)}: {escape(sentence)}" for about, sentence in verdict.key_facts(comparison)]
    for part in (_headline, _curves, _sentences, _forgetting, _costs, _analysis, _confidence, _tasks, _origin):
        lines += part(comparison)
        if part is _sentences and beside:
            lines += _matchings([comparison, *beside])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _shown(cell: TableCell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text.replace("*", r"\*")
    notes = f" ({'; '.join(cell.notes)})".replace("*", r"\*") if cell.notes else ""
    return f"{text} {cell.interval}{notes}".replace("  ", " ").strip()


def _headline(comparison: Comparison) -> list[str]:
    columns, rows = tables.headline_table(comparison)
    heads = ["arm", *(escape(f"{column.group}: {column.title}") for column in columns)]
    lines = table(heads, ([escape(arm.title), *map(_shown, cells)] for arm, cells in rows))
    note = verdict.tell_intervals(comparison)
    if comparison.done_seeds[1] >= MIN_SEEDS:
        note += " **Bold**: better than every other arm of its column, by paired intervals over five or more seeds."
    words = f"{_WORDS} {_CHOSEN[comparison.chooses_shots]}"
    return ["", "## Scores", *lines, note, "", words, "", tables.FORGETTING_NOTE]


def _curves(comparison: Comparison) -> list[str]:
    lines = []
    for role in comparison.roles:
        shots, rows = tables.mean_table(comparison, role)
        if rows:
            lines += ["", f"## {role.capitalize()} tasks: score in % against shots"]
            names = [task.task for task in comparison.tasks_of(role)]
            lines += table(
                ["arm", *(tables.shot_head(comparison, k, names) for k in shots)],
                ([escape(arm.title), *map(_shown, cells)] for arm, cells in rows),
            )
            lines.append(
                rf"Mean of {count_noun(comparison.most_tasks(role), 'task')}, unless a number names fewer."
                rf" \*: {tables.EXTRAPOLATION}; a mean has it if most of its tasks do."
            )
    return lines


def _sentences(comparison: Comparison) -> list[str]:
    lines = []
    changes = [tell_flatness(flat, title=comparison.title_of) for flat in comparison.flatness]
    if any(changes):
        lines += ["", "## Do more shots help?", "", *(f"- {escape(change)}" for change in changes if change)]
    told = [(role, verdict.told_pairs(comparison, role)) for role in comparison.roles]
    if any(pairs for _, pairs in told):
        lines += ["", "## Paired differences", "", verdict.PAIRED_NOTE]
    for role, pairs in told:
        if pairs:
            lines += ["", f"### {role.capitalize()} tasks", "", *(f"- {escape(sentence)}" for _, _, sentence in pairs)]
    return lines


def _matchings(comparisons: Sequence[Comparison]) -> list[str]:
    lines = ["", "## Under each matching"]
    for one in matching_tables(comparisons):
        rows = ([escape(title), *map(_shown, cells)] for title, cells in one.rows)
        lines += ["", escape(one.title), *table(["above", *map(escape, one.heads)], rows)]
    lines.append(
        "\N{MULTIPLICATION SIGN}: training cost, as a multiple of the cost of the arm that it is compared with."
    )
    differs = other_settings(comparisons)
    return [*lines, *(["", f"Settings that differ too: {escape(', '.join(differs))}."] if differs else [])]


def _forgetting(comparison: Comparison) -> list[str]:
    lost, few = comparison.forgetting, comparison.few_seeds
    texts = (
        [
            escape(comparison.title_of(change.arm)),
            escape(change.file),
            *(DASH if value is None else f"{value:.3f}" for value in (change.before, change.after)),
            _shown(tables.change_cell(change, unit="bits", few=few)),
        ]
        for change in lost.text
    )
    tasks = (
        [
            escape(comparison.title_of(change.arm)),
            change.kind,
            tell_shots(change.shots) if change.shots is not None else f"{change.asked}",
            str(len(change.tasks)),
            tell_percent(change.before),
            tell_percent(change.after),
            _shown(tables.change_cell(change, unit="points", few=few)),
        ]
        for change in lost.tasks
    )
    return [
        *(["", "## Forgetting"] if lost.text or lost.tasks else []),
        *_section("", ["arm", "text", "bits per byte before", "after", "lost"], texts),
        *_section("", ["arm", "kind", "shots", "tasks", "before, %", "after, %", "points"], tasks),
        *([verdict.KINDS_NOTE] if lost.tasks else []),
    ]


def _costs(comparison: Comparison) -> list[str]:
    heads = ["arm", "matched", *(title for _, title, _ in COST_COLUMNS)]
    rows = (
        [
            escape(arm.title),
            "not trained" if not arm.is_trained else f"by {escape(comparison.match)}" if arm.matched else "no: ceiling",
            *(cell.text for cell in cells),
        ]
        for arm, cells in tables.mean_costs(comparison)
    )
    return ["", "## What each arm spent per seed", *table(heads, rows)]


def _analysis(comparison: Comparison) -> list[str]:
    flips = (
        [
            escape(comparison.title_of(flip.arm)),
            flip.role,
            tell_shots(flip.shots),
            *(tell_percent(value) for value in (flip.follows, flip.keeps, flip.plain)),
        ]
        for flip in comparison.flips
    )
    orders = (
        [
            escape(comparison.title_of(order.arm)),
            order.role,
            tell_shots(order.shots),
            *(tell_points(value).lstrip("+") for value in (order.spread_of_orders, order.spread_of_draws)),
        ]
        for order in comparison.orders
    )
    trials = (
        [
            escape(comparison.title_of(trial.arm)),
            "all" if trial.task is None else escape(trial.task),
            tell_rate(trial.learning_rate),
            DASH if trial.shots is None else str(trial.shots),
            tell_percent(trial.score),
            tell_nats(trial.nll),
            "chosen" if trial.chosen else "diverged" if trial.diverged else "",
        ]
        for trial in comparison.trials
    )
    tuned = (
        [escape(one.task), str(one.seed), tell_rate(one.learning_rate), f"{one.step:,} of {one.steps:,}"]
        for one in comparison.tuned
    )
    known = ["arm", "role", "shots"]
    return [
        *_section(
            "## With the labels of all shots exchanged",
            [*known, "follows, %", "keeps, %", "plain score, %"],
            flips,
        ),
        *_section(
            "## Order of the shots: standard deviation of the score in points",
            [*known, "over orders", "over draws"],
            orders,
        ),
        *_section(
            "## Learning rates tried, on validation rows",
            ["arm", "task", "learning rate", "shots", "score, %", "nats per answer", ""],
            trials,
        ),
        *_section("## Tuned for each task", ["task", "seed", "learning rate", "step of the checkpoint"], tuned),
    ]


def _confidence(comparison: Comparison) -> list[str]:
    rows = (
        [
            escape(comparison.title_of(one.arm)),
            one.role,
            str(one.tasks),
            *(tell_percent(value) for value in (one.mean, one.score)),
            f"{tell_percent(one.ece)} {tell_interval(one.low, one.high)}",
            tell_percent(one.aurc),
        ]
        for one in comparison.confidence
    )
    heads = ["arm", "role", "tasks", "mean confidence, %", "score, %", "calibration error, %", "AURC, %"]
    return _section("## Does it know when it is right? At the most shots", heads, rows)


def _tasks(comparison: Comparison) -> list[str]:
    levels = ("majority, %", "chance, %")
    heads = ["task", "role", "family", "metric", *levels, *(escape(arm.title) for arm in comparison.arms)]
    every = tables.task_rows(comparison)
    found = [row for row in every if row.task.asked]
    rows = (
        [
            escape(row.task.task),
            row.task.role,
            escape(row.task.family),
            escape(row.task.metric),
            tell_percent(row.majority),
            tell_percent(row.chance),
            *map(_shown, row.scores),
        ]
        for row in found
    )
    lines = ["", "## Tasks: score in %, each arm with its chosen shots", *table(heads, rows)]
    lines += [escape(verdict.tell_not_asked(comparison)), *_other_metrics(found)]
    noted = [row for row in every if row.notes]
    if noted:
        lines += ["", "Rows and answers that were dropped, left out, cut or copied:", ""]
        lines += [f"- {escape(row.task.task)}: {escape('; '.join(row.notes))}" for row in noted]
    overlap = tables.overlap_note(comparison)
    return [*lines, *(["", escape(overlap)] if overlap else [])]


def _other_metrics(found: Sequence[TaskRow]) -> list[str]:
    """Return one table per task that is measured by other metrics than its main one too."""
    lines = []
    for row in found:
        heads = ["arm", "metric", *(tell_shot_count(k) for k in row.shots)]
        rows = ([escape(arm.title), escape(metric), *map(_shown, cells)] for arm, metric, cells in row.others)
        lines += _section(f"### {escape(row.task.task)}: other metrics in %", heads, rows)
    return lines


def _origin(comparison: Comparison) -> list[str]:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", comparison.config))])
    versions = join_words([f"{escape(name)} {escape(str(version))}" for name, version in comparison.versions.items()])
    return [
        "",
        "## Where it comes from",
        "",
        f"- seeds: {', '.join(map(str, comparison.seeds))}",
        f"- versions: {versions}",
        f"- commit: {escape(comparison.git_commit or DASH)}",
        f"- device: {escape(comparison.device or DASH)}",
        "",
        f"{fence}toml",
        comparison.config.rstrip(),
        fence,
    ]
