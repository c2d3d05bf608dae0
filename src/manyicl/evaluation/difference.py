"""Compare two sweeps: paired differences on the answers that they have in common, with intervals and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from manyicl.console import MINUS, deciding_digits
from manyicl.errors import UserError
from manyicl.evaluation.points import Prediction
from manyicl.evaluation.results import Evaluation
from manyicl.evaluation.scoring.answers import MACRO_F1, macro_f1
from manyicl.evaluation.shots import FILL, Shots, shots_order, sort_shots, tell_asked_with
from manyicl.intervals import Interval, Table, difference_interval

_PointKey = tuple[str, Shots]  # task, shots
_DrawKey = tuple[str, Shots, int]  # task, shots, draw
_Answers = dict[str, Prediction]  # query -> answer
_Drawn = tuple[_Answers, _Answers]  # of a and of b, in one draw
_Pair = tuple[Table, Table]


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """b - a by a metric beside the task's own, on the same answers."""

    metric: str
    """Name of the metric."""
    a: float
    """Mean score of a."""
    b: float
    """Mean score of b."""
    difference: float
    """b - a."""
    low: float | None
    """Lower end of the 95 % interval; None for macro-F1, which single answers do not have."""
    high: float | None
    """Upper end of the interval."""


@dataclass(frozen=True, slots=True)
class PointDifference:
    """One task at one number of shots: b - a, on the draws and queries that both were asked. Scores are 0 to 1."""

    task: str
    """Name of the task."""
    shots: Shots
    """Number of shots, or `fill`."""
    num_draws: int
    """Draws that both have."""
    num_queries: int
    """Queries that all these draws have."""
    a: float
    """Mean score of a."""
    b: float
    """Mean score of b."""
    difference: float
    """b - a."""
    low: float | None
    """Lower end of the 95 % interval; None if a single answer gives none."""
    high: float | None
    """Upper end of the interval."""
    others: tuple[MetricDifference, ...] = ()
    """By the metrics that both results have beside the task's own."""


@dataclass(frozen=True, slots=True)
class MeanDifference:
    """The mean of the tasks' differences at one number of shots. The tasks are fixed: only draws and queries vary."""

    shots: Shots
    """Number of shots, or `fill`."""
    tasks: tuple[str, ...]
    """The tasks that the mean is over."""
    difference: float
    """Mean of b - a."""
    low: float | None
    """Lower end of the 95 % interval; None if single answers give none."""
    high: float | None
    """Upper end of the interval."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How two results differ."""

    a: str
    """Model and file of the first, and how its shots were chosen if that differs."""
    b: str
    """The same of the second."""
    num_rows: int
    """Pairs of answers that were compared."""
    unjoined: Mapping[str, int]
    """Reason -> answers of either that were left out."""
    cells: tuple[PointDifference, ...]
    """By task and number of shots."""
    means: tuple[MeanDifference, ...]
    """Over tasks, by number of shots."""
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Settings of `AnswerSettings` and, as `template.KEY`, of the templates that differ -> their values in a and b."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, each difference with its sentence."""
        content = asdict(self)
        for part, items in (("cells", self.cells), ("means", self.means)):
            content[part] = [{**asdict(item), "sentence": tell_difference(item)} for item in items]
        return content


def compare_results(a: Evaluation, b: Evaluation) -> Difference:
    """Return b - a, joined by task, draw, shots and query.

    Only draws of the very same shots, scored by the same metric, are joined: with another seed, other data, or a
    tokenizer that drops other rows it is another draw. Results of one seed whose shots were chosen in different ways
    are joined by the number of the draw; `Difference.a` and `.b` then name the ways. A point without a score is left
    out, never taken for 0.

    Raises:
        UserError: nothing joins.
    """
    unjoined: Counter[str] = Counter()
    rows_a, rows_b = _group_rows(a.predictions), _group_rows(b.predictions)
    shots_a, shots_b = _shots_of(a), _shots_of(b)
    metrics_a, metrics_b = _metrics_of(a), _metrics_of(b)
    is_one_choice = _choice(a) == _choice(b)
    draws: dict[_PointKey, list[_Drawn]] = {}
    for key in sorted({*rows_a, *rows_b}, key=lambda key: (key[0], shots_order(key[1]), key[2])):
        task, shots, _ = key
        one, other = rows_a.get(key, {}), rows_b.get(key, {})
        reason = _refuse_draw(key, (rows_a, rows_b), metrics=(metrics_a, metrics_b))
        if reason is None and shots_a[key] != shots_b[key] and (is_one_choice or a.seed != b.seed):
            reason = _tell_other_shots(shots, is_one_seed=a.seed == b.seed)
        if reason is None:
            draws.setdefault((task, shots), []).append((one, other))
        else:
            unjoined[reason] += len(one) + len(other)
    paired = {key: _share_queries(pairs, unjoined) for key, pairs in draws.items()}
    tables = {key: _pair_tables(pairs) for key, pairs in paired.items() if pairs}
    if not tables:
        reasons = "; ".join(f"{count:,} rows: {reason}" for reason, count in unjoined.most_common())
        raise UserError(
            f"{_place(a)} and {_place(b)}: nothing to compare ({reasons}); ask both with the same tasks and `seed`"
        )
    with_macro = _tasks_with_macro_f1(a)
    cells = [
        replace(_compare_point(*key, *pair), others=_compare_others(paired[key], macro=key[0] in with_macro))
        for key, pair in tables.items()
    ]
    means = [_compare_mean(shots, tables) for shots in sort_shots(shots for _, shots in tables)]
    num_rows = sum(one.scores.size for one, _ in tables.values())
    settings_a, settings_b = _settings_of(a), _settings_of(b)
    settings = {
        key: (value, settings_b[key])
        for key, value in settings_a.items()
        if key in settings_b and value != settings_b[key]
    }
    ours, theirs = (_name(one) if is_one_choice else f"{_name(one)}, {_choice(one)}" for one in (a, b))
    return Difference(ours, theirs, num_rows, dict(unjoined), tuple(cells), tuple(means), settings)


def _settings_of(result: Evaluation) -> dict[str, Any]:
    """Return how a result's queries were written and answered; files of earlier versions do not say their template."""
    written = {f"template.{key}": value for key, value in (result.prompt_template or {}).items()}
    return asdict(result.answering) | written


def tell_difference(item: PointDifference | MeanDifference) -> str:
    """Return the difference as a plain sentence, in points of a hundred."""
    where = tell_asked_with(item.shots)
    if isinstance(item, PointDifference):
        what = item.task
    else:
        what = item.tasks[0] if len(item.tasks) == 1 else f"mean of {len(item.tasks)} tasks"
    digits = deciding_digits(*(end and 100 * end for end in (item.low, item.high)))
    points = f"{100 * abs(item.difference):.{digits}f} points"
    if item.low is None or item.high is None:
        return f"{points} apart {where}, {what}; a single answer tells no difference"
    low, high = (item.low, item.high) if item.difference >= 0 else (-item.high, -item.low)
    interval = f"[{100 * low:z.{digits}f}, {100 * high:z.{digits}f}]".replace("-", MINUS)
    better = "B" if item.difference > 0 else "A"
    if item.low <= 0 <= item.high:
        lead = "both score the same" if item.difference == 0 else f"{better} is ahead by {points}"
        return f"no difference can be told {where}, {what}: {lead} {interval}"
    return f"{better} is better by {points} {interval} {where}, {what}"


def _name(result: Evaluation) -> str:
    return result.model if result.path is None else f"{result.model} ({result.path})"


def _choice(result: Evaluation) -> str:
    nearest = f", {result.num_nearest} of each query's own" if result.choose == "nearest" else ""
    return f"{result.choose} shots{nearest}"


def _place(result: Evaluation) -> str:
    return result.model if result.path is None else str(result.path)


def _group_rows(predictions: Sequence[Prediction]) -> dict[_DrawKey, _Answers]:
    """Return query -> answer of every (task, shots, draw) that was scored."""
    grouped: dict[_DrawKey, _Answers] = {}
    for p in predictions:
        grouped.setdefault((p.task, p.asked, p.draw), {})[p.query] = p
    return grouped


def _shots_of(result: Evaluation) -> dict[_DrawKey, str]:
    return {
        (curve.task, point.shots, draw.draw): draw.shots_sha256
        for curve in result.curves
        for point in curve.points
        for draw in point.draws
    }


def _metrics_of(result: Evaluation) -> dict[str, str]:
    return {curve.task: curve.metric for curve in result.curves}


def _tasks_with_macro_f1(result: Evaluation) -> set[str]:
    return {curve.task for curve in result.curves if any(MACRO_F1 in point.other_scores for point in curve.points)}


def _refuse_draw(
    key: _DrawKey,
    rows: tuple[Mapping[_DrawKey, _Answers], Mapping[_DrawKey, _Answers]],
    *,
    metrics: tuple[Mapping[str, str], Mapping[str, str]],
) -> str | None:
    """Return why a draw cannot be paired, as far as its key says; None if it can."""
    task, shots, _ = key
    for name, other, ours, theirs in (("A", "B", 0, 1), ("B", "A", 1, 0)):
        if task not in metrics[theirs]:
            return f"task '{task}' is in {name} alone"
        if key in rows[ours] and key not in rows[theirs]:
            scored = any(known[:2] == (task, shots) for known in rows[theirs])
            return f"the draw is in {name} alone" if scored else f"{other} has no score {tell_asked_with(shots)}"
    if metrics[0][task] != metrics[1][task]:
        return f"task '{task}' has another metric in each ({metrics[0][task]}, {metrics[1][task]})"
    return None


def _tell_other_shots(shots: Shots, *, is_one_seed: bool) -> str:
    """Return why a draw of the same number has other shots in each result."""
    if shots == FILL and is_one_seed:
        return "other shots fit (another template, tokenizer or limit of tokens, or other data)"
    return "other shots were drawn (another seed, other task data, or a tokenizer that drops other rows)"


def _share_queries(pairs: Sequence[_Drawn], unjoined: Counter[str]) -> list[_Drawn]:
    """Return both sides' answers to the queries that all draws of both have, and count the others; [] without any."""
    shared = set(pairs[0][0]).intersection(*(answers for pair in pairs for answers in pair))
    left_out = sum(len(answers) - len(shared) for pair in pairs for answers in pair)
    if left_out:
        unjoined[
            "the query was asked in one alone (other numbers of queries or tokens, another seed, or other data)"
        ] += left_out
    queries = [query for query in pairs[0][0] if query in shared]
    return [({q: one[q] for q in queries}, {q: other[q] for q in queries}) for one, other in pairs if queries]


def _pair_tables(pairs: Sequence[_Drawn], metric: str | None = None) -> _Pair:
    """Return both sides' scores, by the task's own metric or by one beside it."""

    def score(p: Prediction) -> float:
        return p.score if metric is None else (p.other_scores or {})[metric]

    queries = tuple(pairs[0][0])
    one, other = (
        Table(np.array([[score(pair[side][query]) for query in queries] for pair in pairs], dtype=np.float64), queries)
        for side in (0, 1)
    )
    return one, other


def _compare_others(pairs: Sequence[_Drawn], *, macro: bool) -> tuple[MetricDifference, ...]:
    """Return b - a by the metrics that all answers of both sides have beside the task's own; macro: macro-F1 too."""
    answers = [p for pair in pairs for side in pair for p in side.values()]
    found = []
    for metric in answers[0].other_scores or ():
        if all(metric in (p.other_scores or {}) for p in answers):
            a, b = _pair_tables(pairs, metric)
            interval = _differ({"": (a, b)})
            low, high = interval.ends
            means = float(a.scores.mean()), float(b.scores.mean())
            found.append(MetricDifference(metric, *means, interval.mean, low=low, high=high))
    if macro:
        one, other = (float(np.mean([_macro_f1(list(pair[side].values())) for pair in pairs])) for side in (0, 1))
        found.append(MetricDifference(MACRO_F1, one, other, other - one, low=None, high=None))
    return tuple(found)


def _macro_f1(answers: Sequence[Prediction]) -> float:
    return macro_f1([p.prediction for p in answers], answers=[p.answer for p in answers])


def _compare_point(task: str, shots: Shots, a: Table, b: Table) -> PointDifference:
    interval = _differ({task: (a, b)})
    num_draws, num_queries = a.scores.shape
    low, high = interval.ends
    means = float(a.scores.mean()), float(b.scores.mean())
    return PointDifference(task, shots, num_draws, num_queries, *means, interval.mean, low=low, high=high)


def _compare_mean(shots: Shots, tables: Mapping[_PointKey, _Pair]) -> MeanDifference:
    chosen = {task: pair for (task, k), pair in tables.items() if k == shots}
    interval = _differ(chosen)
    low, high = interval.ends
    return MeanDifference(shots, tuple(chosen), interval.mean, low=low, high=high)


def _differ(tables: Mapping[str, _Pair]) -> Interval:
    """Return the mean over tasks of b - a, with its interval."""
    return difference_interval([{task: Table(b.scores - a.scores, a.queries) for task, (a, b) in tables.items()}])
