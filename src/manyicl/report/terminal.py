"""A comparison in the terminal: its verdict, a table of arms and a plot, readable in 80 columns and without colour."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from manyicl.comparison import ARMS, Comparison, Grid, tell_missing, tell_progress
from manyicl.console import Table, is_known
from manyicl.evaluation import Shots
from manyicl.intervals import MIN_SEEDS
from manyicl.report.numbers import count_noun
from manyicl.report.plots import draw_curves, mark_of
from manyicl.report.tables import FORGETTING_NOTE, TableCell, headline_table, tell_shorter_means
from manyicl.report.verdict import key_facts, tell_intervals, tell_verdict

_HEADS = {"chosen shots": "chosen k", "0 shots": "0", "most shots": "most"}


def comparison_table(comparison: Comparison) -> Group:
    """Return the verdict, scores in % by arm with 95 % intervals below them, and what is missing; 80 columns wide.

    The best arm of a column is marked by ! and bold. With few seeds, each seed's score is below the interval.
    """
    columns, rows = headline_table(comparison)
    groups = list(dict.fromkeys(column.group for column in columns))
    parts: list[Table | Text] = [Text(tell_verdict(comparison), style="bold"), Text()]
    for group in groups:
        places = [place for place, column in enumerate(columns) if column.group == group]
        table = Table(title=group, show_lines=True)
        table.add_column("arm", overflow="fold", max_width=22)
        for place in places:
            table.add_column(_head(columns[place].title), justify="right", overflow="fold")
        for arm, cells in rows:
            name = Text(arm.title)
            if not arm.matched and "not matched" not in arm.title:
                name.append("\nnot matched", style="dim")
            table.add_row(name, *(_cell(cells[place]) for place in places))
        parts.append(table)
    parts += [Text(f"{about}: {sentence}") for about, sentence in key_facts(comparison)]
    parts += [Text(note, style="dim") for note in _notes(comparison)]
    return Group(*parts)


def grid_table(grid: Grid) -> Table:
    """Return how much of a comparison is done: a row per arm and seed, a column per kind of work."""
    work = grid.work()
    items = [item for item in work if item.rate is None]
    trials = [item for item in work if item.rate is not None]
    done = {item: grid.is_done(item) for item in work}
    diverged = len({item.model for item in trials if grid.has_diverged(item)})
    tried = f"; {sum(done[item] for item in trials)} of {len(trials)} for trials of learning rates" if trials else ""
    tried += f", in which {count_noun(diverged, 'model')} diverged" if diverged else ""
    table = Table(title=f"{sum(done[item] for item in items)} of {len(items)} pieces of work are done{tried}")
    kinds = list(dict.fromkeys(item.kind for item in items))
    for head in ("arm", "seed", *kinds):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for arm, seed in dict.fromkeys((item.arm, item.seed) for item in items):
        row = [
            _tell_done([done[item] for item in items if (item.arm, item.seed, item.kind) == (arm, seed, kind)])
            for kind in kinds
        ]
        table.add_row(ARMS[arm].title, str(seed), *row)
    return table


def _tell_done(done: list[bool]) -> str:
    """Return "2 / 3", for a single item "done" or "-", and "" if an arm has no such work."""
    if len(done) > 1:
        return f"{sum(done)} / {len(done)}"
    return "" if not done else "done" if done[0] else "-"


def _head(title: str) -> str:
    for long, short in _HEADS.items():
        title = title.replace(long, short)
    return title


def _cell(cell: TableCell) -> Text:
    text = Text(f"{cell.text}!" if cell.best else cell.text, style="bold" if cell.best else "")
    for line in (cell.interval, *cell.notes):
        if line:
            text.append(f"\n{line}", style="dim not bold")
    return text


def _notes(comparison: Comparison) -> list[str]:
    notes = [tell_intervals(comparison)]
    if comparison.done_seeds[1] >= MIN_SEEDS:
        notes.append(
            "! better than every other arm of its column: each paired interval, over five or more seeds, excludes zero"
        )
    notes.append(FORGETTING_NOTE)
    if not comparison.finished:
        notes.append(f"not finished: {tell_progress(comparison)}")
        notes += [f"{where}: {what}" for where, what in tell_missing(comparison)]
    return notes


def comparison_plot(comparison: Comparison, *, width: int = 78, height: int = 15, colour: bool = True) -> Group:
    """Return the mean score of every arm against shots (log axis), one plot per role, with a key of the marks below."""
    parts: list[Text] = []
    for role in reversed(comparison.roles):
        plot = _plot_role(comparison, role, size=(width, height), colour=colour)
        if plot is not None:
            parts.append(plot)
            note = tell_shorter_means(comparison, role)
            if note:
                parts.append(Text(f"{role} tasks: {note}", style="dim"))
    if not parts:
        return Group(Text("no curve: at no number of shots does every task have a score", style="dim"))
    key = "   ".join(f"{mark_of(place)} {arm.title}" for place, arm in enumerate(comparison.arms))
    return Group(*parts, Text(key))


def _plot_role(comparison: Comparison, role: str, *, size: tuple[int, int], colour: bool) -> Text | None:
    most = comparison.most_tasks(role)  # means over fewer tasks are not comparable with these
    curves: dict[int, dict[Shots, float]] = {}
    for arm, place in comparison.place.items():
        for point in comparison.mean_points(arm, role):
            if is_known(point.score) and point.tasks == most:
                curves.setdefault(place, {})[point.shots] = 100 * (point.score or 0.0)
    title = f"{role} tasks: mean score in % against shots (log scale)"
    return draw_curves(curves, title, size=size, colour=colour) if curves else None
