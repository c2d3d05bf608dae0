"""Mathematical answers are compared by value, GSM8K's and those like MATH's, against literals (B11)."""

from __future__ import annotations

import pytest

from manyicl.inference.answering.math_answers import is_same_answer


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("\\frac34", "3/4"),
        ("0.75", "\\frac{3}{4}"),
        ("The answer is \\boxed{\\dfrac{3}{4}}.", "\\frac{3}{4}"),
        ("(2,3)", "(2, 3)"),
        ("so it is $(2, 3)$", "(2,3)"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("0.5", "50%"),
        ("1,234", "1234"),
        ("\\$1{,}234.50", "1234.5"),
        ("5 + 5 = 10\n#### 10", "10"),
        ("x+1", "x + 1"),
        ("x = 5", "5"),
        ("\\{1,2\\}", "\\{2, 1\\}"),
        ("1, 2", "2,1"),
        ("3 \\times 10^{6}", "3000000"),
        ("10", "so 2*5 = 10"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("(-\\infty, 3]", "\\left(-\\infty, 3\\right]"),
        ("+", "+"),
        ("the sign is +", "+"),
        ("1\\frac{1}{2}", "1.5"),
        ("-\\frac{1}{2}", "-0.5"),
        ("\\frac{-1}{2}", "-0.5"),
        ("so 6 x 7 = 42.", "#### 42"),
        ("90^\\circ", "90"),
        ("$18", "18"),
        ("18 dollars", "18"),
        ("none", "none"),
        ("(1/2, 3)", "(0.5,3)"),
        ("\\text{C}", "C"),
        ("(A)", "(A)"),
        ("The total (1,234) is right", "1234"),
        ("$5$", "5"),
    ],
)
def test_same(prediction: str, answer: str) -> None:
    assert is_same_answer(prediction, answer=answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("4", "\\frac{3}{4}"),
        ("3", "\\frac{3}{4}"),
        ("3", "(2, 3)"),
        ("(2, 3)", "3"),
        ("5", "-5"),
        ("35", "3.5"),
        ("[2,3)", "(2,3)"),
        ("(3,2)", "(2,3)"),
        ("+", "-"),
        ("C++", "C"),
        ("2", "\\sqrt{2}"),
        ("2", "2\\pi"),
        ("x^2", "2"),
        ("x^{2}", "2"),
        ("\\sqrt{3}", "3"),
        ("x-1", "x+1"),
        ("0.33", "1/3"),
        ("", "5"),
        ("none", "5"),
        ("1", "1, 2"),
        ("", ""),
        ("5", "1/0"),
        ("\\frac{3}{4}", "4"),
        ("2^{10}", "10"),
        ("6", "3 \\times 10^{6}"),
        ("A", "B"),
    ],
)
def test_not_the_same(prediction: str, answer: str) -> None:
    assert not is_same_answer(prediction, answer=answer)


@pytest.mark.slow
def test_a_long_text_takes_no_time():
    text = "so (" * 500 + "1, " * 2000 + r"\frac{" * 500 + "7"
    assert is_same_answer(text, answer="7")
