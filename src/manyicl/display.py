"""Tables and curves for the terminal. Everything also reads well without colour and without a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotext
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from manyicl.audit import TaskAudit
from manyicl.cells import Cell, ShotCurve
from manyicl.difference import CellDifference, Difference, MeanDifference, tell_difference
from manyicl.held_out import HeldOutRow, mean_of_tasks
from manyicl.intervals import Interval
from manyicl.results import Evaluation
from manyicl.runs import Prepared, count_dropped, count_plan


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints texts as they are, and folds nothing away where the output is no terminal."""
    # Labels and paths are texts of the user's: "[/b]" is no markup, ":cat:" no picture.
    console = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 4096
    return console


def show_shots(curves: Sequence[ShotCurve]) -> list[int]:
    """Return the shot counts a table shows: all of them, or powers of two where there are more than ten."""
    every = sorted({cell.shots for curve in curves for cell in curve.cells})
    if len(every) <= 10:
        return every
    return [k for k in every if k == 0 or k & (k - 1) == 0 or k == every[-1]]


def evaluation_table(evaluation: Evaluation) -> Group:
    """Return score [low, high] by task and shots, and the worst draw at the most shots.

    A dash stands where nothing was scored, * where extrapolated; what an audit found is told below.
    """
    shots = show_shots(evaluation.curves)
    unit = "greedy exact match" if evaluation.kind == "one-pass" else "score"
    # Not the table's own title, which would be folded to its width.
    title = Text(f"{evaluation.model}: {unit} in % by number of shots, 95 % interval", style="italic")
    last = {curve.task: _last_scored(curve) for curve in evaluation.curves}
    has_draws = any(cell is not None and cell.worst_draw is not None for cell in last.values())
    table = Table()
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    table.add_column("majority", justify="right")
    for k in shots:
        table.add_column(str(k), justify="right")
    if has_draws:
        table.add_column("worst draw", justify="right")
    for curve in evaluation.curves:
        cells = {cell.shots: cell for cell in curve.cells}
        majority = next((c.majority_score for c in curve.cells if c.majority_score is not None), None)
        table.add_row(
            curve.task,
            curve.metric,
            "-" if majority is None else f"{100 * majority:.1f}",
            *(_cell_text(cells.get(k)) for k in shots),
            *([_worst_text(last[curve.task])] if has_draws else []),
        )
    note = "worst draw: at the most shots that were scored; \u00b1: standard deviation over draws, in points"
    return Group(title, table, *([Text(note, style="dim")] if has_draws else []), *_notes(evaluation))


def _last_scored(curve: ShotCurve) -> Cell | None:
    return next((cell for cell in reversed(curve.cells) if cell.num_scored), None)


def _worst_text(cell: Cell | None) -> str:
    if cell is None or cell.worst_draw is None or cell.spread is None:
        return "-"
    return f"{100 * cell.worst_draw:.1f} \u00b1{100 * cell.spread:.1f}"


def _cell_text(cell: Cell | None) -> str:
    if cell is None or cell.score is None:
        return "-"
    star = "*" if cell.extrapolated else ""
    if cell.low is None or cell.high is None or math.isnan(cell.low):
        return f"{100 * cell.score:.1f}{star}"
    return f"{100 * cell.score:.1f}{star} [{100 * cell.low:.0f}, {100 * cell.high:.0f}]"


def _notes(evaluation: Evaluation) -> list[Text]:
    notes = []
    cells = [cell for curve in evaluation.curves for cell in curve.cells]
    if any(cell.extrapolated and cell.num_scored for cell in cells):
        notes.append("* more shots than this task was trained with")
    for curve in evaluation.curves:
        unfit = max((cell.num_unfit for cell in curve.cells if cell.num_scored), default=0)
        if unfit:
            notes.append(f"{curve.task}: {unfit} queries do not fit behind its most shots and were left out at every k")
        missing = [str(cell.shots) for cell in curve.cells if not cell.num_scored]
        if missing:
            counts = ", ".join(missing)
            notes.append(
                f"{curve.task}: {counts} shots do not fit {evaluation.max_tokens} tokens, or are more than it has"
            )
        cut = sum(cell.num_cut for cell in curve.cells)
        if cut:
            notes.append(f"{curve.task}: {cut} generated answers reached the token limit before their end")
        notes += _audit_shots(curve)
    return [Text(note, style="dim") for note in notes]


def _audit_shots(curve: ShotCurve) -> list[str]:
    """Return what was found among the shots of a task's largest k, where the most can be found: copies and labels."""
    last = _last_scored(curve)
    if last is None or not last.draws:
        return []
    notes = []
    where = f"among its shots at {last.shots}"
    kinds = (("num_copies", "their very input"), ("num_near_copies", "a near-duplicate of their input"))
    for key, what in kinds:
        counts = [getattr(draw, key) for draw in last.draws]
        if any(counts):
            notes.append(f"{curve.task}: {_range(counts)} of {curve.num_queries} queries have {what} {where}")
    absent = [draw.num_missing_labels for draw in last.draws if draw.num_missing_labels is not None]
    if any(absent):
        shares = [round(100 * draw.top_label_share) for draw in last.draws if draw.top_label_share is not None]
        notes.append(
            f"{curve.task}: {_range(absent)} labels have no example {where}; the commonest has {_range(shares)} %"
        )
    return notes


def _range(counts: Sequence[int]) -> str:
    """Return the counts of several draws as one number, or as the lowest and highest."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def difference_table(difference: Difference) -> Group:
    """Return B - A in points [low, high] by task and shots, the means below, and a plain sentence for each mean."""
    shots = [mean.shots for mean in difference.means]
    names = [Text(f"A: {difference.a}"), Text(f"B: {difference.b}")]
    table = Table(title="B - A in points by number of shots, 95 % interval, paired", title_justify="left")
    table.add_column("task", no_wrap=True)
    for k in shots:
        table.add_column(str(k), justify="right")
    cells = {(cell.task, cell.shots): cell for cell in difference.cells}
    tasks = list(dict.fromkeys(cell.task for cell in difference.cells))
    for task in tasks:
        table.add_row(task, *(_points(cells.get((task, k))) for k in shots))
    if len(tasks) > 1:
        table.add_section()
        table.add_row("mean of tasks", *(_points(mean) for mean in difference.means), style="bold")
    told = [Text(tell_difference(mean)) for mean in difference.means]
    notes = [f"{difference.num_rows:,} pairs of answers"]
    if len(difference.cells) > 1:
        notes.append(
            f"of {len(difference.cells)} cells, about one in 20 stands out by chance alone; the mean is what counts"
        )
    notes += [f"{count:,} rows did not join: {reason}" for reason, count in sorted(difference.unjoined.items())]
    return Group(*names, table, *told, *(Text(note, style="dim") for note in notes))


def _points(item: CellDifference | MeanDifference | None) -> Text:
    if item is None:
        return Text("-")
    points = 100 * item.difference
    if item.low is None or item.high is None:
        return Text(f"{points:+.1f}")
    style = "green" if item.low > 0 else "red" if item.high < 0 else ""
    return Text(f"{points:+.1f} [{100 * item.low:+.1f}, {100 * item.high:+.1f}]", style=style)


def curve_plot(evaluation: Evaluation, *, width: int = 76, height: int = 16, colour: bool = True) -> Text:
    """Return the mean score over tasks against shots (log axis), at each k where every task was scored."""
    shots = [k for k in show_shots(evaluation.curves) if _mean_score(evaluation, k) is not None]
    if not shots:
        return Text("no curve: at no number of shots was every task scored", style="dim")
    means = [_mean_score(evaluation, k) for k in shots]
    plotext.clf()
    plotext.theme("pro" if colour else "clear")
    plotext.plotsize(width, height)
    places = [math.log2(k + 1) for k in shots]
    plotext.plot(places, means, marker="braille")
    plotext.scatter(places, means, marker="*")
    plotext.xticks(places, [str(k) for k in shots])
    plotext.ylim(0, 100)
    names = [curve.task for curve in evaluation.curves]
    plotext.title(f"score in %, {names[0] if len(names) == 1 else f'mean of {len(names)} tasks'}, against shots")
    plotext.xlabel("shots (log scale)")
    return Text.from_ansi(plotext.build())


def _mean_score(evaluation: Evaluation, shots: int) -> float | None:
    """Return the mean over tasks at one k, None unless every task was scored there: else the tasks would differ."""
    scores = [cell.score for curve in evaluation.curves for cell in curve.cells if cell.shots == shots]
    known = [score for score in scores if score is not None]
    return 100 * sum(known) / len(known) if known and len(known) == len(evaluation.curves) else None


def held_out_table(rows: Sequence[HeldOutRow]) -> Group:
    """Return nats per answer by task: before, knowing only the answers, after, and paired differences."""
    table = Table(title="Held-out loss per answer (nats, test rows, all shots up to the budget)", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("family")
    for name in ("answers", "before", "answers only", "after", "after - before", "after - answers only"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.task,
            row.family,
            f"{row.num_answers:,}",
            f"{row.before:.2f}",
            f"{row.answers_only:.2f}",
            f"{row.after:.2f}",
            _difference(row.after_minus_before),
            _difference(row.after_minus_answers_only),
        )
    counts = [row.num_episodes for row in rows]
    table.add_section()
    table.add_row(
        "mean of tasks",
        "",
        f"{sum(row.num_answers for row in rows):,}",
        *(f"{sum(getattr(row, key) for row in rows) / len(rows):.2f}" for key in ("before", "answers_only", "after")),
        _difference(mean_of_tasks([row.after_minus_before for row in rows], num_episodes=counts)),
        _difference(mean_of_tasks([row.after_minus_answers_only for row in rows], num_episodes=counts)),
        style="bold",
    )
    note = f"differences paired over {max(counts)} episodes a task, 95 % t interval over episodes; negative is better"
    return Group(table, Text(note, style="dim"))


def _difference(interval: Interval) -> Text:
    if math.isnan(interval.low):
        return Text(f"{interval.mean:+.2f}")
    style = "green" if interval.high < 0 else "red" if interval.low > 0 else ""
    return Text(f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]", style=style)


def plan_table(prepared: Prepared) -> Group:
    """Return what a run will train on: examples, tokens and drops by task, and the packs' fill."""
    config = prepared.config
    plan = count_plan(prepared.packs, pack_tokens=config.pack_tokens)
    table = Table(title="Plan", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("family")
    for name in ("train", "validation", "test", "tokens in the run", "dropped"):
        table.add_column(name, justify="right")
    for name, task in prepared.tasks.items():
        drops = count_dropped(task, config)
        table.add_row(
            name,
            task.task.family,
            *(f"{len(task.splits[split]):,}" for split in ("train", "validation", "test")),
            f"{plan['tokens_by_task'].get(name, 0):,}",
            ", ".join(f"{count:,} {reason}" for reason, count in drops.items()) or "-",
        )
    line = (
        f"{plan['episodes']:,} episodes, {plan['answers']:,} answers and {plan['tokens']:,} tokens in"
        f" {plan['packs']:,} packs of {config.pack_tokens:,} ({plan['fill']:.1%} full),"
        f" {config.train.num_steps:,} steps"
    )
    return Group(table, Text(line))


def audit_table(audits: Sequence[TaskAudit]) -> Group:
    """Return one line a task: counts, tokens, how many examples fit, and the verdict."""
    budgets = sorted({budget for audit in audits for budget in audit.fits})
    table = Table(title="Supervision audit", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("family")
    for name in ("read", "train", "validation", "test", "dropped", "commonest answer"):
        table.add_column(name, justify="right")
    if budgets:
        for name in ("input tokens", "answer tokens", *(f"fit {budget:,}" for budget in budgets)):
            table.add_column(name, justify="right")
    table.add_column("verdict")
    for audit in audits:
        top = max(audit.labels.items(), key=lambda item: item[1], default=None)
        lengths = [f"{q.median} ({q.most})" if q else "-" for q in (audit.input_tokens, audit.answer_tokens)]
        table.add_row(
            audit.name,
            audit.family,
            f"{audit.num_rows:,}",
            *(f"{audit.kept.get(split, 0):,}" for split in ("train", "validation", "test")),
            f"{sum(audit.dropped.values()):,}",
            f"{top[1]:.0%} {top[0]}" if top else "-",
            *((*lengths, *(f"{audit.fits.get(budget, 0):,}" for budget in budgets)) if budgets else ()),
            Text(audit.verdict, style="green" if audit.verdict == "good" else "yellow" if audit.usable else "red"),
        )
    return Group(table, *(Text(line, style="dim") for line in _audit_notes(audits)))


def _audit_notes(audits: Sequence[TaskAudit]) -> list[str]:
    notes = []
    for audit in audits:
        lines = [fault.message for fault in audit.faults[1:]] + list(audit.blockers[1:]) + list(audit.warnings)
        lines += [f"dropped {count:,}: {reason}" for reason, count in sorted(audit.dropped.items())]
        if audit.num_near_copies is None:
            lines.append(f"near-duplicates between test and train were not looked for ({audit.num_rows:,} rows)")
        elif audit.num_near_copies:
            lines.append(f"{audit.num_near_copies:,} test inputs have a near-duplicate in train")
        notes += [f"{audit.name}: {line}" for line in lines]
    for note in sorted({audit.split_note for audit in audits if audit.split_note}):
        notes.append(f"split: {note}")
    return notes
