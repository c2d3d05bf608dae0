"""Built episodes for other trainers: ids, labels and lengths as Parquet, which `datasets.load_dataset` reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from manyicl.episodes import Batch, BatchMaker, Pack
from manyicl.errors import UserError
from manyicl.locks import new_folder
from manyicl.training.preparation import Prepared, count_plan
from manyicl.training.recipe import dump_config

Rows = Literal["episodes", "packs"]
# What trainers leave out of the loss.
IGNORED = -100
SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("seq_lengths", pa.list_(pa.int32()))]
)
# Rows are written in groups of about so many tokens, so that a plan of any length needs little memory.
GROUP_TOKENS = 1 << 20

CARD = """\
---
configs:
- config_name: default
  data_files:
{files}
---

# Episodes of a manyicl recipe

{rows:,} rows of the train split, in the order of the plan: {episodes:,} episodes, {answers:,} answers that are trained,
{targets:,} of {tokens:,} tokens. A row is {unit}.

| column | what it is |
|---|---|
| `input_ids` | the tokens, BOS included where the tokenizer has one |
| `labels` | the same at the tokens that are trained: answers with their terminators; -100 elsewhere; not shifted |
| `seq_lengths` | tokens of each episode in the row |

```python
from datasets import load_dataset

dataset = load_dataset("{folder}", split="train")
```

TRL takes it as it is: `SFTTrainer(model, args=SFTConfig(max_length=None), train_dataset=dataset)`. Without
`max_length=None` it cuts rows at 1,024 tokens.{packed} Its loss is the mean over all trained tokens of a step, which is
`train.normalization = "token"` here; the weights of "answer" and "task" are not in these columns.

```toml
{recipe}```
"""
PACKED = """ Several episodes share a row, and only `padding_free=True` with flash attention
keeps them apart there; without it export with `--rows episodes`."""


def export_trl(prepared: Prepared, out: Path, *, rows: Rows = "episodes") -> dict[str, int]:
    """Write the plan's rows (and the validation episodes) to the new folder `out`, whole or not at all.

    Returns split -> number of rows.

    Raises:
        UserError: `out` exists, or `rows` is neither of the two.
    """
    if rows not in get_args(Rows):
        raise UserError(f"rows={rows}: is unknown; known: {', '.join(get_args(Rows))}")
    if out.exists():
        raise UserError(f"out={out}: exists already; name a new folder")
    maker, planned = prepared.validation
    packs = prepared.packs.packs
    splits = {
        "train": _iter_rows(prepared.packs.maker, packs if rows == "packs" else _split_packs(packs)),
        "validation": _iter_rows(maker, _split_packs(planned)),
    }
    counts: dict[str, int] = {}
    with new_folder(out) as partial:
        (partial / "data").mkdir()
        for split, written in splits.items():
            first = next(written, None)
            if first is not None:
                counts[split] = write_rows(partial / "data" / f"{split}.parquet", chain([first], written))
        (partial / "README.md").write_text(_write_card(prepared, out, rows=rows, counts=counts), encoding="utf-8")
    return counts


def _split_packs(packs: list[Pack]) -> list[Pack]:
    """Return each episode in a pack of its own."""
    return [Pack(index=pack.index, episodes=(episode,)) for pack in packs for episode in pack.episodes]


def _iter_rows(maker: BatchMaker, packs: list[Pack]) -> Iterator[dict[str, Any]]:
    for pack in packs:
        yield as_columns(maker.make_batch([pack]))


def as_columns(batch: Batch) -> dict[str, Any]:
    """Return a row as it is exported: ids, labels (not shifted), and the tokens of each episode."""
    ids_T = batch.input_ids_1T[0].numpy().astype("int32")
    labels_T = ids_T.copy()
    labels_T[:] = IGNORED
    targets_N = batch.target_positions_N.numpy()
    labels_T[targets_N] = ids_T[targets_N]
    return {"input_ids": ids_T, "labels": labels_T, "seq_lengths": list(batch.segment_lengths)}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows in groups; return how many."""
    count = num_tokens = 0
    group: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for row in rows:
            group.append(row)
            count += 1
            num_tokens += len(row["input_ids"])
            if num_tokens >= GROUP_TOKENS:
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
                group, num_tokens = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
    return count


def _write_card(prepared: Prepared, out: Path, *, rows: Rows, counts: dict[str, int]) -> str:
    plan = count_plan(prepared.packs, pack_tokens=prepared.config.pack_tokens)
    return CARD.format(
        files="\n".join(f"  - split: {split}\n    path: data/{split}.parquet" for split in counts),
        rows=counts["train"],
        unit="one episode" if rows == "episodes" else f"a pack of up to {prepared.config.pack_tokens:,} tokens",
        folder=out.name,
        packed=PACKED if rows == "packs" else "",
        recipe=dump_config(prepared.config),
        **{name: plan[name] for name in ("episodes", "answers", "targets", "tokens")},
    )
