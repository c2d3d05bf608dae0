"""Rows of tasks that no model is trained on, and that are rows of the trained ones all the same.

A held-out task whose test rows are train rows of a trained task shows what was learnt by heart, not what was learnt.
Validation rows of a trained task count as well: settings are chosen by them. Inputs are compared, exactly and as
near-duplicates (tasks/duplicates.py), since a row's answer may be written in another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from manyicl.errors import list_some
from manyicl.tasks import CopyIndex, Example, Task


class SplitOverlap(BaseModel):
    """How many rows of one split have copies among the train and validation rows of trained tasks."""

    model_config = ConfigDict(frozen=True)

    exact: int
    """Rows whose very input is that of a row of a trained task."""
    same_answer: int
    """Of these, the rows whose answer is the same too."""
    near: int
    """Rows with a near-duplicate of their input, and no exact copy."""
    of: int
    """Rows of the split."""

    @property
    def count(self) -> int:
        """Rows with a copy of either kind."""
        return self.exact + self.near


class Overlap(BaseModel):
    """What a task that is not trained on shares with the train and validation rows of trained tasks."""

    model_config = ConfigDict(frozen=True)

    test: SplitOverlap
    """Of its test rows, which are the queries."""
    shots: SplitOverlap
    """Of its train rows, from which its shots are drawn."""
    with_tasks: dict[str, int]
    """Trained task -> rows of both splits that have a copy in it; most rows first. Tasks without any are left out."""

    @property
    def count(self) -> int:
        """Rows of both splits with a copy."""
        return self.test.count + self.shots.count


def find_overlaps(tasks: Mapping[str, Task], *, trained: Sequence[str]) -> dict[str, Overlap]:
    """Return the overlap of each task that is not in `trained` with the train and validation rows of all that are."""
    others = {name: task for name, task in tasks.items() if name not in trained}
    wanted = {example.input for task in others.values() for example in (*task.test, *task.train)}
    if not wanted:
        return {}
    inputs: list[str] = []
    groups: list[int] = []
    exact: dict[str, list[tuple[str, str]]] = {}
    for number, name in enumerate(trained):
        for example in (*tasks[name].train, *tasks[name].validation):
            inputs.append(example.input)
            groups.append(number)
            if example.input in wanted:
                exact.setdefault(example.input, []).append((name, example.answer))
    index = CopyIndex(inputs, groups=groups)
    found = {}
    for name, task in others.items():
        counts: Counter[str] = Counter()
        splits = []
        for examples in (task.test, task.train):
            near = [set[str]() for _ in examples]
            for row, copy in index.find_similar([example.input for example in examples]):
                near[row].add(trained[groups[copy]])
            splits.append(_count_rows(examples, exact, near))
            for example, names in zip(examples, near, strict=True):
                counts.update(names.union(of for of, _ in exact.get(example.input, ())))
        found[name] = Overlap(test=splits[0], shots=splits[1], with_tasks=dict(counts.most_common()))
    return found


def _count_rows(
    examples: Sequence[Example], exact: Mapping[str, list[tuple[str, str]]], near: Sequence[set[str]]
) -> SplitOverlap:
    copies = [exact.get(example.input, []) for example in examples]
    return SplitOverlap(
        exact=sum(map(bool, copies)),
        same_answer=sum(
            any(answer == example.answer for _, answer in found)
            for example, found in zip(examples, copies, strict=True)
        ),
        near=sum(bool(names) and not found for names, found in zip(near, copies, strict=True)),
        of=len(examples),
    )


def tell_overlap(overlap: Overlap) -> str:
    """Return a task's overlap in words; '' if it has none."""
    parts = []
    for rows, split in (("test rows", overlap.test), ("rows for its shots", overlap.shots)):
        if split.count:
            same = f", {split.same_answer:,} with the same answer" if split.exact else ""
            parts.append(
                f"{split.count:,} of {split.of:,} {rows}"
                f" {'is a row of a trained task' if split.count == 1 else 'are rows of trained tasks'} too"
                f" ({split.exact:,} exactly{same}; {split.near:,} nearly)"
            )
    named = list_some(f"{name} {count:,}" for name, count in overlap.with_tasks.items())
    return f"{'; '.join(parts)}: {named}" if parts else ""


def tell_overlaps(overlaps: Mapping[str, Overlap]) -> Iterator[str]:
    """Yield a line per task with an overlap, or one line that says that none has any."""
    if overlaps and not any(overlap.count for overlap in overlaps.values()):
        rows = sum(overlap.test.of + overlap.shots.of for overlap in overlaps.values())
        yield f"overlap: none of the {rows:,} rows of tasks that are not trained on is one of a trained task, or nearly"
    for name, overlap in overlaps.items():
        if overlap.count:
            yield f"overlap: task '{name}' is not trained on, but {tell_overlap(overlap)}"
