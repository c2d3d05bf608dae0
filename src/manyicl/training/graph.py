"""Forward and backward of a row as one CUDA graph: for models whose kernels end sooner than Python can start them.

A pass of a small model starts thousands of kernels of a few microseconds each, and the GPU waits for them. A graph
holds them all, and one call launches it. It reads its row from the same places in memory each time, so rows are padded
to one `RowShape`, which holds every row of the plan: so a resumed run pads as one that was never stopped, and captures
as often. A row that is larger than was planned is captured anew. Gradients add up over the rows of a step, in tensors
that belong to the graph; gradients of passes outside of it are not added to.

Shape suffixes: T tokens of the row, S bounds of its segments, N targets, A answers that are targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyicl.episodes import Batch, RowCounts, pad_tokens, power_of_two
from manyicl.errors import UserError, is_out_of_memory
from manyicl.models import (
    AnswerLoss,
    caps_scores,
    device_of,
    drops_attention,
    head_dims,
    inner_model,
    is_flash_size,
    load_config,
    rope_by_length,
)
from manyicl.training.memory.choice import FEWEST_PASS_FLOPS
from manyicl.training.recipe import RunConfig
from manyicl.training.recompute.layers import Recompute

# Model types whose passes are captured in tests on a GPU. None has experts: with them the host waits to learn how many
# tokens each expert gets.
GRAPHED = frozenset({"gemma", "gemma3_text", "llama", "mistral", "qwen3"})
# Passes before a capture, in which libraries make their handles and workspaces, and layers are compiled.
NUM_WARM_UPS = 2
# Sizes are rounded up to a multiple of the power of two above over this, so that few rows are larger than before where
# no plan is known.
SIZE_STEPS = 8
RECOMPUTED = "layers are recomputed"
DROPOUT = "there is dropout"


def find_obstacle(
    model: nn.Module, *, fault: str, is_wrapped: bool, recompute: Recompute, is_half: bool, quantize: str | None
) -> str:
    """Return why the passes of a model cannot be a CUDA graph, '' if they can.

    fault: why episodes go through the model one at a time, '' if they do not. is_wrapped: in DDP or FSDP, as it also is
    if a launcher starts a single process. is_half: products are in half precision. quantize: as `model.quantize`.
    """
    has_gpu = device_of(model).type == "cuda"
    if stated := _stated_obstacle(has_gpu=has_gpu, is_wrapped=is_wrapped, is_half=is_half, quantize=quantize):
        return stated
    if fault:
        return "each episode goes through the model alone"
    if recompute.num_layers:
        return RECOMPUTED
    if any(isinstance(part, nn.Dropout) and part.p for part in model.modules()):
        return DROPOUT
    inner: Any = inner_model(model)
    if obstacle := _config_obstacle(inner.config):
        return obstacle
    is_own = type(inner).__module__.startswith("transformers.")
    return "" if is_own else f"{type(inner).__name__} is not transformers' own code, and was not tried"


def find_known_obstacle(config: RunConfig, *, has_gpu: bool, num_ranks: int) -> str:
    """Return what `find_obstacle` would, as far as a recipe, a machine and the model's config say it.

    Raises:
        UserError: the model's config cannot be read.
    """
    model, is_half = config.model, config.model.precision != "fp32"
    stated = _stated_obstacle(has_gpu=has_gpu, is_wrapped=num_ranks > 1, is_half=is_half, quantize=model.quantize)
    if stated:
        return stated
    return DROPOUT if model.lora is not None and model.lora.dropout else _config_obstacle(load_config(model))


def _config_obstacle(config: Any) -> str:
    """Return the obstacle that a model's config shows."""
    if drops_attention(config):
        return DROPOUT
    if rope := rope_by_length(config):
        return f"the host waits for the longest position (rope_type '{rope}')"
    if config.model_type not in GRAPHED:  # a larger model around a text model has a type of its own
        return f"models of type {config.model_type} were not tried"
    # Segment by segment it would need the lengths of the row at hand.
    others = [f"heads of {size}" for size in head_dims(config) if not is_flash_size(size)]
    others += ["capped scores"] if caps_scores(config) else []
    return f"attention goes segment by segment ({others[0]})" if others else ""


def _stated_obstacle(*, has_gpu: bool, is_wrapped: bool, is_half: bool, quantize: str | None) -> str:
    """Return the obstacle that does not depend on the model; the arguments are those of `find_obstacle`."""
    if not has_gpu:
        return "there is no GPU"
    if is_wrapped:
        return "the model is in DDP or FSDP"
    if not is_half:
        return "products are in float32, whose attention goes segment by segment"
    return f"the base is kept in {quantize}" if quantize else ""


def choose_graph(setting: bool | Literal["auto"], *, obstacle: str, pass_flops: float | None) -> tuple[bool, str]:
    """Return whether rows run as a CUDA graph, and why.

    setting: as `train.cuda_graph`. pass_flops: of a row forward and backward, on average; None if they are not known.

    Raises:
        UserError: the setting is true, and there is an obstacle.
    """
    if setting is True and obstacle:
        raise UserError(tell_refused_graph(obstacle))
    if setting != "auto" or obstacle:
        return setting is True, "the recipe says so" if setting != "auto" else obstacle
    if pass_flops is None:
        return False, "the model's FLOPs are not known"
    if pass_flops >= FEWEST_PASS_FLOPS:
        return False, f"a pass has {pass_flops:.2g} FLOPs, which keep a GPU at work"
    return True, f"a pass has {pass_flops:.2g} FLOPs, and the GPU would wait for Python to start its kernels"


def tell_refused_graph(obstacle: str) -> str:
    """Return why `train.cuda_graph = true` is refused, with the fix."""
    return f"train.cuda_graph = true: {obstacle}; set it to 'auto' or false"


def tell_recomputed_graph(config: RunConfig, recompute: Recompute) -> str:
    """Return why `train.cuda_graph = true` is refused once 'auto' has chosen what is recomputed, '' if it is not."""
    is_refused = config.train.cuda_graph is True and config.train.recompute == "auto" and recompute.num_layers
    return tell_refused_graph(f"{RECOMPUTED}, so that a step fits the memory") if is_refused else ""


@dataclass(frozen=True, slots=True)
class RowShape:
    """What rows are padded to."""

    is_one: bool
    """Whether a single segment fills the row, which has a faster kernel: such rows have a graph of their own."""
    num_tokens: int
    num_bounds: int
    """Of segments: one more than there are segments."""
    longest: int
    """Tokens of the longest segment, rounded up to a power of two."""
    num_targets: int
    num_answers: int
    """One more than any row has: padding's targets belong to the last."""

    def joined(self, other: RowShape) -> RowShape:
        """Return the smallest shape that rows of either can be padded to."""
        return RowShape(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))


def shape_of(row: RowCounts, *, num_tokens: int) -> RowShape:
    """Return the least that a row is padded to. num_tokens: of the longest row of the run."""
    padding, is_one = num_tokens - row.num_tokens, len(row.segment_lengths) == 1
    assert padding >= 0, f"a row of {row.num_tokens} tokens, and the longest has {num_tokens}"
    return RowShape(
        is_one=is_one,
        num_tokens=num_tokens,
        num_bounds=_round_up(row.num_bounds + 1),
        longest=power_of_two(num_tokens if is_one else max(*row.segment_lengths, padding)),
        num_targets=_round_up(row.num_targets),
        num_answers=_round_up(row.num_answers + 1),
    )


def join_shapes(rows: Iterable[RowCounts], *, num_tokens: int) -> dict[bool, RowShape]:
    """Return the shape that all rows of a single segment can be padded to (True), and that of the others (False)."""
    shapes: dict[bool, RowShape] = {}
    for shape in (shape_of(row, num_tokens=num_tokens) for row in rows):
        shapes[shape.is_one] = shape.joined(shapes.get(shape.is_one, shape))
    return shapes


def _round_up(number: int) -> int:
    """Return one of few numbers that is at least as large.

    >>> [_round_up(n) for n in (5, 100, 129)]
    [5, 112, 160]
    """
    step = max(1, power_of_two(number) // SIZE_STEPS)
    return -(-number // step) * step


def padded_row(batch: Batch, shape: RowShape) -> Batch:
    """Return a row padded to `shape`, with the same loss and gradients.

    Tokens of padding are a segment of their own, or extend the only one, behind all that it trains. Targets of padding
    weigh nothing and belong to the last answer, which no row has.
    """
    num_tokens, num_targets = shape.num_tokens - batch.num_tokens, shape.num_targets - len(batch.target_positions_N)
    num_bounds = shape.num_bounds - len(batch.segment_bounds_S)
    num_answers = shape.num_answers - len(batch.answer_shots_A)
    if shape.is_one:
        lengths: tuple[int, ...] = (shape.num_tokens,)
        bounds_S = functional.pad(batch.segment_bounds_S[:1], (0, shape.num_bounds - 1), value=shape.num_tokens)
    else:
        lengths = (*batch.segment_lengths, num_tokens) if num_tokens else batch.segment_lengths
        bounds_S = functional.pad(batch.segment_bounds_S, (0, num_bounds), value=shape.num_tokens)
    return replace(
        pad_tokens(batch, lengths=lengths, bounds_S=bounds_S),
        target_positions_N=functional.pad(batch.target_positions_N, (0, num_targets), value=1),
        target_weights_N=functional.pad(batch.target_weights_N, (0, num_targets)),
        target_answers_N=functional.pad(batch.target_answers_N, (0, num_targets), value=shape.num_answers - 1),
        answer_shots_A=functional.pad(batch.answer_shots_A, (0, num_answers)),
        answer_tasks_A=functional.pad(batch.answer_tasks_A, (0, num_answers)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Forward and backward of rows of one shape."""

    shape: RowShape
    row: Batch
    """What it reads."""
    scored: AnswerLoss
    """What it writes, beside gradients."""
    graph: torch.cuda.CUDAGraph


class GraphedPass:
    """Runs rows forward and backward by a CUDA graph, or two: one for rows of a single segment.

    run: forward and backward of a row without a wait for the GPU; its loss has no autograd graph any more, which would
    keep what the pass made. parameters: that it gives gradients to. num_tokens: of the longest row. rows: that will
    come, as far as they are known: none of them needs another capture.
    """

    def __init__(
        self,
        run: Callable[[Batch], AnswerLoss],
        parameters: Iterable[nn.Parameter],
        *,
        num_tokens: int,
        rows: Iterable[RowCounts] = (),
    ) -> None:
        self.run, self.num_tokens = run, num_tokens
        self.planned = join_shapes(rows, num_tokens=num_tokens)
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.gradients: list[Tensor] = []
        self.graphs: dict[bool, _Graph] = {}

    def __call__(self, batch: Batch) -> AnswerLoss:
        """Return a row's loss, and add its gradients to the parameters'."""
        shape = shape_of(batch.counts, num_tokens=self.num_tokens)
        known = self.graphs.get(shape.is_one)
        wanted = shape.joined(known.shape if known is not None else self.planned.get(shape.is_one, shape))
        if known is None or wanted != known.shape:
            known = None  # its memory is for the next
            known = self._capture(batch, wanted)
        self._take_gradients()
        _copy(padded_row(batch, known.shape), known.row)
        known.graph.replay()
        scored, num_answers = known.scored, len(batch.answer_shots_A)
        return AnswerLoss(  # copies, since the next row writes to the same places
            loss=scored.loss.clone(),
            nll_A=scored.nll_A[:num_answers].clone(),
            num_tokens_A=scored.num_tokens_A[:num_answers].clone(),
            correct_A=scored.correct_A[:num_answers].clone(),
        )

    def _capture(self, batch: Batch, shape: RowShape) -> _Graph:
        """Make the graph of rows of `shape`, with `batch` for the passes before.

        Raises:
            UserError: CUDA refuses something in the pass.
            RuntimeError: memory runs out (`is_out_of_memory`).
        """
        self.graphs.pop(shape.is_one, None)
        torch.cuda.empty_cache()
        # Of the lengths, attention on a GPU reads the largest, which must hold for every row, and whether there is one.
        lengths = (shape.num_tokens,) if shape.is_one else (shape.longest, 1)
        row = replace(padded_row(batch, shape).mapped(Tensor.clone), segment_lengths=lengths)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), self._kept_gradients():
            for _ in range(NUM_WARM_UPS):
                self.run(row)
        torch.cuda.current_stream().wait_stream(side)
        self._take_gradients()
        graph = torch.cuda.CUDAGraph()
        # The graphs never run at once, so they may share memory.
        pool = next((other.graph.pool() for other in self.graphs.values()), None)
        # Another thread, which pins batches, may ask CUDA for memory meanwhile.
        with _told_in_words(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            scored = self.run(row)
        self.graphs[shape.is_one] = _Graph(shape, row, scored, graph)
        return self.graphs[shape.is_one]

    @contextmanager
    def _kept_gradients(self) -> Iterator[None]:
        """Drop what the block adds to gradients. The first time, find the parameters that it gives any to."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        yield
        if not self.gradients:
            used = [parameter.grad is not None for parameter in self.parameters]
            self.parameters = [one for one, is_used in zip(self.parameters, used, strict=True) if is_used]
            before = [one for one, is_used in zip(before, used, strict=True) if is_used]
            self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient

    def _take_gradients(self) -> None:
        """Let the parameters have the graph's gradients, from zero where an optimizer's step has dropped them."""
        if self.parameters[0].grad is self.gradients[0]:
            return
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _told_in_words() -> Iterator[None]:
    """Tell what made a capture in the block fail, which the error of ending that capture hides.

    Raises:
        RuntimeError: memory ran out (`is_out_of_memory`).
        UserError: anything else, such as code that waits for the GPU.
    """
    try:
        yield
    except RuntimeError as error:
        context = error.__context__
        first = context if isinstance(context, RuntimeError) and not is_out_of_memory(error) else error
        if is_out_of_memory(first):
            raise first from None
        why = str(first).strip().split("\n", maxsplit=1)[0]
        raise UserError(f"a row cannot become a CUDA graph ({why}); set train.cuda_graph = false") from error


def _copy(source: Batch, target: Batch) -> None:
    for one, other in zip(source.tensors().values(), target.tensors().values(), strict=True):
        other.copy_(one)
