"""The content of the report's tables, independent of their looks: the same rows for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
    tell_bytes,
    tell_change,
    tell_count,
    tell_interval,
    tell_percent,
    tell_power,
    tell_shots_range,
    tell_times,
)

ASKED = {
    "chosen": "chosen shots",
    "zero": "0 shots",
    "most": "most shots",
    "fill": "as many shots as fit",
}
FORGETTING_NOTE = (
    "Forgetting: the bits per byte by which text costs more than before training, and the points above (+) or below"
    " (\N{MINUS SIGN}) the base on untrained tasks that it could do."
)
EXTRAPOLATION = (
    "more shots, in some draw, than came before any answer of the task in training (of any trained task, if the task is"
    " new)"
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
    """A number of a table as it is shown."""

    text: str
    """The number, rounded, or a dash."""
    sort: float | None = None
    """The number itself, to sort a column by; None if there is none."""
    interval: str = ""
    notes: tuple[str, ...] = ()
    """Short lines below the number."""
    best: bool = False
    """Whether it is marked as the best of its column."""


EMPTY = TableCell(DASH)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the first table."""

    group: str
    """The heading that it shares with its neighbours."""
    title: str


def score_cell(scored: Scored | None, *, notes: Sequence[str] = (), best: bool = False, few: bool = False) -> TableCell:
    """Return a score in % with its interval.

    few: show each seed's value too, as there are few seeds.
    """
    if scored is None or not is_known(scored.score):
        return EMPTY
    lines = list(notes)
    if few and len(scored.seeds) > 1:
        lines.append(" · ".join(tell_percent(value) for value in scored.seeds))
    interval = tell_interval(scored.low, scored.high)
    return TableCell(tell_percent(scored.score), scored.score, interval, tuple(lines), best)


def change_cell(change: Change | None, *, unit: str, few: bool) -> TableCell:
    """Return a signed difference with its interval.

    unit: "points" or "bits" (per byte). few: show each seed's value too, as there are few seeds.
    """
    if change is None or not is_known(change.difference):
        return EMPTY
    seeds = [tell_change(value, unit=unit) for value in change.seeds]
    lines = (" · ".join(seeds),) if few and len(seeds) > 1 else ()
    interval = tell_interval(change.low, change.high, unit=unit)
    told = tell_change(change.difference, unit=unit, low=change.low, high=change.high)
    return TableCell(told, change.difference, interval, lines)


def headline_table(comparison: Comparison) -> tuple[list[Column], list[tuple[ArmEntry, list[TableCell]]]]:
    """Return the first table: its columns, and one row per arm. Columns without any number are left out."""
    few = comparison.few_seeds
    asked = [
        (role, kind)
        for role in comparison.roles
        for kind in ASKED
        if any((score.role, score.asked) == (role, kind) for score in comparison.headline)
    ]
    lost = {change.arm: change for change in fewest_shots_changes(comparison)}
    # With a column for tasks there is room for one text; the section on forgetting has them all.
    files = list(dict.fromkeys(change.file for change in comparison.forgetting.text))[: 1 if lost else 2]
    same = {pair: _same_shots(comparison, *pair) for pair in asked}
    columns = [
        Column(f"{role.capitalize()} tasks, %", ASKED[kind] + (f" ({shots})" if shots and kind != "zero" else ""))
        for (role, kind), shots in same.items()
    ]
    columns += [Column("Forgetting, bits per byte", file) for file in files]
    if lost:
        shots = next(iter(lost.values())).shots
        columns.append(Column("Forgetting, points", "fewest shots" if shots is None else tell_shot_count(shots)))
    texts = {(change.arm, change.file): change for change in comparison.forgetting.text}
    rows = []
    for arm in comparison.arms:
        cells = []
        for role, kind in asked:
            score = comparison.headline_score(arm.arm, role, kind)
            notes = [] if score is None else _headline_notes(comparison, score, is_named=bool(same[role, kind]))
            cells.append(score_cell(score, notes=notes, best=score is not None and score.best, few=few))
        cells += [change_cell(texts.get((arm.arm, file)), unit="bits", few=few) for file in files]
        if lost:
            cells.append(_lost_cell(lost.get(arm.arm), few=few))
        rows.append((arm, cells))
    return columns, rows


def _headline_notes(comparison: Comparison, score: HeadlineScore, *, is_named: bool) -> list[str]:
    """Return the lines below a number of the first table.

    They are its number of shots, unless the head of the column has it (`is_named`), and its number of tasks, if that is
    less than the role has.
    """
    shots = _tell_shots_of(score)
    notes = [f"k = {shots}"] if shots and not is_named else []
    if score.tasks is not None and score.tasks < comparison.most_tasks(score.role):
        notes.append(count_noun(score.tasks, "task"))
    return notes


def _tell_shots_of(score: HeadlineScore) -> str:
    """Return the shots of a number of the first table: "16", or "1 to 16" if tasks differ; "" if they are not known."""
    return tell_shots_range(score.shots_by_task.values() if score.shots is None else [score.shots])


def fewest_shots_changes(comparison: Comparison) -> list[TaskChange]:
    """Return what each arm lost on the tasks that the base could do, at the fewest shots.

    Arms are in the order of the tables; those without a number are left out.
    """
    known = [change for change in comparison.forgetting.tasks if change.kind == "forgetting"]
    known = [change for change in known if is_known(change.difference) and change.arm in comparison.place]
    if any(change.asked for change in known):
        found = [change for change in known if change.asked == "fewest"]
    else:  # a file of schema 1, where all tasks had the same number of shots
        shots = [change.shots for change in known if change.shots is not None]
        found = [change for change in known if change.shots == min(shots, key=shots_order)]
    return sorted(found, key=lambda change: comparison.place[change.arm])


def _lost_cell(change: TaskChange | None, *, few: bool) -> TableCell:
    cell = change_cell(change, unit="points", few=few)
    if change is None or cell is EMPTY:
        return cell
    return TableCell(cell.text, cell.sort, cell.interval, (count_noun(len(change.tasks), "task"), *cell.notes))


def _same_shots(comparison: Comparison, role: str, asked: str) -> str:
    """Return the shots that all arms of a column share, in words; "" if they differ or are not known."""
    first, *others = [score for score in comparison.headline if (score.role, score.asked) == (role, asked)]
    is_shared = all((score.shots, score.shots_by_task) == (first.shots, first.shots_by_task) for score in others)
    return _tell_shots_of(first) if is_shared else ""


def flat_tag(flat: Flatness) -> str:
    """Return the tag of a curve that shows no effect of more shots: "flat", or "may be chance"; "" for others."""
    if not flat.flat or flat.difference is None:
        return ""
    return "flat" if abs(flat.difference) < FLAT_GAIN else "may be chance"


def partial_arms(comparison: Comparison) -> list[str]:
    """Return the arms without a score in the first table, each with the reason."""
    arms = []
    for arm in comparison.arms:
        if any(score.arm == arm.arm and is_known(score.score) for score in comparison.headline):
            continue
        counts = {point.tasks for point in comparison.means if point.arm == arm.arm and point.family is None}
        reason = f"asked on {count_noun(max(counts), 'task')} only" if counts else "not asked"
        arms.append(f"{arm.title} ({reason})")
    return arms


def mean_table(comparison: Comparison, role: str) -> tuple[list[Shots], list[tuple[ArmEntry, list[TableCell]]]]:
    """Return the mean curve of every arm as a table: the numbers of shots, and one row per arm.

    A mean over fewer tasks than the role has says how many, as it is not comparable with the others.
    """
    shots = sort_shots(point.shots for point in comparison.means if point.role == role and point.family is None)
    most = comparison.most_tasks(role)
    rows = []
    for arm in comparison.arms:
        points = {point.shots: point for point in comparison.mean_points(arm.arm, role)}
        if points:
            notes = {k: [count_noun(point.tasks, "task")] if point.tasks < most else [] for k, point in points.items()}
            rows.append((arm, [_mean_cell(comparison, points.get(k), notes=notes.get(k, ())) for k in shots]))
    return shots, rows


def tell_shorter_means(comparison: Comparison, role: str, family: str | None = None) -> str:
    """Return the numbers of shots that not every task was asked with, and how many were; "" if there are none.

    All points of a mean curve are over the same tasks, so these numbers of shots are missing from it.
    """
    most = comparison.most_tasks(role, family)
    counts: dict[Shots, int] = {}
    for arm in comparison.place:
        points = comparison.mean_points(arm, role, family)
        if any(point.tasks == most for point in points):  # an arm that never has all tasks has no mean curve
            counts |= {point.shots: max(point.tasks, counts.get(point.shots, 0)) for point in points}
    short = [f"{tell_shot_count(k)} ({counts[k]} of {most} tasks)" for k in sort_shots(counts) if counts[k] < most]
    return f"not drawn, since not every task allows so many: {join_words(short)}" if short else ""


def tell_fill(comparison: Comparison, tasks: Iterable[str]) -> str:
    """Return how many shots `fill` means on these tasks, averaged over draws: "41", "8 to 96"; "" if not known."""
    names = set(tasks)
    points = [point for point in comparison.curves if point.shots == FILL and point.task in names]
    return tell_shots_range({round(point.mean_shots) for point in points if point.mean_shots is not None})


def shot_head(comparison: Comparison, shots: Shots, tasks: Iterable[str]) -> str:
    """Return a column's head: "16 shots", "as many shots as fit (8 to 96)"."""
    filled = tell_fill(comparison, tasks) if shots == FILL else ""
    return tell_shot_count(shots) + (f" ({filled})" if filled else "")


def _mean_cell(comparison: Comparison, point: MeanPoint | None, *, notes: Sequence[str]) -> TableCell:
    cell = score_cell(point, notes=notes)
    if point is None or cell is EMPTY:
        return cell
    count = comparison.num_extrapolated(point)
    partly = (f"* on {count} of {count_noun(point.tasks, 'task')}",) if 0 < count < point.tasks else ()
    return replace(_mark(cell, comparison.is_extrapolated(point)), notes=(*cell.notes, *partly))


def _mark(cell: TableCell, extrapolated: bool) -> TableCell:
    return replace(cell, text=f"{cell.text}*") if extrapolated and cell is not EMPTY else cell


def chosen_words(comparison: Comparison) -> dict[str, str]:
    """Return arm -> its chosen numbers of shots: "16", "1 to fill"; absent if none is known."""
    found: dict[str, str] = {}
    for entry in comparison.chosen:
        counts = set(entry.by_task.values())
        shots = tell_shots_range(counts or ([] if entry.shots is None else [entry.shots]))
        if shots:
            found[entry.arm] = shots
    return found


def curve_point(comparison: Comparison, arm: str, task: str, shots: Shots | None) -> CurvePoint | None:
    """Return one arm's point on one task; None if there is none."""
    return next((point for point in comparison.curve_points.get((arm, task), []) if point.shots == shots), None)


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task: its row in the table, and its whole curves."""

    task: TaskEntry
    anchor: str
    """The id of its details on the page."""
    majority: float | None
    """The score of always giving the most common answer."""
    chance: float | None
    """The score of picking an option at random."""
    scores: list[TableCell]
    """One per arm, each with its chosen shots."""
    shots: list[Shots]
    """The columns of its curves."""
    curves: list[tuple[ArmEntry, list[TableCell]]]
    others: list[tuple[ArmEntry, str, list[TableCell]]]
    """Curves by the metrics beside the task's main one, a row per arm and metric."""
    notes: list[str]


def task_rows(comparison: Comparison) -> list[TaskRow]:
    """Return every task with its scores, each arm with its chosen shots, and its curves."""
    rows = []
    for number, task in enumerate(comparison.tasks):
        points = {arm.arm: comparison.curve_points.get((arm.arm, task.task), []) for arm in comparison.arms}
        every = [point for curve in points.values() for point in curve]
        shots = sort_shots(point.shots for point in every)
        curves = [
            (arm, [_curve_cell(curve_point(comparison, arm.arm, task.task, k)) for k in shots])
            for arm in comparison.arms
            if points[arm.arm]
        ]
        rows.append(
            TaskRow(
                task,
                f"task-{number}",
                next((point.majority_score for point in every if is_known(point.majority_score)), None),
                next((point.chance_score for point in every if is_known(point.chance_score)), None),
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
    """Return every arm's curves on a task by the metrics beside the main one, in % and without intervals."""
    rows = []
    for arm in comparison.arms:
        by_shots = {point.shots: point.other_scores for point in comparison.curve_points.get((arm.arm, task), [])}
        for metric in dict.fromkeys(metric for scores in by_shots.values() for metric in scores):
            known = [by_shots.get(k, {}).get(metric) for k in shots]
            rows.append((arm, metric, [EMPTY if x is None else TableCell(tell_percent(x), x) for x in known]))
    return rows


def _chosen_cell(comparison: Comparison, arm: str, task: str) -> TableCell:
    """Return an arm's score on a task at its chosen shots, with their number if the arm's tasks differ in it."""
    entry = next((entry for entry in comparison.chosen if entry.arm == arm), None)
    shots = entry.by_task.get(task, entry.shots) if entry else None
    differs = entry is not None and len(set(entry.by_task.values())) > 1
    return score_cell(curve_point(comparison, arm, task, shots), notes=[f"k = {shots}"] if differs else [])


def _curve_cell(point: CurvePoint | None) -> TableCell:
    if point is None:
        return EMPTY
    notes = [f"worst draw {tell_percent(point.worst_draw)}"] if is_known(point.worst_draw) else []
    return _mark(score_cell(point, notes=notes), point.extrapolated)


def task_notes(task: TaskEntry, points: Sequence[CurvePoint]) -> list[str]:
    """Return the rows and answers of a task that were dropped, left out or cut, and copies among its shots.

    points: those of all arms.
    """
    notes = [f"{count_noun(count, 'row')} dropped: {reason}" for reason, count in task.dropped.items() if count]
    if task.overlap is not None and task.overlap.count:
        notes.append(tell_overlap(task.overlap))
    unfit = max((point.num_unfit or 0 for point in points if is_known(point.score)), default=0)
    if unfit:
        fit = "does not fit" if unfit == 1 else "do not fit"
        notes.append(f"{count_noun(unfit, 'test row')} {fit} after its most shots: left out at every k")
    scored = {point.shots for point in points if is_known(point.score)}
    unscored = sort_shots({point.shots for point in points} - scored)
    if unscored:
        counts = join_words([str(k) for k in unscored])
        shots = "shot" if unscored == [1] else "shots"
        notes.append(f"no arm has a score at {counts} {shots}: more than fit or than there are, or not yet evaluated")
    cut = sum(point.num_cut for point in points)
    if cut:
        notes.append(f"{count_noun(cut, 'answer')} {'was' if cut == 1 else 'were'} cut at the limit of tokens")
    copies = max((point.num_copies or 0 for point in points), default=0)
    near = max((point.num_near_copies or 0 for point in points), default=0)
    found = [count_noun(count, noun) for count, noun in ((copies, "copy"), (near, "near copy")) if count]
    if found:
        notes.append(f"among the shots: {join_words(found)} of its queries")
    return notes


def overlap_note(comparison: Comparison) -> str:
    """Return how many test rows of untrained tasks are also rows of trained ones; '' if this was not checked."""
    counts = []
    for role in ("held-out", "familiar"):
        found = [task.overlap for task in comparison.tasks if task.role == role and task.overlap is not None]
        if found:
            tests = [overlap.test for overlap in found]
            exact, near, of = (sum(getattr(test, key) for test in tests) for key in ("exact", "near", "of"))
            copied = sum(bool(test.count) for test in tests)
            told = f"{exact:,} are rows of trained tasks too, and {near:,} nearly"
            where = f", in {copied} of {count_noun(len(found), 'task')}"
            told = f"{told}{where}" if copied else "none is a row of a trained task too, or nearly one"
            counts.append(f"of {of:,} test rows of {role} tasks, {told}")
    return f"Overlap: {'; '.join(counts)}." if counts else ""


def cost_cells(cost: Cost) -> list[TableCell]:
    """Return what one arm spent with one seed, in the order of COST_COLUMNS."""
    return [TableCell(tell(getattr(cost, key)), getattr(cost, key)) for key, _, tell in COST_COLUMNS]


def mean_costs(comparison: Comparison) -> list[tuple[ArmEntry, list[TableCell]]]:
    """Return what each arm spent per seed: the mean over the seeds that are known."""
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
