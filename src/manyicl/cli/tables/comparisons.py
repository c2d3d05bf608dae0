"""Tables of what a comparison will do: the work of its arms, tokens, time and memory."""

from __future__ import annotations

from textwrap import fill

from rich.console import Group
from rich.text import Text

from manyicl.cli.tables.forecasts import tell_rows, tell_way
from manyicl.comparison import TRIALS, WHILE_TRAINING, WORK, ArmForecast, ComparisonForecast, Work
from manyicl.console import Table
from manyicl.planning import ASSUMED_UTILIZATION, LAYER_PASS_S
from manyicl.report import count_noun


def comparison_forecast_table(forecast: ComparisonForecast) -> Group:
    """Return what a comparison would take: by arm, by kind of work, and what stands in its way; 80 columns wide."""
    parts: list[Table | Text] = []
    if forecast.arms:
        parts += [_forecast_arms(forecast), _forecast_work(forecast)]
        parts += [Text(line) for line in _forecast_lines(forecast)]
    return Group(*parts, *tell_way(notes=forecast.notes, blockers=forecast.blockers))


def _forecast_arms(forecast: ComparisonForecast) -> Table:
    peaks = [arm.memory.total_bytes for arm in forecast.arms if arm.memory is not None]
    unit, size = ("GiB", 2**30) if max(peaks, default=0) >= 2**30 else ("MiB", 2**20)
    table = Table(
        title=f"Each arm, over {count_noun(len(forecast.seeds), 'seed')}",
        texts=("arm",),
        numbers=("models", "trials", "tokens\na seed", "all\ntokens", "FLOPs", "hours", f"peak\n{unit}"),
    )
    for arm in forecast.arms:
        table.add_row(
            fill(arm.title, 16),
            *(str(number) if number else "-" for number in arm.num_runs),
            _tell_tokens(arm.tokens) if arm.tokens else "-",
            *_tell_work(forecast, arm.total),
            "-" if arm.memory is None else f"{arm.memory.total_bytes / size:,.1f}",
        )
    table.add_section()
    runs = [sum(arm.num_runs[place] for arm in forecast.arms) for place in (0, 1)]
    total = sum((arm.total for arm in forecast.arms), Work())
    peak = f"{max(peaks) / size:,.1f}" if peaks else "-"
    table.add_row("total", *map(str, runs), "", *_tell_work(forecast, total), peak, style="bold")
    return table


def _forecast_work(forecast: ComparisonForecast) -> Table:
    numbers = ("items", "tokens", "FLOPs", "hours", "tokens,\nplain path")
    table = Table(title="Each kind of work, of all arms", texts=("work",), numbers=numbers)
    order = [f"{trial}{what}" for trial in (TRIALS, "") for what in WORK.values()] + [WHILE_TRAINING]
    for name in [name for name in order if name in forecast.work and forecast.work[name].tokens]:
        work = forecast.work[name]
        plain = _tell_tokens(work.plain_tokens) if work.plain_tokens != work.tokens else ""
        table.add_row(name, f"{work.items:,}" if work.items else "-", *_tell_work(forecast, work), plain)
    table.add_section()
    total = sum(forecast.work.values(), Work())
    told = (f"{total.items:,}", *_tell_work(forecast, total), _tell_tokens(total.plain_tokens))
    table.add_row("total", *told, style="bold")
    return table


def _tell_rows(forecast: ComparisonForecast) -> list[str]:
    """Return how many packs the rows of arms join: a line if it is the same for all, else one for each number."""
    by_number: dict[tuple[int, ...], list[ArmForecast]] = {}
    for arm in forecast.arms:
        if arm.joined:
            by_number.setdefault(tuple(sorted({choice.number for choice in arm.joined})), []).append(arm)
    return [
        tell_rows(
            [choice for arm in arms for choice in arm.joined],
            device=forecast.device,
            arms=", ".join(arm.title for arm in arms) if len(by_number) > 1 else "",
        )
        for arms in by_number.values()
    ]


def _tell_work(forecast: ComparisonForecast, work: Work) -> tuple[str, str, str]:
    hours = forecast.hours(work)
    told = "-" if hours is None else "<0.01" if 0 < hours < 0.01 else f"{hours:,.2g}"
    return _tell_tokens(work.tokens), f"{work.flops:.1e}", told


def _tell_tokens(number: int) -> str:
    """Return a number of tokens in three digits: 950, 12.3k, 4.56M, 789M, 1.23G."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}{unit}"
    return str(number)


def _forecast_lines(forecast: ComparisonForecast) -> list[str]:
    has_more = len(forecast.seeds) > 1
    has_trials = any(arm.num_runs[1] for arm in forecast.arms)
    once = " A first seed's model is the run of its trial." if has_trials else ""
    lines = [
        "With a shared prefix, each draw's shots are encoded once; on the plain path, of a model whose cache cannot be"
        f" shared, once for every query and option. Open answers are taken to be as long as their references.{once}",
        *([f"Counted with seed {forecast.seeds[0]}; another seed is taken to cost as much."] if has_more else []),
        *_tell_rows(forecast),
    ]
    if forecast.device is None:
        return [*lines, "Hours: name a device (--device h100)."]
    peak, total = forecast.device.peak_flops_per_s / 1e12, sum(forecast.work.values(), Work())
    lines.append(
        f"Hours are those of one {forecast.device.name}, assuming that it does {ASSUMED_UTILIZATION:.0%} of its"
        f" {peak:.0f} TFLOP/s, or, if that takes longer, that its host starts a layer in {1e3 * LAYER_PASS_S:g} ms:"
        " small models and generated answers wait for that."
    )
    num_devices = min(forecast.num_devices, len(forecast.seeds))
    if num_devices > 1:
        hours = (forecast.hours(total) or 0.0) / num_devices
        lines.append(f"On {num_devices} of them, each with seeds of its own: about {hours:.2g} hours.")
    return lines
