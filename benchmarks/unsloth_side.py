"""Unsloth's side of train_vs_unsloth.py, in a process of its own: commands on stdin, answers on stdout, as JSON lines.

Importing Unsloth changes transformers, peft, trl and torch for the whole process, and it needs a transformers of its
own, so nothing of manyicl is imported here. All that Unsloth prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Iterable
from importlib import import_module
from typing import Any

# Nothing is fetched, and Unsloth sends no statistics.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


class UnslothSide:
    """A model of Unsloth's in its adapter, and the row that it is timed on."""

    def open(self, *, folder: str, quantize: bool, most_tokens: int, rank: int, alpha: int) -> dict[str, Any]:
        """Load the model into an adapter, as Unsloth's own notebooks do; return versions."""
        unsloth = import_module("unsloth")  # before all that it patches

        import torch
        import transformers

        self.torch, self.unsloth = torch, unsloth
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=folder, max_seq_length=most_tokens, dtype=torch.bfloat16, load_in_4bit=quantize
        )
        self.model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0,
            bias="none",
            target_modules=MODULES,
            use_gradient_checkpointing="unsloth",
        )
        fill_adapters(self.model)
        return {"unsloth": unsloth.__version__, "transformers": transformers.__version__, "torch": torch.__version__}

    def read(self, *, path: str, padded: bool) -> dict[str, Any]:
        """Take the row that `export` wrote; padded: its episodes as rows of one batch."""
        import pyarrow.parquet as pq

        (self.row,) = pq.read_table(path).to_pylist()
        self.inputs = self.as_inputs(self.row, padded=padded)
        return {"num_tokens": len(self.row["input_ids"]), "episodes": len(self.row["seq_lengths"])}

    def as_inputs(self, row: dict[str, list[int]], *, padded: bool) -> dict[str, Any]:
        """Return what Unsloth's trainer gives the model for a row."""
        torch, lengths = self.torch, row["seq_lengths"]
        if padded:
            inputs = pad_rows(torch, row)
        else:
            inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            if len(lengths) > 1:
                inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
                inputs["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        inputs["num_items_in_batch"] = torch.tensor(sum(label != IGNORED for label in row["labels"]))
        return {name: value.to(self.device) for name, value in inputs.items()}

    def enter(self, *, way: str) -> dict[str, Any]:
        """Recompute as `way` says: "unsloth", with inputs of layers in the host's memory, or "none"."""
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
        self.unsloth.FastLanguageModel.for_training(
            self.model, use_gradient_checkpointing="unsloth" if way == "unsloth" else False
        )
        return {}

    def loss_of(self, inputs: dict[str, Any]) -> Any:
        # As transformers.Trainer does with bf16=True, which is what Unsloth's notebooks set.
        with self.torch.autocast(self.device.type, self.torch.bfloat16):
            return self.model(**inputs, use_cache=False).loss

    def step(self) -> dict[str, Any]:
        """Run forward and backward once; return seconds, loss, the gradient's norm, and the peak."""
        return timed_step(self.torch, self.model, lambda: self.loss_of(self.inputs), device=self.device)

    def isolates(self) -> dict[str, Any]:
        """Return whether other tokens in the second episode leave the loss of those after it as it was."""
        lengths = self.row["seq_lengths"]
        first, bound = lengths[0], lengths[0] + lengths[1]
        labels = [IGNORED] * bound + self.row["labels"][bound:]
        other = list(self.row["input_ids"])
        other[first:bound] = other[first:bound][::-1]
        found = []
        with self.torch.no_grad():
            for ids in (self.row["input_ids"], self.row["input_ids"], other):
                changed = {"input_ids": ids, "labels": labels, "seq_lengths": lengths}
                found.append(float(self.loss_of(self.as_inputs(changed, padded=False))))
        noise = abs(found[1] - found[0])  # of sums whose order is not fixed
        return {"isolates": abs(found[2] - found[0]) <= 2 * noise + 1e-7 * abs(found[0]), "losses": found}


def pad_rows(torch: Any, row: dict[str, list[int]]) -> dict[str, Any]:
    """Return a row's episodes as the rows of one batch, padded on the right."""
    lengths, start = row["seq_lengths"], 0
    shape = (len(lengths), max(lengths))
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, IGNORED)}
    inputs["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    for number, length in enumerate(lengths):
        for name in ("input_ids", "labels"):
            inputs[name][number, :length] = torch.tensor(row[name][start : start + length])
        inputs["attention_mask"][number, :length] = 1
        start += length
    return inputs


def fill_adapters(model: Any) -> None:
    """Give each adapter weight the same random values on either side: they follow from its name and shape."""
    import torch

    for name, weight in model.named_parameters():
        if "lora_" in name:
            seed = zlib.crc32(name[name.index("layers.") :].encode())
            values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
            weight.data.copy_(values)


def timed_step(torch: Any, model: Any, make_loss: Any, *, device: Any) -> dict[str, Any]:
    """Run forward and backward between two waits for the GPU; return what both sides report of a step."""
    on_gpu = device.type == "cuda"
    model.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    loss = make_loss()
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (None, None)
    squares = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
    return {
        "seconds": seconds,
        "loss": float(loss.detach()),
        "gradient_norm": float(torch.stack(squares).sum().sqrt()),
        "peak_bytes": peak,
        "reserved_bytes": reserved,
    }


def serve(side: Any, lines: Iterable[str], answers: Any) -> None:
    """Answer each command by the method that it names; an error is an answer, with its traceback on stderr."""
    for line in lines:
        command = json.loads(line)
        try:
            answer = getattr(side, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    os.environ.update(OFFLINE)
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(UnslothSide(), sys.stdin, pipe)
