"""What the report's tables hold, apart from how they look: the same rows for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from manyicl.comparison import (
    FLAT_GAIN,
    ArmEntry,
    Change,
    Comparison,
    Cost,
    CurvePoint,
    ExampleQuery,
    Flatness,
    HeadlineScore,
    MeanPoint,
    Scored,
    TaskChange,
    TaskEntry,
)
from manyicl.console import DASH, is_known, tell_seconds
from manyicl.evaluation import FILL, Shots, shots_order, sort_shots, tell_shot_count
from manyicl.planning import tell_overlap
from manyicl.report.numbers import (
    count_noun,
    join_words,
    tell_bits,
    tell_bytes,
    tell_count,
    tell_interval,
    tell_percent,
    tell_points,
    tell_power,
    tell_shots_range,
    tell_times,
)

ASKED = {
    "chosen": "chosen shots",
    "zero": "0 shots",
    "most": "most shots",
    "fill": "as many shots as fit",
    "each": "the same shots",
}
FORGETTING_NOTE = (
    "Forgetting: bits per byte that text costs more than before training; points above (+) or below (\N{MINUS SIGN})"
    " the base on untrained tasks that it could do."
)
COST_COLUMNS = (
    ("answers", "Answers", tell_count),
    ("epochs", "Times a row is a target", tell_times),
    ("target_share", "Rows ever a target, %", tell_percent),
    ("tokens", "Tokens", tell_count),
    ("head_share", "Tokens on instructions, %", tell_percent),
    ("flops", "FLOPs", tell_power),
    ("wall_s", "Wall time", tell_seconds),
    ("peak_bytes", "Peak memory", tell_bytes),
    ("steps", "Steps", tell_count),
    ("packs", "Packs", tell_count),
    ("episodes", "Episodes", tell_count),
    ("targets", "Targets", tell_count),
)


@dataclass(frozen=True, slots=True)
class TableCell:
    """A number as it is shown. sort: the number itself. notes: short lines below it."""

    text: str
    sort: float | None = None
    interval: str = ""
    notes: tuple[str, ...] = ()
    best: bool = False


EMPTY = TableCell(DASH)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the first table."""

    group: str
    title: str


def score_cell(scored: Scored | None, *, notes: Sequence[str] = (), best: bool = False, few: bool = False) -> TableCell:
    """Return a score in %, with its interval, and each seed's value where there are few."""
    if scored is None or not is_known(scored.score):
        return EMPTY
    lines = list(notes)
    if few and len(scored.seeds) > 1:
        lines.append(" · ".join(tell_percent(value) for value in scored.seeds))
    interval = tell_interval(scored.low, scored.high)
    return TableCell(tell_percent(scored.score), scored.score, interval, tuple(lines), best)


def change_cell(change: Change | None, *, unit: str, few: bool) -> TableCell:
    """Return a signed difference in points or in bits per byte."""
    if change is None or not is_known(change.difference):
        return EMPTY

    def tell(value: float | None) -> str:
        return tell_points(value) if unit == "points" else tell_bits(value, signed=True)

    lines = (" · ".join(tell(value) for value in change.seeds),) if few and len(change.seeds) > 1 else ()
    interval = tell_interval(change.low, change.high, unit=unit)
    return TableCell(tell(change.difference), change.difference, interval, lines)


def headline_table(comparison: Comparison) -> tuple[list[Column], list[tuple[ArmEntry, list[TableCell]]]]:
    """Return the first table: columns, and one row an arm. Columns that no arm has are left out."""
    few = comparison.few_seeds
    asked = [
        (role, kind)
        for role in comparison.roles
        for kind in ASKED
        if any((cell.role, cell.asked) == (role, kind) for cell in comparison.headline)
    ]
    lost = {change.arm: change for change in fewest_shots_changes(comparison)}
    # One text leaves room for the tasks beside it; the section on forgetting has them all.
    files = list(dict.fromkeys(change.file for change in comparison.forgetting.text))[: 1 if lost else 2]
    same = {pair: _same_shots(comparison, *pair) for pair in asked}
    columns = [
        Column(f"{role.capitalize()} tasks, %", ASKED[kind] + (f" ({told})" if told and kind != "zero" else ""))
        for (role, kind), told in same.items()
    ]
    columns += [Column("Forgetting, bits per byte", file) for file in files]
    if lost:
        columns.append(Column("Forgetting, points", _tell_fewest(next(iter(lost.values())))))
    texts = {(change.arm, change.file): change for change in comparison.forgetting.text}
    rows = []
    for arm in comparison.arms:
        cells = []
        for role, kind in asked:
            cell = comparison.headline_score(arm.arm, role, kind)
            notes = [] if cell is None else _headline_notes(comparison, cell, is_named=bool(same[role, kind]))
            cells.append(score_cell(cell, notes=notes, best=cell is not None and cell.best, few=few))
        cells += [change_cell(texts.get((arm.arm, file)), unit="bits", few=few) for file in files]
        cells += [_lost_cell(lost.get(arm.arm), few=few)] if lost else []
        rows.append((arm, cells))
    return columns, rows


def _headline_notes(comparison: Comparison, cell: HeadlineScore, *, is_named: bool) -> list[str]:
    """Return with how many shots a number of the first table was asked, unless its column says so, and on how many
    tasks, if some of the role have no such number."""
    told = _tell_asked(cell)
    notes = [f"k = {told}"] if told and not is_named else []
    if cell.tasks is not None and cell.tasks < comparison.most_tasks(cell.role):
        notes.append(count_noun(cell.tasks, "task"))
    return notes


def _tell_asked(cell: HeadlineScore) -> str:
    """Return the shots of a number of the first table: "16", or "1 to 16" if tasks differ; "" if they are not known."""
    return tell_shots_range(cell.shots_by_task.values() if cell.shots is None else [cell.shots])


def fewest_shots_changes(comparison: Comparison) -> list[TaskChange]:
    """Return what each arm lost on the tasks that the base could do, at the fewest shots that were asked.

    Arms in the order of the tables; those without a number are left out.
    """
    known = [change for change in comparison.forgetting.tasks if change.kind == "forgetting"]
    known = [change for change in known if is_known(change.difference) and change.arm in comparison.place]
    if any(change.asked for change in known):
        found = [change for change in known if change.asked == "fewest"]
    else:  # a file of schema 1, where all tasks had the same number of shots
        shots = [change.shots for change in known if change.shots is not None]
        found = [change for change in known if change.shots == min(shots, key=shots_order)]
    return sorted(found, key=lambda change: comparison.place[change.arm])


def _tell_fewest(change: TaskChange) -> str:
    return "fewest shots" if change.shots is None else tell_shot_count(change.shots)


def _lost_cell(change: TaskChange | None, *, few: bool) -> TableCell:
    cell = change_cell(change, unit="points", few=few)
    if change is None or cell is EMPTY:
        return cell
    return TableCell(cell.text, cell.sort, cell.interval, (count_noun(len(change.tasks), "task"), *cell.notes))


def _same_shots(comparison: Comparison, role: str, asked: str) -> str:
    """Return the shots that all arms of a column share, in words; "" if they differ or are not known."""
    cells = [cell for cell in comparison.headline if (cell.role, cell.asked) == (role, asked)]
    shared = all((cell.shots, cell.shots_by_task) == (cells[0].shots, cells[0].shots_by_task) for cell in cells)
    return _tell_asked(cells[0]) if shared else ""


def flat_tag(flat: Flatness) -> str:
    """Return what is said of a curve that does not rise for sure: a gain that is small, or one that may be chance."""
    if not flat.flat or flat.difference is None:
        return ""
    return "flat" if abs(flat.difference) < FLAT_GAIN else "may be chance"


def partial_arms(comparison: Comparison) -> list[str]:
    """Return the arms that no column of the first table has a score of, with the reason."""
    told = []
    for arm in comparison.arms:
        if any(cell.arm == arm.arm and is_known(cell.score) for cell in comparison.headline):
            continue
        counts = {cell.tasks for cell in comparison.means if cell.arm == arm.arm and cell.family is None}
        reason = f"asked on {count_noun(max(counts), 'task')} only" if counts else "not asked"
        told.append(f"{arm.title} ({reason})")
    return told


def mean_table(comparison: Comparison, role: str) -> tuple[list[Shots], list[tuple[ArmEntry, list[TableCell]]]]:
    """Return the mean curve of every arm as a table: shots, and one row an arm.

    A mean over fewer tasks than the role has says over how many: it is no neighbour to the others.
    """
    shots = sort_shots(cell.shots for cell in comparison.means if cell.role == role and cell.family is None)
    most = comparison.most_tasks(role)
    rows = []
    for arm in comparison.arms:
        cells = {cell.shots: cell for cell in comparison.mean_points(arm.arm, role)}
        if cells:
            notes = {k: [count_noun(cell.tasks, "task")] if cell.tasks < most else [] for k, cell in cells.items()}
            rows.append((arm, [_mean_cell(cells.get(k), notes=notes.get(k, ())) for k in shots]))
    return shots, rows


def tell_shorter_means(comparison: Comparison, role: str, family: str | None = None) -> str:
    """Return at which numbers of shots not every task was asked, and how many were; "" if all were.

    A curve of means keeps one set of tasks, so these numbers are no points of it.
    """
    most = comparison.most_tasks(role, family)
    counts: dict[Shots, int] = {}
    for arm in comparison.place:
        cells = comparison.mean_points(arm, role, family)
        if any(cell.tasks == most for cell in cells):  # not an arm that is asked on a part of the tasks anyway
            counts |= {cell.shots: max(cell.tasks, counts.get(cell.shots, 0)) for cell in cells}
    told = [f"{tell_shot_count(k)} ({counts[k]} of {most} tasks)" for k in sort_shots(counts) if counts[k] < most]
    return f"not drawn, since not every task allows so many: {join_words(told)}" if told else ""


def tell_fill(comparison: Comparison, tasks: Iterable[str]) -> str:
    """Return how many shots `fill` is on these tasks, the mean over draws: "41", "8 to 96"; "" if it is not known."""
    names = set(tasks)
    cells = [cell for cell in comparison.curves if cell.shots == FILL and cell.task in names]
    counts = {round(cell.mean_shots) for cell in cells if cell.mean_shots is not None}
    return tell_shots_range(counts)


def shot_head(comparison: Comparison, shots: Shots, tasks: Iterable[str]) -> str:
    """Return a column's head: "16 shots", "as many shots as fit (8 to 96)"."""
    filled = tell_fill(comparison, tasks) if shots == FILL else ""
    return tell_shot_count(shots) + (f" ({filled})" if filled else "")


def _mean_cell(cell: MeanPoint | None, *, notes: Sequence[str]) -> TableCell:
    shown = score_cell(cell, notes=notes)
    return _starred(shown) if cell is not None and cell.extrapolated and shown is not EMPTY else shown


def _starred(cell: TableCell) -> TableCell:
    return TableCell(f"{cell.text}*", cell.sort, cell.interval, cell.notes, cell.best)


def chosen_shots(comparison: Comparison, task: str) -> dict[str, Shots | None]:
    """Arm -> the number of shots it is asked with on a task."""
    return {entry.arm: entry.by_task.get(task, entry.shots) for entry in comparison.chosen}


def chosen_words(comparison: Comparison) -> dict[str, str]:
    """Arm -> the numbers of shots that it is asked with: "16", "1 to fill"; absent if none is known."""
    found: dict[str, str] = {}
    for entry in comparison.chosen:
        counts = set(entry.by_task.values())
        told = tell_shots_range(counts or ([] if entry.shots is None else [entry.shots]))
        found |= {entry.arm: told} if told else {}
    return found


def curve_cell(comparison: Comparison, arm: str, task: str, shots: Shots | None) -> CurvePoint | None:
    """Return one arm's cell on one task."""
    return next((cell for cell in comparison.curve_points.get((arm, task), []) if cell.shots == shots), None)


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task: its row in the table, and its whole curves.

    anchor: its place on the page. others: the curves by the metrics beside the task's own, one row an arm and metric.
    """

    task: TaskEntry
    anchor: str
    majority: float | None
    chance: float | None
    scores: list[TableCell]
    shots: list[Shots]
    curves: list[tuple[ArmEntry, list[TableCell]]]
    others: list[tuple[ArmEntry, str, list[TableCell]]]
    notes: list[str]


def task_rows(comparison: Comparison) -> list[TaskRow]:
    """Return every task with its scores, each arm asked with its chosen shots, and its curves."""
    rows = []
    for number, task in enumerate(comparison.tasks):
        cells = {arm.arm: comparison.curve_points.get((arm.arm, task.task), []) for arm in comparison.arms}
        every = [cell for found in cells.values() for cell in found]
        shots = sort_shots(cell.shots for cell in every)
        curves = [
            (arm, [_curve_cell(curve_cell(comparison, arm.arm, task.task, k)) for k in shots])
            for arm in comparison.arms
            if cells[arm.arm]
        ]
        rows.append(
            TaskRow(
                task,
                f"task-{number}",
                next((cell.majority_score for cell in every if is_known(cell.majority_score)), None),
                next((cell.chance_score for cell in every if is_known(cell.chance_score)), None),
                [_chosen_cell(comparison, arm.arm, task.task) for arm in comparison.arms],
                shots,
                curves,
                _other_curves(comparison, task.task, shots),
                task_notes(task, every),
            )
        )
    return rows


def _other_curves(
    comparison: Comparison, task: str, shots: Sequence[Shots]
) -> list[tuple[ArmEntry, str, list[TableCell]]]:
    """Return every arm's curves of a task by the metrics beside its own, in % and without intervals."""
    rows = []
    for arm in comparison.arms:
        cells = {cell.shots: cell.other_scores for cell in comparison.curve_points.get((arm.arm, task), [])}
        for metric in dict.fromkeys(metric for scores in cells.values() for metric in scores):
            known = [cells.get(k, {}).get(metric) for k in shots]
            rows.append((arm, metric, [EMPTY if x is None else TableCell(tell_percent(x), x) for x in known]))
    return rows


def _chosen_cell(comparison: Comparison, arm: str, task: str) -> TableCell:
    """Return an arm's score on a task at its chosen shots; and how many these are, if the arm's tasks differ."""
    entry = next((entry for entry in comparison.chosen if entry.arm == arm), None)
    shots = chosen_shots(comparison, task).get(arm)
    differs = entry is not None and len(set(entry.by_task.values())) > 1
    return score_cell(curve_cell(comparison, arm, task, shots), notes=[f"k = {shots}"] if differs else [])


def _curve_cell(cell: CurvePoint | None) -> TableCell:
    if cell is None:
        return EMPTY
    notes = [f"worst draw {tell_percent(cell.worst_draw)}"] if is_known(cell.worst_draw) else []
    shown = score_cell(cell, notes=notes)
    return _starred(shown) if cell.extrapolated and shown is not EMPTY else shown


def task_notes(task: TaskEntry, cells: Sequence[CurvePoint]) -> list[str]:
    """Return what was dropped, left out, cut, or found among the shots of a task."""
    notes = [f"{count:,} rows dropped: {reason}" for reason, count in task.dropped.items() if count]
    if task.overlap is not None and task.overlap.count:
        notes.append(tell_overlap(task.overlap))
    unfit = max((cell.num_unfit or 0 for cell in cells if is_known(cell.score)), default=0)
    if unfit:
        notes.append(f"{count_noun(unfit, 'test row')} do not fit behind its most shots: left out at every k")
    scored = {cell.shots for cell in cells if is_known(cell.score)}
    unscored = sort_shots({cell.shots for cell in cells} - scored)
    if unscored:
        counts = join_words([str(k) for k in unscored])
        notes.append(f"no arm has a score at {counts} shots: more than fit, or than there are, or not yet asked")
    cut = sum(cell.num_cut for cell in cells)
    if cut:
        notes.append(f"{count_noun(cut, 'answer')} reached the token limit before their end")
    copies = max((cell.num_copies or 0 for cell in cells), default=0)
    near = max((cell.num_near_copies or 0 for cell in cells), default=0)
    if copies or near:
        notes.append(
            f"among the shots: {count_noun(copies, 'copy')} and {count_noun(near, 'near copy')} of its queries"
        )
    return notes


def overlap_note(comparison: Comparison) -> str:
    """Return how many test rows of tasks that are not trained on are rows of trained ones; '' if not looked for."""
    told = []
    for role in ("held-out", "familiar"):
        found = [task.overlap for task in comparison.tasks if task.role == role and task.overlap is not None]
        if found:
            tests = [overlap.test for overlap in found]
            exact, near, of = (sum(getattr(test, key) for test in tests) for key in ("exact", "near", "of"))
            copied = sum(bool(test.count) for test in tests)
            where = f", in {copied} of {count_noun(len(found), 'task')}" if copied else ""
            told.append(
                f"of {of:,} test rows of {role} tasks, {exact:,} are rows of trained tasks too, and"
                f" {near:,} nearly{where}"
            )
    return f"Overlap: {'; '.join(told)}." if told else ""


def cost_cells(cost: Cost) -> list[TableCell]:
    """Return what one arm spent with one seed, in the order of COST_COLUMNS."""
    return [TableCell(tell(getattr(cost, key)), getattr(cost, key)) for key, _, tell in COST_COLUMNS]


def mean_costs(comparison: Comparison) -> list[tuple[ArmEntry, list[TableCell]]]:
    """Return what each arm spent a seed: the mean over the seeds that are known."""
    rows = []
    for arm in comparison.arms:
        costs = [cost for cost in comparison.costs if cost.arm == arm.arm]
        cells = []
        for key, _, tell in COST_COLUMNS:
            known = [value for cost in costs for value in [getattr(cost, key)] if value is not None]
            cells.append(TableCell(tell(mean(known)), mean(known)) if known else EMPTY)
        rows.append((arm, cells))
    return rows


def example_groups(comparison: Comparison) -> list[tuple[str, list[ExampleQuery]]]:
    """Return the examples by task, in the order of the tasks."""
    groups: dict[str, list[ExampleQuery]] = {}
    for example in comparison.examples:
        groups.setdefault(example.task, []).append(example)
    return list(groups.items())
