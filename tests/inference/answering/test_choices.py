"""Which known answer is chosen, under each normalisation, on numbers that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from manyicl.errors import UserError
from manyicl.inference.answering.choices import weigh_all, weigh_choices
from manyicl.inference.answering.settings import AnswerSettings, check_min_confidence, is_unsure

# Text and ids with the terminator; "ja" has 2 characters and bytes, "größer" 6 characters and 8 bytes.
CHOICES = [("ja", [5, 2]), ("größer", [5, 6, 7, 2]), ("no", [8, 2])]
NATS = np.array([2.0, 6.0, 2.0])


@pytest.mark.parametrize(
    ("normalize", "best", "scores"),
    [
        ("none", 0, [-2.0, -6.0, -2.0]),  # a tie goes to the first
        ("tokens", 0, [-1.0, -1.5, -1.0]),
        ("characters", 0, [-1.0, -1.0, -1.0]),
        ("bytes", 1, [-1.0, -0.75, -1.0]),
    ],
)
def test_the_highest_log_probability_per_unit_of_length_is_chosen(normalize, best, scores):
    weighed = weigh_choices(NATS, CHOICES, normalize=normalize)
    assert weighed.best == best
    softmax = np.exp(scores) / np.exp(scores).sum()
    assert weighed.probabilities_O == pytest.approx(softmax)
    assert weighed.confidence == pytest.approx(softmax[best])


def test_confidence_is_the_part_of_the_likelihood_of_all_choices():
    weighed = weigh_choices(-np.log([0.3, 0.1]), [("a", [5, 2]), ("b", [6, 2])])
    assert weighed.probabilities_O == pytest.approx([0.75, 0.25])
    assert weigh_choices(np.array([3000.0]), [("a", [5, 2])]).confidence == 1.0  # exp(-3000) is 0


def test_a_choice_without_letters_is_not_divided_by_zero():
    assert weigh_choices(np.array([1.0, 2.0]), [("", [2]), ("b", [6, 2])], normalize="characters").best == 0


@pytest.mark.parametrize("normalize", ["none", "bytes"])
def test_queries_are_weighed_together_as_each_alone(normalize):
    other = [("a", [5, 2]), ("b", [6, 2])]
    nats, choices = [NATS, np.array([0.5, 0.25]), NATS[::-1]], [CHOICES, other, CHOICES]
    free = [np.array([one, one / 2]) for one in nats]
    for given in (None, free):
        found = weigh_all(nats, choices, normalize=normalize, free=given)
        for place, (one, pairs) in enumerate(zip(nats, choices, strict=True)):
            alone = weigh_choices(one, pairs, normalize=normalize, free_SO=None if given is None else given[place])
            assert found[place].best == alone.best
            assert found[place].probabilities_O.tolist() == alone.probabilities_O.tolist()


def test_an_unknown_normalisation_and_an_impossible_threshold_are_refused():
    with pytest.raises(UserError, match="normalize=words: is unknown; known: none, tokens, characters, bytes"):
        AnswerSettings(normalize="words")
    with pytest.raises(UserError, match=r"min_confidence=1\.5: is not a probability"):
        check_min_confidence(1.5, has_confidence=True)
    with pytest.raises(UserError, match=r"min_confidence=0\.8: generated answers have no confidence"):
        check_min_confidence(0.8, has_confidence=False)


def test_an_answer_is_unsure_below_the_threshold_only():
    assert [is_unsure(confidence, 0.8) for confidence in (0.79, 0.8, None)] == [True, False, True]
    assert not is_unsure(0.1, None)


def test_contextual_calibration_takes_away_what_the_shots_alone_make_likely():
    """Zhao et al. 2021: after the shots "yes" has 0.8 of any input; 0.7 after this one speaks for "no"."""
    choices = [("yes", [5, 2]), ("no", [6, 2])]
    free = -np.log([[0.8, 0.2], [0.4, 0.1], [0.8, 0.2]])  # the second is normalised: 0.8 and 0.2 too
    weighed = weigh_choices(-np.log([0.7, 0.3]), choices, free_SO=free)
    assert weighed.best == 1
    assert weighed.probabilities_O == pytest.approx([0.875 / 2.375, 1.5 / 2.375])  # 0.7 / 0.8 and 0.3 / 0.2
    assert weigh_choices(-np.log([0.7, 0.3]), choices).best == 0
    with pytest.raises(UserError, match="calibrate=contextual: also takes away what length does"):
        AnswerSettings(calibrate="contextual", normalize="bytes")
