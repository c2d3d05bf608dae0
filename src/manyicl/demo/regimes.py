"""The demo's tasks: two regimes, one that many-shot fine-tuning is for and one that it is not, and tasks to forget.

In most kinds that they draw from a new task is a table that only its own examples tell (which class, place, section,
verdict or price goes with which word), so that every further shot can tell something and 64 tell more than 16; in
`form`, `linear` and `pick` it is a rule. Left out of both:
- what the seed model answers from one to eight shots (FAMILIAR; nothing is left to learn, so they are asked for
  forgetting instead), and `line`, where fine-tuning reaches all or nothing by the task's form;
- kinds that stay near chance after a demo's minutes on them too (`size`, `containment`, `negation`, `quantity`,
  `yes_no`; docs/log.md), and `two_hop`, which is near it and long;
- `choice` and `tally`, which know too few rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from manyicl.demo.tasks import WorldTask, find_kinds, iter_tasks

# Kinds of the five families, and how many entries the table of one of its tasks must have at least: the largest tables
# that a kind draws, so that 16 shots do not show them all.
RISING: Mapping[str, int] = {
    "topic": 16, "keyword": 16, "group": 18, "form": 3, "implication": 16, "recall": 24, "section": 12, "price": 16,
    "linear": 0, "pick": 0,
}  # fmt: skip
# Kinds that the seed model answers well from few shots, one or two of a family: what it can forget.
FAMILIAR = ("tone", "fact", "lookup", "title", "gist", "story")


@dataclass(frozen=True, slots=True)
class Regime:
    """How many tasks are trained with how many examples each, how many are held out, and of which kinds.

    num_train counts the train split, validation part included; num_test rows are for queries, or for one-pass episodes.
    """

    name: str
    num_tasks: int
    num_train: int
    num_test: int
    num_held_out: int
    kinds: tuple[str, ...]


# Many tasks with few examples each.
HEADLINE = Regime("many_tasks", num_tasks=128, num_train=96, num_test=96, num_held_out=32, kinds=tuple(RISING))
# Few tasks with many examples each, of kinds that are tables and so can be learnt by heart.
CONTRAST = Regime(
    "few_tasks", num_tasks=4, num_train=300, num_test=96, num_held_out=32, kinds=("topic", "keyword", "group", "recall")
)  # fmt: skip


def draw_regime(regime: Regime, *, seed: int) -> tuple[list[WorldTask], list[WorldTask]]:
    """Return the trained and the held-out tasks of a regime, the kinds in turn; all of the open pool, none twice."""
    series = _take_turns([_iter_kind(name, seed=seed) for name in regime.kinds])
    tasks = list(islice(series, regime.num_tasks + regime.num_held_out))
    return tasks[: regime.num_tasks], tasks[regime.num_tasks :]


def draw_familiar(*, count: int, seed: int) -> list[WorldTask]:
    """Return tasks of the open pool that no regime trains and the seed model answers from few shots."""
    return list(islice(_take_turns([_iter_kind(name, seed=seed) for name in FAMILIAR]), count))


def _iter_kind(name: str, *, seed: int) -> Iterator[WorldTask]:
    least = RISING.get(name, 0)
    return (task for task in iter_tasks(find_kinds([name]), seed=seed, pool="open") if _table_size(task) >= least)


def _table_size(task: WorldTask) -> int:
    """Return how many words or forms the task's table gives an answer for; each pair or group of its rule has some."""
    groups = [part for part in task.rule.parameters if isinstance(part, tuple)]
    return sum(len(group) - 1 for group in groups)


def _take_turns(series: Sequence[Iterator[WorldTask]]) -> Iterator[WorldTask]:
    """Yield from the series in turn; one that ends drops out."""
    left = list(series)
    while left:
        for one in tuple(left):
            task = next(one, None)
            if task is None:
                left.remove(one)
            else:
                yield task
