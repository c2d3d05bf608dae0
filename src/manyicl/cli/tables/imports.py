"""What `manyicl import` found, as text: what was recognised, rows of each split, three rows, what was left out."""

from __future__ import annotations

import shlex

from rich.text import Text

from manyicl.console import show_controls
from manyicl.conversion import Import, ImportedTask
from manyicl.errors import list_some
from manyicl.tasks import NO_SPLIT_NOTE, SPLITS, Example

_MOST_CHARACTERS = 200
_NUM_SHOWN = 3


def tell_import(done: Import) -> Text:
    """Return the preview of an import and the next command to type."""
    lines = [line for imported in done.tasks for line in (*_tell_task(imported), "")]
    if done.folder is None:
        lines.append("nothing is written; to write it, give --out FOLDER instead of --dry-run")
    else:
        names = ", ".join(name for imported in done.tasks for name in imported.files)
        lines += [f"wrote {names} to {done.folder}", f"next: manyicl check {shlex.quote(str(done.folder))}"]
    return Text("\n".join(lines))


def _tell_task(imported: ImportedTask) -> list[str]:
    task = imported.task
    by_split = {split: getattr(task, split) for split in SPLITS}
    counts = ", ".join(f"{len(examples):,} {split}" for split, examples in by_split.items())
    lines = [
        f"{task.name}: {imported.shape}",
        f"{imported.num_read:,} rows read, {imported.num_written:,} written,"
        f" {sum(imported.left_out.values()):,} left out",
    ]
    for reason, count in imported.left_out.items():
        example = f" ({imported.examples[reason]})" if reason in imported.examples else ""
        lines.append(f"  left out: {reason} {count:,}{example}")
    lines.append(f"as it will be read: {counts}; family {task.family}, metric {task.metric}{_tell_labels(task.labels)}")
    lines += [f"  dropped when read: {reason} {count:,}" for reason, count in task.dropped.items()]
    lines += [f"  {note}" for note in (*imported.notes, *task.warnings)]
    lines.append(f"  {task.split_note}")
    if not task.test and task.validation and task.split_note != NO_SPLIT_NOTE:
        lines.append("  no test rows: it cannot be evaluated; --split test=validation takes the validation rows for it")
    shown = next((examples for examples in by_split.values() if examples), ())
    for example in shown[:_NUM_SHOWN]:
        lines += _tell_example(example)
    return lines


def _tell_labels(labels: tuple[str, ...]) -> str:
    if not labels:
        return ""
    return f", labels {list_some(labels, most=6)}"


def _tell_example(example: Example) -> list[str]:
    answers = " | ".join(example.answers)
    lines = [f"  input    {_shorten(example.input)}"]
    if example.options:
        lines.append(f"  options  {_shorten(' | '.join(example.options))}")
    return [*lines, f"  answer   {_shorten(answers)}"]


def _shorten(text: str) -> str:
    """Return a text on one line, its middle left out if it is long.

    >>> _shorten("a\\nb")
    'a⏎b'
    """
    line = show_controls(text).replace("\n", "⏎")
    half = _MOST_CHARACTERS // 2
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:half]} ... {line[-half:]}"
