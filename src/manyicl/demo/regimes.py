"""The demo's tasks: one regime that many-shot fine-tuning is for, one that it is not for, and tasks to forget.

In most kinds, a task is a table that only its own examples reveal (which class, place, section, verdict or price goes
with which word). So every further shot can help, and 64 help more than 16. In `form`, `linear` and `pick` it is a rule.
Both regimes leave out:
- kinds that the seed model can do with one to eight shots (FAMILIAR): there is nothing left to learn, so they measure
  forgetting instead; and `line`, on which fine-tuning gets all or nothing, depending on the task's form;
- kinds that stay near chance even after a demo's minutes of training (`size`, `containment`, `negation`, `quantity`,
  `yes_no`; docs/log.md), and `two_hop`, which is near chance and long;
- `choice` and `tally`, which have too few rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from manyicl.demo.tasks import WorldTask, find_kinds, iter_tasks

# Kind -> the fewest entries that the table of a task may have: only the largest tables of a kind are used, so that 16
# shots do not show a whole one.
RISING: Mapping[str, int] = {
    "topic": 16, "keyword": 16, "group": 18, "form": 3, "implication": 16, "recall": 24, "section": 12, "price": 16,
    "linear": 0, "pick": 0,
}  # fmt: skip
# Kinds that the seed model does well with few shots, one or two per family: these it can forget.
FAMILIAR = ("tone", "fact", "lookup", "title", "gist", "story")


@dataclass(frozen=True, slots=True)
class Regime:
    """How many tasks of which kinds a demo has, and how many examples each."""

    name: str
    """The name of its folder."""
    num_tasks: int
    """Tasks that are trained."""
    num_train: int
    """Examples per task for training, with its validation part."""
    num_test: int
    """Examples per task for queries."""
    num_held_out: int
    """Tasks that are held out."""
    kinds: tuple[str, ...]
    """The kinds that the tasks are drawn from, in turn."""


# Many tasks with few examples each.
HEADLINE = Regime("many_tasks", num_tasks=128, num_train=96, num_test=96, num_held_out=32, kinds=tuple(RISING))
# Few tasks with many examples each, of kinds whose tables can be learnt by heart.
CONTRAST = Regime(
    "few_tasks", num_tasks=4, num_train=300, num_test=96, num_held_out=32, kinds=("topic", "keyword", "group", "recall")
)  # fmt: skip


def draw_regime(regime: Regime, *, seed: int) -> tuple[list[WorldTask], list[WorldTask]]:
    """Return the trained and the held-out tasks of a regime: the kinds in turn, from the open pool, none twice."""
    series = _take_turns([_iter_kind(name, seed=seed) for name in regime.kinds])
    tasks = list(islice(series, regime.num_tasks + regime.num_held_out))
    return tasks[: regime.num_tasks], tasks[regime.num_tasks :]


def draw_familiar(*, count: int, seed: int) -> list[WorldTask]:
    """Return tasks of the open pool that no regime trains, and that the seed model does with few shots."""
    return list(islice(_take_turns([_iter_kind(name, seed=seed) for name in FAMILIAR]), count))


def _iter_kind(name: str, *, seed: int) -> Iterator[WorldTask]:
    least = RISING.get(name, 0)
    return (task for task in iter_tasks(find_kinds([name]), seed=seed, pool="open") if _table_size(task) >= least)


def _table_size(task: WorldTask) -> int:
    """Return how many words or forms the task's table has an answer for."""
    # Each pair or group of the rule's parameters has one answer and some words for it.
    groups = [part for part in task.rule.parameters if isinstance(part, tuple)]
    return sum(len(group) - 1 for group in groups)


def _take_turns(series: Sequence[Iterator[WorldTask]]) -> Iterator[WorldTask]:
    """Yield from the series in turn; one that ends is left out."""
    left = list(series)
    while left:
        for one in tuple(left):
            task = next(one, None)
            if task is None:
                left.remove(one)
            else:
                yield task
