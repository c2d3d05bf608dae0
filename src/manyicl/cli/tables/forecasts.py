"""Tables of what a recipe or a comparison will do: rows, tokens, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from manyicl.console import Table, tell_seconds
from manyicl.planning import ASSUMED_UTILIZATION, LAYER_PASS_S, SHOT_EDGES, Device, Forecast
from manyicl.training import INPUTS_AT_ONCE, OPTIMIZERS, TILE_TOKENS, MemoryPrediction, Optim, PacksChoice, bucket_name


def forecast_table(forecast: Forecast) -> Group:
    """Return what a run would do: by task, by number of shots, compute and memory; last what stands in its way."""
    parts: list[Any] = []
    if forecast.tasks:
        parts += [_forecast_tasks(forecast), _forecast_shots(forecast)]
        parts += [Text(line) for line in _forecast_lines(forecast)]
    if forecast.memory is not None:
        parts.append(_memory_table(forecast.memory, forecast.device, optim=forecast.optim))
    return Group(*parts, *tell_way(notes=forecast.notes, blockers=forecast.blockers))


def tell_way(*, notes: Sequence[str], blockers: Sequence[str]) -> list[Text]:
    """Return the lines that end a forecast, of a run or a comparison: what to know, and what stands in its way."""
    lines = [Text(note, style="dim") for note in notes]
    lines += [Text(f"in the way: {blocker}", style="red") for blocker in blockers]
    return lines if blockers else [*lines, Text("nothing stands in its way", style="green")]


def tell_rows(choices: Sequence[PacksChoice], *, device: Device | None, arms: str = "") -> str:
    """Return how many packs rows join, and why if it is the same for all models.

    choices: of each model. arms: those that train these models; "" if all do.
    """
    fewest, most = (limit(choice.number for choice in choices) for limit in (min, max))
    many = "1 pack goes" if most == 1 else f"{most} packs go" if fewest == most else f"{fewest} to {most} packs go"
    reasons = {choice.reason for choice in choices}
    on, of = f" on {device.name}" if device else "", f" of {arms}" if arms else ""
    why = f": {reasons.pop()}" if len(reasons) == 1 else ""
    return f"rows{of}: {many} through the model at once{on}{why} (train.packs_per_batch = 'auto')"


def _forecast_tasks(forecast: Forecast) -> Table:
    has_dropped = any(task.dropped for task in forecast.tasks)
    table = Table(
        title="What is trained",
        texts=("task",),
        numbers=("episodes", "tokens", "share", "answers", "targets", "epochs"),
        sentences="dropped rows" if has_dropped else None,
    )
    for task in forecast.tasks:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in task.dropped.items())
        share = f"{task.num_tokens / max(1, forecast.plan['tokens']):.1%}"
        counts = [f"{count:,}" for count in (task.num_episodes, task.num_tokens, task.num_answers, task.num_targets)]
        last = [dropped or "-"] if has_dropped else []
        table.add_row(task.name, *counts[:2], share, *counts[2:], f"{task.epochs:.1f}", *last)
    return table


def _forecast_shots(forecast: Forecast) -> Table:
    buckets = [bucket_name(index, buckets=SHOT_EDGES) for index in range(len(SHOT_EDGES))]
    table = Table(title="Trained answers by the shots before them", texts=("task",), numbers=buckets)
    for task in forecast.tasks:
        table.add_row(task.name, *(f"{task.answers_by_shots.get(bucket, 0):,}" for bucket in buckets))
    return table


def _forecast_lines(forecast: Forecast) -> list[str]:
    plan, tasks = forecast.plan, forecast.tasks
    known = f" of {forecast.known_positions:,} that the model can see" if forecast.known_positions else ""
    num_train, num_checked = sum(t.num_train for t in tasks), sum(t.num_checked for t in tasks)
    ended = num_train - sum(t.num_unterminated for t in tasks)
    exact = num_checked - sum(t.num_torn for t in tasks)
    lines = [
        f"steps: {forecast.num_steps:,}, of {plan['packs']:,} packs ({plan['fill']:.1%} full); longest episode"
        f" {forecast.longest_tokens:,} tokens{known}",
        f"supervision: {plan['targets'] / plan['tokens']:.1%} of tokens are targets; {ended:,} of {num_train:,} answers"
        f" end in the terminator; {exact} of {num_checked} checked queries are asked as they were trained",
    ]
    if forecast.joined is not None:
        lines.append(tell_rows([forecast.joined], device=forecast.device))
    if forecast.flops is not None and forecast.weights is not None:
        trained = forecast.weights.trained / forecast.weights.total
        lines.append(
            f"compute: {forecast.flops:.3g} model FLOPs, {forecast.flops / plan['answers']:.3g} per answer;"
            f" {forecast.weights.trained:,} of {forecast.weights.total:,} weights are trained ({trained:.2%})"
        )
    if forecast.hours is not None and forecast.device is not None:
        count = f"{forecast.num_devices} x " if forecast.num_devices > 1 else ""
        peak = forecast.device.peak_flops_per_s / 1e12
        lines.append(
            f"time: {tell_seconds(3600 * forecast.hours)} on {count}{forecast.device.name}, assuming that it does"
            f" {ASSUMED_UTILIZATION:.0%} of its {peak:.0f} TFLOP/s"
            + (f" and waits for its host, which starts a layer in {1e3 * LAYER_PASS_S:g} ms" if forecast.waits else "")
        )
    return lines


def _tell_recomputed(memory: MemoryPrediction) -> str:
    """Return what the recomputed layers keep on the GPU, and in the host's memory."""
    number = memory.recompute.num_layers
    if memory.recompute.offload:
        host = f"{memory.host_bytes / 2**30:,.2f} GiB of the host's memory"
        return f"inputs of {INPUTS_AT_ONCE} layers; those of all {number} take {host}"
    return f"{'input and attention' if memory.recompute.keep_attention else 'input'} of {number} layers"


def _memory_table(memory: MemoryPrediction, device: Device | None, *, optim: Optim) -> Table:
    """Return the parts of the predicted peak, beside what the device has."""
    unit, size = ("GiB", 2**30) if memory.total_bytes >= 2**30 else ("MiB", 2**20)
    title = "Predicted peak of a step on one device"
    table = Table(title=title, texts=("part",), numbers=(unit,), sentences="what it is")
    work = {
        "head": "logits of targets and their gradients",
        "layer": "one layer going backward",
        "recompute": "one layer going forward once more, then backward"
        + (f", {TILE_TOKENS:,} tokens of its feed-forward part at a time" if memory.recompute.tiles else ""),
    }
    rows = (
        ("weights", memory.weights_bytes, "of the model itself"),
        ("adapter", memory.adapters_bytes, "its weights, float32"),
        ("gradients", memory.gradients_bytes, "of trained weights, float32"),
        ("optimizer", memory.optimizer_bytes, OPTIMIZERS[optim].words),
        ("layers", memory.layers_bytes, "activations kept for the backward pass"),
        ("recomputed", memory.recomputed_bytes, _tell_recomputed(memory)),
        ("work", memory.work_bytes, work[memory.moment]),
    )
    for name, part, what in rows:
        if part:
            table.add_row(name, f"{part / size:,.2f}", what)
    table.add_section()
    kept = "" if memory.recompute.num_layers else "no layer is recomputed, as on a CPU; --device NAME counts on a GPU"
    have = kept if device is None else f"{device.name}: {device.memory_bytes / size:,.1f}"
    table.add_row("total", f"{memory.total_bytes / size:,.2f}", have, style="bold")
    return table
