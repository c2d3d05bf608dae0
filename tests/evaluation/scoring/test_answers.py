"""Scores of answers, against literals that a reader can check by eye."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import tokenizers

from manyicl.errors import UserError
from manyicl.evaluation.scoring.answers import (
    best_score,
    chance_score,
    macro_f1,
    majority_answer,
    majority_score,
    normalize_answer,
    normalize_squad,
    other_metrics,
    rouge_words,
    score_answer,
)
from manyicl.inference.answering.math_answers import is_same_answer
from manyicl.tasks.settings import METRICS


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Denver Broncos!", "denver broncos"),
        ("  a  cat,\tan owl \n", "cat owl"),
        ("Theatre and another", "theatre and another"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),  # punctuation goes, nothing takes its place
        ("a.", ""),
        ("", ""),
    ],
)
def test_normalize_squad(text: str, normal: str) -> None:
    assert normalize_squad(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "metric", "score"),
    [
        (" positive\n", "positive", "accuracy", 1.0),
        ("Positive", "positive", "accuracy", 0.0),
        ("The Denver Broncos.", "denver broncos", "exact_match", 1.0),
        ("Denver", "denver broncos", "exact_match", 0.0),
        ("Denver", "the Denver Broncos", "token_f1", 2 / 3),  # precision 1, recall 1/2
        ("to be or not to be", "to be", "token_f1", 0.5),  # 2 words shared: precision 1/3, recall 1
        ("red red", "red", "token_f1", 2 / 3),  # a repeated word is shared once
        ("cat", "dog", "token_f1", 0.0),
        ("", "dog", "token_f1", 0.0),
        ("dog", "", "token_f1", 0.0),
        ("5", "-5", "exact_match", 0.0),  # numbers keep their sign and their point
        ("35", "3.5", "exact_match", 0.0),
        ("3.50", "3.5", "exact_match", 1.0),
        ("\u22125", "-5", "exact_match", 1.0),
        ("1,234", "1234", "exact_match", 1.0),
        ("7", "007", "exact_match", 0.0),  # a code
        ("it is 35 km", "it is 3.5 km", "token_f1", 0.75),
        ("-", "+", "exact_match", 0.0),  # nothing would be left of either
        ("the", "!", "token_f1", 0.0),
        ("A.", "A", "exact_match", 1.0),  # an article, and the name of an option
        ("C", "C++", "exact_match", 0.0),
        ("C#", "C++", "exact_match", 0.0),
        ("B", "B-", "exact_match", 0.0),
        ("x<y", "x>y", "exact_match", 0.0),
        (">", ">=", "exact_match", 0.0),
        ("x!=1", "x=1", "exact_match", 0.0),
        ("1012", "10-12", "exact_match", 0.0),
        ("330", "3:30", "exact_match", 0.0),
        ("12", "1/2", "exact_match", 0.0),
        ("the cat sat", "the cat ran", "rouge_1", 2 / 3),
        ("the cat sat", "the cat ran", "rouge_2", 0.5),
        ("sat the cat", "the cat sat", "rouge_l", 2 / 3),
        ("jumping", "jumps", "rouge_1", 1.0),  # stemmed
        ("", "cat", "rouge_l", 0.0),
        ("so 6 x 7 = 42.", "#### 42", "math_exact_match", 1.0),
        ("41", "#### 42", "math_exact_match", 0.0),
        ("$1,200.00", "1200", "math_exact_match", 1.0),
        ("none", "none", "math_exact_match", 1.0),  # the answer's own text
        ("no number", "5", "math_exact_match", 0.0),
        ("日本", "日本", "rouge_l", 1.0),  # Japanese, character by character
        ("日本語", "日本", "rouge_1", 0.8),
        ("красный дом", "дом", "rouge_1", 2 / 3),
        ("jumping caf\u00e9", "jumps caf\u00e9", "rouge_2", 1.0),  # English words are stemmed there too
    ],
)
def test_score_answer(prediction: str, answer: str, metric: str, score: float) -> None:
    assert score_answer(prediction, answer=answer, metric=metric) == pytest.approx(score)


def test_unknown_metric_is_answered_with_a_near_one() -> None:
    with pytest.raises(UserError, match="metric 'acuracy' is unknown; did you mean 'accuracy'"):
        score_answer("a", answer="a", metric="acuracy")
    with pytest.raises(UserError, match="did you mean 'rouge_l'"):
        other_metrics("rouge_L", family="summarization")
    with pytest.raises(UserError, match="unknown"):
        majority_score([], train_answers=[], metric="bleu")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("3.0", "3"),
        ("The total is 1,234.5.", "1234.5"),
        ("12,345,678", "12345678"),
        ("1,2345", "2345"),  # no thousands
        ("either 1, 2, 3", "3"),
        ("it fell to -3", "-3"),
        ("it fell to \u22123", "-3"),
        ("5-3", "3"),  # a range, not a sign
        ("(5)-3", "3"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("-3/4 cup", "-0.75"),
        ("6/2", "3"),
        ("5 apples and 7 pears", "7"),
        ("first 3 #### 8 of 9", "8"),
        ("#### 1 or rather #### 2", "2"),
        ("5 + 5 = 10\n#### 10 dollars", "10"),
    ],
)
def test_a_text_arrives_at_its_last_number_or_the_one_after_its_mark(text: str, number: str) -> None:
    assert is_same_answer(text, answer=number)


@given(st.text(alphabet="aAbtheneT .,!?'\"()x", max_size=30))
def test_ordinary_words_are_normalised_as_squad_does(text: str) -> None:
    assert normalize_answer(text) == normalize_squad(text) or not normalize_squad(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "สวัสดี",
            ["ส", "วั", "ส", "ดี"],
        ),  # Thai: letters, with their marks
        (
            "हिन्दी भाषा",
            ["हिन्दी", "भाषा"],
        ),  # Hindi: words
        ("العربية!", ["العربية"]),
        ("naïve, Running", ["naïve", "run"]),
        ("東京2024", ["東", "京", "2024"]),
        ("\u20ac \u2014 !", []),
    ],
)
def test_words_of_rouge(text: str, words: list[str]) -> None:
    assert rouge_words(text) == words


@given(st.text(alphabet="abRunig XY'-_.,\u2019\u20143", max_size=40))
def test_words_of_rouge_in_english_are_those_of_its_package(text: str) -> None:
    assert rouge_words(text) == tokenizers.DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize("text", ["", "none", "12 ####", "12 #### unknown", "1/0", "-", "$"])
def test_a_text_that_arrives_at_no_number(text: str) -> None:
    assert not any(is_same_answer(text, answer=number) for number in ("0", "1", "12"))


def test_fractions_without_an_end_equal_their_like() -> None:
    with localcontext(prec=3):  # a caller's rounding changes nothing
        assert is_same_answer("1/3", answer="2/6")
        assert not is_same_answer("0.333", answer="1/3")
    assert not is_same_answer("0.33", answer="1/3")


def test_other_metrics() -> None:
    assert other_metrics("exact_match", family="qa") == ("token_f1",)
    assert other_metrics("token_f1", family="qa") == ("exact_match",)
    assert other_metrics("rouge_l", family="summarization") == ("rouge_1", "rouge_2")
    assert other_metrics("exact_match", family="classification") == ()
    assert other_metrics("accuracy", family="classification") == ()
    assert other_metrics("math_exact_match", family="math") == ()


@pytest.mark.parametrize("metric", METRICS)
def test_other_metrics_can_be_scored_and_are_other(metric: str) -> None:
    others = other_metrics(metric, family="qa")
    assert set(others) <= set(METRICS) - {metric}


def test_macro_f1_by_hand() -> None:
    # yes: precision 2/3, recall 1, F1 0.8; no: precision 1, recall 1/2, F1 2/3
    assert macro_f1(["yes", "yes", "yes", "no"], answers=["yes", "yes", "no", "no"]) == pytest.approx((0.8 + 2 / 3) / 2)
    # "perhaps" is a class of its own, with F1 0
    assert macro_f1(["yes", "perhaps "], answers=["yes", "yes"]) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1(["a", "b"], answers=["b", "a"]) == 0.0


def test_macro_f1_of_many_rare_classes_does_not_warn() -> None:
    names = [f"label {number}" for number in range(60)]
    assert macro_f1(names, answers=names) == 1.0


def test_macro_f1_needs_a_prediction_for_each_answer() -> None:
    with pytest.raises(ValueError, match="0 predictions for 0 answers"):
        macro_f1([], answers=[])
    with pytest.raises(ValueError, match="1 predictions for 2 answers"):
        macro_f1(["a"], answers=["a", "b"])


def test_majority_answer() -> None:
    assert majority_answer(["no", "yes", "no"]) == "no"
    assert majority_answer(["yes", "no"]) == "no"  # the first in the alphabet
    assert majority_answer([]) is None


def test_majority_score() -> None:
    assert (
        majority_score([("no",), ("yes",), ("no",), ("no",)], train_answers=["no", "no", "yes"], metric="accuracy")
        == 0.75
    )
    assert majority_score([("a red car",), ("car",)], train_answers=["car"], metric="token_f1") == pytest.approx(
        (2 / 3 + 1) / 2
    )
    assert majority_score([], train_answers=["no"], metric="accuracy") is None
    assert majority_score([("no",)], train_answers=[], metric="accuracy") is None


ANSWERS = st.text(max_size=20) | st.from_regex(r"[ab 0-9,./#$-]{0,20}", fullmatch=True)


@pytest.mark.slow
@given(prediction=ANSWERS, answer=ANSWERS)
def test_scores_lie_between_0_and_1(prediction: str, answer: str) -> None:
    for metric in METRICS:
        assert 0 <= score_answer(prediction, answer=answer, metric=metric) <= 1


@given(ANSWERS)
def test_an_answer_matches_itself(text: str) -> None:
    for metric in ("accuracy", "exact_match", "token_f1"):
        assert score_answer(text, answer=text, metric=metric) == 1
    if any(map(str.isalnum, text.rpartition("####")[2])):  # "", "####" and "0####", which was cut off, are no answers
        assert score_answer(text, answer=text, metric="math_exact_match") == 1


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_written_numbers_are_read_back(number: Decimal) -> None:
    for text in (f"{number}", f"The answer is {number:,}.", f"1 + 1, so\n#### ${number:,} in all 7"):
        assert is_same_answer(text, answer=str(number))


def test_the_best_of_several_right_answers_counts() -> None:
    assert best_score("three", answers=("3", "three"), metric="accuracy") == 1.0
    assert best_score("a red car", answers=("bus", "car"), metric="token_f1") == pytest.approx(2 / 3)
    assert majority_score([("4", "3"), ("5",)], train_answers=["3"], metric="accuracy") == 0.5


def test_chance_is_the_mean_over_rows_of_one_in_so_many_options():
    """Review A10: rows with options of their own, for which the majority answer is no yardstick."""
    choices = [("a", "b"), ("c", "d", "e", "f")]
    assert chance_score(choices, test_answers=[("a",), ("d",)], metric="accuracy") == (1 / 2 + 1 / 4) / 2
    assert chance_score(choices, test_answers=[("a",), ("d", "e")], metric="accuracy") == (1 / 2 + 2 / 4) / 2
    assert chance_score([("a", "b"), ()], test_answers=[("a",), ("z",)], metric="exact_match") is None
    assert chance_score([], test_answers=[], metric="accuracy") is None
