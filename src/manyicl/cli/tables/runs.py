"""Tables of runs for the terminal: what one would do, what it will train on, what it ended with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from manyicl.console import Table, tell_estimate, tell_signed
from manyicl.errors import list_some
from manyicl.intervals import Interval
from manyicl.planning import note_warmup
from manyicl.training import HeldOutRow, Prepared, count_dropped, count_plan, mean_of_tasks


def held_out_table(rows: Sequence[HeldOutRow]) -> Group:
    """Return nats per answer by task: before, knowing only the answers, after, and paired differences."""
    table = Table(
        title="Held-out loss per answer (nats, test rows, all shots up to the budget)",
        texts=("task", "family"),
        numbers=("answers", "before", "answers only", "after", "after - before", "after - answers only"),
    )
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
    note = f"differences paired over {max(counts)} episodes per task, 95 % t interval over episodes"
    if max(counts) == 1:
        note = "one episode per task: no interval"
    frequencies = (
        "answers only: what guessing by the frequencies of the train answers would lose, without reading inputs"
    )
    return Group(table, Text(f"{note}; negative is better", style="dim"), Text(frequencies, style="dim"))


def _difference(interval: Interval) -> Text:
    if math.isnan(interval.low):
        return Text(tell_signed(interval.mean, digits=2))
    style = "green" if interval.high < 0 else "red" if interval.low > 0 else ""
    return Text(tell_estimate(interval.mean, interval.low, interval.high, digits=2), style=style)


def plan_table(prepared: Prepared) -> Group:
    """Return what a run will train on: examples, tokens and drops by task, the packs' fill, and a long warm-up."""
    config = prepared.config
    plan = count_plan(prepared.packs, pack_tokens=config.pack_tokens)
    numbers = ("train", "validation", "test", "tokens in the run")
    table = Table(title="Plan", texts=("task", "family"), numbers=numbers, sentences="dropped")
    for name, task in prepared.tasks.items():
        drops = count_dropped(task, config)
        table.add_row(
            name,
            task.task.family,
            *(f"{len(task.splits[split]):,}" for split in ("train", "validation", "test")),
            f"{plan['tokens_by_task'].get(name, 0):,}",
            ", ".join(f"{count:,} {reason}" for reason, count in drops.items()) or "-",
        )
    renamed = f" ({plan['renamed_episodes']:,} renamed)" if "renamed_episodes" in plan else ""
    line = (
        f"{plan['episodes']:,} episodes{renamed}, {plan['answers']:,} answers and {plan['tokens']:,} tokens in"
        f" {plan['packs']:,} packs of {config.pack_tokens:,} ({plan['fill']:.1%} full),"
        f" {config.train.num_steps:,} steps"
    )
    notes = [note_warmup(config.train)]
    if unreached := [name for name in prepared.tasks if name not in plan["tokens_by_task"]]:
        notes.append(
            f"not trained on, since the steps end before an episode of it: {list_some(unreached)}; raise"
            " train.num_steps or train.packs_per_step, or leave it out of tasks.names"
        )
    return Group(table, Text(line), *(Text(note) for note in notes if note))
