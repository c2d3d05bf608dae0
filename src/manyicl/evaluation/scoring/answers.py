"""Was this answer right: one score in [0, 1] for each answer, and what the majority answer would have scored.

`METRICS` is the one list of metrics: a task names its main one, and `other_metrics` says which are reported beside it.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from manyicl.errors import UserError, suggest
from manyicl.inference import is_same_answer
from manyicl.tasks import METRICS

# A metric of all answers together, reported beside accuracy if labels are fixed.
MACRO_F1 = "macro_f1"

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
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A number that stands alone: in no word, version, date or address.
_NUMBER = re.compile(
    rf"(?<![a-z0-9.,/])(?:(?<![\w).])(?P<sign>[-\u2212+]))?[$\u20ac\u00a3]?(?P<inner>[-\u2212])?"
    rf"(?P<number>{_DECIMAL})(?P<divisor>/[0-9]+)?(?![0-9]|[.,/][0-9])"
)
# Marks that are part of what an answer says: C++, C#, A+, AB-, x<y, x!=1, 2^n, and between digits 2020-21, 3:30, 1.2.3.
_MARKS = re.compile(
    r"[+<>^]|(?<=[a-z])#|(?<=\S)=(?=\S)|!(?==)|(?<=\b[a-z])-(?![\w-])|(?<=\b[a-z]{2})-(?![\w-])"
    r"|(?<=[0-9])[.,/:*-](?=[0-9])"
)
# Letters of scripts that put no spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_JOINERS = "\u200c\u200d"  # inside words of Persian and Indic scripts
_KEPT = {ord(mark): 0xE000 + place for place, mark in enumerate("+-<>^#=!.,/:*")}
_KEPT_BACK = {there: mark for mark, there in _KEPT.items()}


def score_answer(prediction: str, *, answer: str, metric: str) -> float:
    """Return the score in [0, 1] of `prediction` if `answer` is right.

    accuracy          the texts are equal, white space at their ends aside
    exact_match       the texts are equal after `normalize_answer`
    token_f1          F1 of the words they share, as SQuAD counts it, after `normalize_answer`
    rouge_1, _2, _l   F-measure of the rouge-score package, stemmed; words of any script (`rouge_words`)
    math_exact_match  both arrive at the same value, or the same text if the answer has no value (math_answers.py)

    Raises:
        UserError: `metric` is none of these.
    """
    if metric == "accuracy":
        return float(prediction.strip() == answer.strip())
    if metric == "exact_match":
        return float(normalize_answer(prediction) == normalize_answer(answer))
    if metric == "token_f1":
        return _token_f1(prediction, answer)
    if metric in _ROUGE_TYPES:
        rouge_type = _ROUGE_TYPES[metric]
        return float(_rouge_scorer(rouge_type).score(answer, prediction)[rouge_type].fmeasure)
    if metric == "math_exact_match":
        return float(is_same_answer(prediction, answer=answer))
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


def normalize_answer(text: str) -> str:
    """Return `normalize_squad(text)`, except that numbers stay what they are and a short answer keeps its marks.

    SQuAD drops all punctuation, which makes `-5` and `5`, `3.5` and `35`, `C++` and `C` equal, and `+` and `-` nothing.
    Here a number keeps its sign and its decimal point (`3.50` and `+3.5` are 3.5), and the marks in `_MARKS` stay. Of a
    text that is one article the article stays, and one without letters and digits stays as it is.
    """
    lower = text.lower()
    if not any(character.isalnum() for character in lower):
        return " ".join(lower.split())
    marked = _MARKS.sub(lambda match: match[0].translate(_KEPT), _NUMBER.sub(_plain_number, lower))
    normal = normalize_squad(marked) or " ".join(marked.translate(_DROP_PUNCTUATION).split())
    return normal.translate(_KEPT_BACK)


def _plain_number(match: re.Match[str]) -> str:
    """Return a number without separators and needless zeros, in characters that are not dropped."""
    number = match["number"].replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".") or "0"
        number = f"0{number}" if number.startswith(".") else number
    is_negative = match["sign"] in ("-", "\u2212") or match["inner"]
    return f"{'-' if is_negative else ''}{number}{match['divisor'] or ''}".translate(_KEPT)


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


def score_others(prediction: str, *, answers: Sequence[str], metric: str, family: str) -> dict[str, float]:
    """Return the scores of `prediction` by the metrics that stand beside `metric`, the best of all right answers each.

    Raises:
        UserError: `metric` is unknown.
    """
    metrics = other_metrics(metric, family=family)
    return {other: best_score(prediction, answers=answers, metric=other) for other in metrics}


def macro_f1(predictions: Sequence[str], *, answers: Sequence[str]) -> float:
    """Return the unweighted mean over classes of the F1 of each, in [0, 1].

    The classes are those present in `answers` or in `predictions`, white space at their ends aside, so that an answer
    that is not a label costs too. This is scikit-learn's `f1_score(average="macro")`.

    Raises:
        ValueError: no answers, or not one prediction for each.
    """
    if not answers or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers; macro-F1 needs one for each")
    wanted = [answer.strip() for answer in answers]
    given = [prediction.strip() for prediction in predictions]
    right = Counter(answer for answer, prediction in zip(wanted, given, strict=True) if answer == prediction)
    # Of one class: F1 = 2 right / (its answers + its predictions). Every class here has one or the other.
    num_of_class = Counter(wanted) + Counter(given)
    return sum(2 * right[name] / count for name, count in sorted(num_of_class.items())) / len(num_of_class)


def majority_answer(train_answers: Sequence[str]) -> str | None:
    """Return the most common answer, the first in the alphabet among equals; None if there are none."""
    counts = Counter(train_answers)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


def majority_score(test_answers: Sequence[Sequence[str]], *, train_answers: Sequence[str], metric: str) -> float | None:
    """Return the mean score over test rows of always giving the majority answer of the train split.

    test_answers: the right answers of each row (`Example.answers`); the best of them counts.

    None if either split is empty: a score that was not measured is never 0.

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
    given, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not given or not wanted:
        return float(given == wanted)
    num_shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * num_shared / (len(given) + len(wanted))


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE counts, in lower case, English ones longer than three letters stemmed (Porter).

    A text without letters or digits beyond ASCII has just the words of the rouge-score package. In others a word is a
    run of letters and digits with the marks on them, in Unicode form NFKC; scripts that put no spaces between words
    (Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer) count letter by letter.
    """
    if not any(character.isalnum() for character in text if not character.isascii()):
        words: list[str] = _english_words().tokenize(text)
        return words
    found = _split_words(unicodedata.normalize("NFKC", text).lower())
    return [w for word in found for w in (_english_words().tokenize(word) if word.isascii() else [word])]


def _split_words(text: str) -> list[str]:
    words: list[str] = []
    is_open = takes_marks = False  # may the last word go on with a letter, or with a mark?
    for character in text:
        if character in _JOINERS:
            continue
        is_letter, is_unspaced = character.isalnum(), _UNSPACED.match(character) is not None
        is_mark = unicodedata.category(character).startswith("M")
        if (is_mark and takes_marks) or (is_letter and is_open and not is_unspaced):
            words[-1] += character
            continue
        if is_letter:
            words.append(character)
        takes_marks, is_open = is_letter, is_letter and not is_unspaced
    return words


@lru_cache(maxsize=1)
def _english_words() -> Any:
    from rouge_score import tokenizers  # takes seconds to import; most tasks never need it

    return tokenizers.DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=len(_ROUGE_TYPES))
def _rouge_scorer(rouge_type: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([rouge_type], tokenizer=SimpleNamespace(tokenize=rouge_words))


def _unknown_metric(metric: str) -> UserError:
    return UserError(f"metric '{metric}' is unknown{suggest(metric, METRICS)}")
