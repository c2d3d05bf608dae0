"""Was this answer right: one score in [0, 1] for each answer, and what the majority answer would have scored."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Context, Decimal
from functools import lru_cache
from typing import Any

from manyicl.errors import UserError, suggest

METRICS = ("accuracy", "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "math_exact_match")

_ROUGE_TYPES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
_BESIDE = {
    "exact_match": ("token_f1",),
    "token_f1": ("exact_match",),
    "rouge_1": ("rouge_2", "rouge_l"),
    "rouge_2": ("rouge_1", "rouge_l"),
    "rouge_l": ("rouge_1", "rouge_2"),
}
# Families whose answer is one label or one number: half of its words right is not half right.
_INDIVISIBLE = frozenset({"classification", "nli", "math"})

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A hyphen is a sign only where it does not join two things: "5-3" ends in 3, "= -3" in -3.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])[-\u2212])?[$\u20ac\u00a3]?(?P<inner_sign>(?<=[$\u20ac\u00a3])[-\u2212])?"
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
)
# The thread's own decimal context must not decide whether two answers are equal.
_DECIMALS = Context(prec=60)


def score_answer(prediction: str, *, answer: str, metric: str) -> float:
    """Return the score in [0, 1] of `prediction` where `answer` is wanted.

    accuracy          the texts are equal, white space at their ends aside
    exact_match       the texts are equal after `normalize_squad`
    token_f1          F1 of the words they share, as SQuAD counts it
    rouge_1, _2, _l   F-measure of the rouge-score package, stemmed; 0 where either text has no word
    math_exact_match  both end in the same number (`final_number`); no number is never right

    Raises:
        UserError: `metric` is none of these.
    """
    if metric == "accuracy":
        return float(prediction.strip() == answer.strip())
    if metric == "exact_match":
        return float(normalize_squad(prediction) == normalize_squad(answer))
    if metric == "token_f1":
        return _token_f1(prediction, answer)
    if metric in _ROUGE_TYPES:
        rouge_type = _ROUGE_TYPES[metric]
        return float(_rouge_scorer(rouge_type).score(answer, prediction)[rouge_type].fmeasure)
    if metric == "math_exact_match":
        number = final_number(prediction)
        return float(number is not None and number == final_number(answer))
    raise _unknown_metric(metric)


def best_score(prediction: str, *, answers: Sequence[str], metric: str) -> float:
    """Return the highest score in [0, 1] of `prediction` against any of the right `answers` (SQuAD's rule).

    Raises:
        UserError: `metric` is unknown.
    """
    return max(score_answer(prediction, answer=answer, metric=metric) for answer in answers)


def normalize_squad(text: str) -> str:
    """Return `text` in lower case without punctuation, articles and surplus white space.

    The steps and their order are those of the official SQuAD v1.1 evaluation script (Rajpurkar et al. 2016). Only ASCII
    punctuation is dropped, as there.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def final_number(text: str) -> Decimal | None:
    """Return the number that `text` arrives at, or None where it has none.

    After the last `####` (how GSM8K marks its answers) it is the first number, None if none follows; without a mark it
    is the last number of the text. Commas between thousands, a currency sign and a percent sign are dropped: `$1,234.5`
    is 1234.5 and `50%` is 50. A fraction is its quotient, exact where decimals can be (`1/2` is 0.5), else rounded to
    60 digits: `1/3` equals `2/6`, not `0.33`. A division by zero is None. Powers of ten (`1e3`) are not read as such.
    """
    _, mark, marked = text.rpartition("####")
    matches = list(_NUMBER.finditer(marked if mark else text))
    if not matches:
        return None
    match = matches[0] if mark else matches[-1]
    number = Decimal(match["number"].replace(",", ""))
    if match["sign"] or match["inner_sign"]:
        number = number.copy_negate()
    if match["divisor"] is None:
        return number
    divisor = Decimal(match["divisor"])
    return _DECIMALS.divide(number, divisor) if divisor else None


def other_metrics(metric: str, *, family: str) -> tuple[str, ...]:
    """Return the metrics that stand beside `metric` in a report, each one that `score_answer` knows.

    Exact match and token F1 stand beside each other, and the three ROUGE scores; but nothing stands beside exact match
    in a `family` whose answers are labels or numbers.

    Raises:
        UserError: `metric` is unknown.
    """
    if metric not in METRICS:
        raise _unknown_metric(metric)
    if metric == "exact_match" and family in _INDIVISIBLE:
        return ()
    return _BESIDE.get(metric, ())


def macro_f1(predictions: Sequence[str], *, answers: Sequence[str]) -> float:
    """Return the unweighted mean over classes of the F1 of each, in [0, 1].

    The classes are those present in `answers` or in `predictions`, white space at their ends aside, so that an answer
    that is no label at all costs too. A class whose F1 is 0 / 0 counts 0 (scikit-learn's `zero_division=0`).

    Raises:
        ValueError: no answers, or not one prediction for each.
    """
    if not answers or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers; macro-F1 needs one for each")
    from sklearn.metrics import f1_score  # slow to import, and needed by reports alone

    wanted = [answer.strip() for answer in answers]
    given = [prediction.strip() for prediction in predictions]
    # Class numbers, not texts: scikit-learn guesses a column's type from its values.
    number_of = {name: number for number, name in enumerate(sorted({*wanted, *given}))}
    return float(
        f1_score(
            [number_of[name] for name in wanted],
            [number_of[name] for name in given],
            labels=list(number_of.values()),
            average="macro",
            zero_division=0,
        )
    )


def majority_answer(train_answers: Sequence[str]) -> str | None:
    """Return the most common answer, the first in the alphabet among equals; None where there are none."""
    counts = Counter(train_answers)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


def majority_score(test_answers: Sequence[Sequence[str]], *, train_answers: Sequence[str], metric: str) -> float | None:
    """Return the mean score over test rows of always giving the majority answer of the train split.

    test_answers: the right answers of each row (`Example.answers`); the best of them counts.

    None where either split is empty: a score that was not measured is never 0.

    Raises:
        UserError: `metric` is unknown.
    """
    if metric not in METRICS:
        raise _unknown_metric(metric)
    majority = majority_answer(train_answers)
    if majority is None or not test_answers:
        return None
    counts = Counter(tuple(answers) for answers in test_answers)  # each distinct set is scored once
    total = sum(count * best_score(majority, answers=answers, metric=metric) for answers, count in counts.items())
    return total / len(test_answers)


def chance_score(
    choices: Sequence[Sequence[str]], *, test_answers: Sequence[Sequence[str]], metric: str
) -> float | None:
    """Return the mean score over test rows of drawing one of a row's choices by dice: 1 / choices for one right answer.

    choices: what each row's answer is chosen from, () for an open answer; its order is that of `test_answers`, the
    right answers of each row. None if there are no rows, or a row's answer is open.

    Raises:
        UserError: `metric` is unknown.
    """
    if metric not in METRICS:
        raise _unknown_metric(metric)
    if not choices or not all(choices):
        return None
    rows = Counter((tuple(given), tuple(right)) for given, right in zip(choices, test_answers, strict=True))
    total = 0.0
    for (given, right), count in rows.items():  # each distinct row is scored once
        total += count * sum(best_score(choice, answers=right, metric=metric) for choice in given) / len(given)
    return total / len(choices)


def _token_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words shared, repeats counted; two empty texts agree (as in the SQuAD v2.0 script)."""
    given, wanted = normalize_squad(prediction).split(), normalize_squad(answer).split()
    if not given or not wanted:
        return float(given == wanted)
    num_shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * num_shared / (len(given) + len(wanted))


@lru_cache(maxsize=len(_ROUGE_TYPES))
def _rouge_scorer(rouge_type: str) -> Any:
    from rouge_score import rouge_scorer  # takes seconds to import; most tasks never need it

    return rouge_scorer.RougeScorer([rouge_type], use_stemmer=True)


def _unknown_metric(metric: str) -> UserError:
    return UserError(f"metric '{metric}' is unknown{suggest(metric, METRICS)}")
