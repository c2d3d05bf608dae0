"""The supervision audit: what each task would give to training, found out before any GPU minute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes import (
    TaskTokenizer,
    TokenizedTask,
    check_lost_answers,
    default_cache_dir,
    lengths_of,
    tokenize_task,
)
from manyicl.evaluation import chance_score
from manyicl.tasks import NO_SPLIT_NOTE, SPLITS, CopyIndex, Fault, Source, Task, inspect_task

BUDGETS = (2048, 8192, 32768)
# A label that makes up more than this share of the train answers leaves little to learn.
LOPSIDED_SHARE = 0.9
# Test rows that are also train rows of another task, as a share: more than these are no accident.
MOST_SHARED = 0.02
# Near-duplicates are looked for among this many inputs at the most: 15 seconds for short ones. `check` answers soon.
MAX_COMPARED = 250_000


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median, 95 % quantile and maximum of a length in tokens."""

    median: int
    high: int
    most: int


@dataclass(frozen=True, slots=True)
class TaskAudit:
    """What was found in one task's files."""

    path: Path
    """The file, or the folder of the task's files."""
    name: str
    """The task's name."""
    family: str
    """Its family, such as "classification"."""
    num_rows: int
    """Rows in the files, with those that are faulty or left out."""
    kept: dict[str, int]
    """Split -> examples."""
    dropped: dict[str, int]
    """Reason -> rows that training does not use."""
    split_note: str
    """Where the splits come from, '' if the files name them."""
    labels: dict[str, float]
    """Label -> share of the train answers, commonest first; empty if answers are open."""
    input_tokens: Quantiles | None
    """Lengths of the inputs; None without a model's tokenizer."""
    answer_tokens: Quantiles | None
    """Lengths of the answers; None without a model's tokenizer."""
    fits: dict[int, int]
    """Budget in tokens -> examples of median length that fit an episode."""
    faults: tuple[Fault, ...]
    """What is wrong with the files; a task with faults cannot be read."""
    blockers: tuple[str, ...]
    """What ends a training run on this task."""
    warnings: tuple[str, ...]
    """What makes a poor result likely."""
    num_near_copies: int | None = 0
    """Test inputs with a near-duplicate in train (tasks/duplicates.py); None if there are too many to compare."""
    chance: float | None = None
    """What answering the test rows by dice scores, 0 to 1; None if an answer is open."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that `eval` and `ask` leave out because they are too long for the model."""
    notes: tuple[str, ...] = ()
    """What reading the files found that is good to know."""

    @property
    def verdict(self) -> str:
        """One line that a newcomer understands."""
        if self.faults:
            return f"cannot be read: {self.faults[0].message}"
        if self.blockers:
            return self.blockers[0]
        if self.warnings:
            return "usable, but " + self.warnings[0]
        return "good"

    @property
    def usable(self) -> bool:
        """Whether it can be trained and asked."""
        return not self.faults and not self.blockers


def audit_tasks(
    sources: Iterable[Path | Source], *, tokenizer: TaskTokenizer | None, max_tokens: int | None = None
) -> tuple[TaskAudit, ...]:
    """Return the audits of the tasks of one folder, in their order, with a warning if another trains on its test rows.

    A copy of a file, or a file of all rows beside its splits, is a task of its own: a model that is trained on both
    has seen the answers. Rows are the same if their input and answer are.
    """
    sources = list(sources)
    keys: list[tuple[str, frozenset[int], frozenset[int]]] = []  # task, and the hashes of its train and test rows

    def remember(task: Task) -> None:
        train, test = (frozenset(hash((e.input, e.answer)) for e in rows) for rows in (task.train, task.test))
        keys.append((task.name, train, test))

    inspected = remember if len(sources) > 1 else None
    audits = [audit_task(source, tokenizer=tokenizer, max_tokens=max_tokens, on_read=inspected) for source in sources]
    shared = {name: _tell_shared(name, test, keys) for name, _, test in keys}
    return tuple(
        replace(audit, warnings=(shared[audit.name], *audit.warnings)) if shared.get(audit.name) else audit
        for audit in audits
    )


def _tell_shared(name: str, test: frozenset[int], keys: Sequence[tuple[str, frozenset[int], frozenset[int]]]) -> str:
    """Return a warning if test rows of a task are train rows of another; "" if so few are that it may be by chance."""
    counts = {other: len(test & train) for other, train, _ in keys if other != name}
    most = max(counts, key=counts.__getitem__, default=name)
    if counts.get(most, 0) <= MOST_SHARED * len(test):
        return ""
    return (
        f"{counts[most]:,} of its {len(test):,} test rows are train rows of task '{most}': a model that is trained on"
        " both has seen them; remove one of the two"
    )


def audit_task(
    source: Path | Source,
    *,
    tokenizer: TaskTokenizer | None,
    budgets: Sequence[int] = BUDGETS,
    max_tokens: int | None = None,
    on_read: Callable[[Task], None] | None = None,
) -> TaskAudit:
    """Return the audit of one data file or source; token counts only with a tokenizer.

    max_tokens: the longest sequence of the model that is to be asked; rows too long for it are counted.
    on_read: gets the task, if it could be read.
    """
    task, faults = inspect_task(source)
    if task is not None and on_read is not None:
        on_read(task)
    path = source.path if isinstance(source, Source) else source
    if task is None:
        return TaskAudit(path, source.stem, "", 0, {}, {}, "", {}, None, None, {}, tuple(faults), (), ())
    tokenized = tokenize_task(task, tokenizer=tokenizer, cache_dir=default_cache_dir()) if tokenizer else None
    kept = {split: len(tokenized.splits[split] if tokenized else getattr(task, split)) for split in SPLITS}
    dropped = Counter(task.dropped)
    if tokenized:
        for reasons in tokenized.dropped.values():
            dropped.update(reasons)
    left_out = _left_out(tokenized, tokenizer, max_tokens=max_tokens) if tokenized and tokenizer and max_tokens else {}
    return TaskAudit(
        path=path,
        name=task.name,
        family=task.family,
        num_rows=task.num_rows,
        kept=kept,
        dropped=dict(dropped),
        split_note=task.split_note,
        labels=_label_shares(task),
        input_tokens=_quantiles(_input_lengths(tokenized)) if tokenized else None,
        answer_tokens=_quantiles(tokenized.splits["train"].answer_lengths) if tokenized else None,
        fits={budget: _num_fitting(tokenized, budget) for budget in budgets} if tokenized else {},
        faults=tuple(faults),
        blockers=tuple(_blockers(task, tokenized, kept=kept, dropped=dropped, budget=max(budgets))),
        warnings=(
            *(f"{count:,} {reason} (longest sequence: {max_tokens:,} tokens)" for reason, count in left_out.items()),
            *_warnings(task, kept=kept, dropped=dropped),
        ),
        notes=task.notes,
        num_near_copies=_num_near_copies(task),
        chance=chance_score(
            [task.choices(e) for e in task.test], test_answers=[e.answers for e in task.test], metric=task.metric
        ),
        left_out=left_out,
    )


def _left_out(tokenized: TokenizedTask, tokenizer: TaskTokenizer, *, max_tokens: int) -> dict[str, int]:
    """Return the rows that an evaluation with its usual number of queries would leave out because of their length."""
    from manyicl.evaluation import Sweep, TaskSweep

    sweep = Sweep(shots=(0,), num_draws=1, max_tokens=max_tokens)
    return TaskSweep(tokenized, tokenizer=tokenizer, sweep=sweep).left_out


def _num_near_copies(task: Task) -> int | None:
    if len(task.train) + len(task.test) > MAX_COMPARED:
        return None
    # Very copies are dropped when a task is read, so that those in other letters are left.
    index = CopyIndex([example.input for example in task.train], groups=[0] * len(task.train))
    return len({row for row, _ in index.find_similar([example.input for example in task.test])})


def _label_shares(task: Task) -> dict[str, float]:
    if not task.labels:
        return {}
    counts = Counter(example.answer for example in task.train)
    total = max(1, sum(counts.values()))
    return {label: count / total for label, count in counts.most_common()}


def _input_lengths(tokenized: TokenizedTask) -> NDArray[np.int64]:
    train = tokenized.splits["train"]
    return train.answer_starts - train.starts[:-1]


def _quantiles(lengths: NDArray[np.int64]) -> Quantiles | None:
    if not len(lengths):
        return None
    median, high = np.quantile(lengths, [0.5, 0.95])
    return Quantiles(median=round(median), high=round(high), most=int(lengths.max()))


def _num_fitting(tokenized: TokenizedTask, budget: int) -> int:
    lengths = tokenized.splits["train"].lengths
    if not len(lengths):
        return 0
    return max(0, int((budget - len(tokenized.head_ids)) // max(1.0, float(np.median(lengths)))))


def _blockers(
    task: Task, tokenized: TokenizedTask | None, *, kept: dict[str, int], dropped: Counter[str], budget: int
) -> list[str]:
    lost = check_lost_answers(tokenized) if tokenized else None
    # First, because it is why rows are missing below.
    blockers = [f"cannot be trained: {lost}"] if lost else []
    if not kept["train"]:
        blockers.append(_tell_no_train(dropped))
    if kept["train"] == 1:
        blockers.append("cannot be trained: one train row is left, and no other to stand before it; add some")
    if not kept["test"]:
        blockers.append(_tell_no_test(task))
    if task.labels and len({e.answer for e in task.train}) == 1:
        blockers.append("cannot be learnt: every train row has the same answer; add rows with others")
    if tokenized:
        alone = lengths_of(tokenized).alone
        if len(alone) and int(alone.min()) > budget:
            needs = f"its shortest example needs {int(alone.min())}; shorten its inputs"
            blockers.append(f"cannot be trained in {budget} tokens: {needs}")
    return blockers


def _tell_no_train(dropped: Counter[str]) -> str:
    if not dropped:
        return "cannot be trained: no train rows are left; add rows with split 'train'"
    reason, count = dropped.most_common(1)[0]
    rows = f"{count:,} rows were" if count > 1 else "one row was"
    return f"cannot be trained: no train rows are left, because {rows} dropped ({reason}); add others"


def _tell_no_test(task: Task) -> str:
    if task.test:
        return "cannot be asked: no test rows are left, for all were dropped; the reasons are below"
    if task.split_note == NO_SPLIT_NOTE:
        none = f"none of its {task.num_rows:,} rows is" if task.num_rows > 1 else "its one row is not"
        return f"cannot be asked: {none} in the fifth that becomes test; add rows, or name a split"
    return "cannot be asked: it has no test rows; give some rows the split 'test', or put them into a file called test"


def _warnings(task: Task, *, kept: dict[str, int], dropped: Counter[str]) -> list[str]:
    warnings = list(task.warnings)
    shares = _label_shares(task)
    top = max(shares, key=shares.__getitem__, default=None)
    if top is not None and shares[top] > LOPSIDED_SHARE:
        warnings.append(f"lopsided: {shares[top]:.0%} of the train answers are '{top}'")
    missing = [label for label in task.labels if label not in shares]
    if missing:
        warnings.append(f"labels that never occur in train: {len(missing)}, such as '{missing[0]}'")
    if kept["test"] and kept["test"] < 50:
        warnings.append(f"only {kept['test']} test row{'s' * (kept['test'] > 1)}: intervals will be wide")
    if sum(dropped.values()) > 0.05 * max(1, task.num_rows):
        reason, count = dropped.most_common(1)[0]
        warnings.append(f"{sum(dropped.values()):,} of {task.num_rows:,} rows dropped, most for: {reason} ({count:,})")
    return warnings
