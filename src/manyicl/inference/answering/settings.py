"""How a query is answered: the settings that eval, compare, ask and the service share.

Nothing here needs torch: `check` and `diff` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from manyicl.errors import UserError, check_list, take_number, take_whole

Normalize = Literal["none", "tokens", "characters", "bytes"]
Calibrate = Literal["none", "contextual"]
MOST_TEMPERATURE = 10.0
# The settings of answers that are chosen among known ones, and of generated answers.
_OF_CHOSEN = ("normalize", "calibrate")
_OF_GENERATED = ("max_new_tokens", "stop", "temperature", "top_p", "samples")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How one answer is generated."""

    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    temperature: float = 0.0
    """What logits are divided by before a token is sampled; 0: the likeliest token is taken."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together are sampled from (Holtzman et al. 2020)."""
    seed: int = 0
    """Decides what is sampled, together with the prompt and `sample`."""
    sample: int = 0
    """Number of the sample, from 0: samples of one prompt differ."""


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How a query is answered.

    Raises:
        UserError: a value is not one of those that its setting knows.
    """

    normalize: Normalize = "none"
    """What the log-probability of a known answer is divided by before the highest is chosen: nothing, or the answer's
    length in tokens (terminator included), characters or bytes. lm-evaluation-harness calls the accuracy of `none` acc,
    of `characters` acc_norm and of `bytes` acc_bytes."""
    calibrate: Calibrate = "none"
    """`contextual` divides the probability of each known answer by its mean probability after inputs without content,
    after the same shots (Zhao et al. 2021, arXiv 2102.09690): what the shots alone make likely no longer counts."""
    max_new_tokens: int | None = None
    """Most tokens of a generated answer. Default: as many as the longest train answer has, at most 256."""

    stop: tuple[str, ...] = ()
    """Texts that end a generated answer and are not part of it, beside the terminator."""
    temperature: float = 0.0
    """What logits are divided by before a token of a generated answer is sampled. 0: the likeliest token (greedy)."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together are sampled from (nucleus sampling)."""
    samples: int = 1
    """How often an answer is generated; the answer that most samples give is taken (self-consistency)."""

    def __post_init__(self) -> None:
        check_list("stop", self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))  # JSON and TOML have lists
        if self.normalize not in get_args(Normalize):
            known = ", ".join(get_args(Normalize))
            raise UserError(f"normalize={self.normalize}: is unknown; known: {known}")
        if self.calibrate not in get_args(Calibrate):
            raise UserError(f"calibrate={self.calibrate}: is unknown; known: {', '.join(get_args(Calibrate))}")
        if self.calibrate != "none" and self.normalize != "none":
            raise UserError(
                f"calibrate={self.calibrate}: also takes away what length does, so it does not go with"
                f" normalize={self.normalize}; leave one out"
            )
        object.__setattr__(self, "samples", take_whole("samples", self.samples))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, take_number(name, getattr(self, name)))
        if self.max_new_tokens is not None:
            object.__setattr__(self, "max_new_tokens", take_whole("max_new_tokens", self.max_new_tokens))
            if self.max_new_tokens < 1:
                raise UserError(f"max_new_tokens={self.max_new_tokens}: an answer needs at least 1 token")
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise UserError(f"temperature={self.temperature:g}: give a number from 0 (greedy) to {MOST_TEMPERATURE:g}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p:g}: is not a probability above 0; give one up to 1, which keeps all")
        if self.samples < 1 or (self.samples > 1 and not self.temperature):
            raise UserError(
                f"samples={self.samples}: needs at least 1, and for more a `temperature` above 0, or all are alike"
            )
        if not all(self.stop):
            raise UserError("stop='': an empty text ends every answer at once; give the text that ends one")

    @property
    def is_plain(self) -> bool:
        """Whether answers are generated greedily up to their terminator."""
        return not self.temperature and not self.stop

    def idle(self, *, are_chosen: bool) -> list[str]:
        """Return the settings that are not the default's and change nothing.

        are_chosen: whether answers are chosen among known ones; else they are generated.
        """
        greedy = () if self.temperature else ("top_p",)
        idle = _OF_GENERATED if are_chosen else (*_OF_CHOSEN, *greedy)
        return [name for name in idle if getattr(self, name) != getattr(DEFAULT_ANSWERS, name)]

    def decodings(self, seed: int) -> list[Decoding]:
        """Return how each sample of an answer is generated."""
        return [
            Decoding(self.stop, temperature=self.temperature, top_p=self.top_p, seed=seed, sample=sample)
            for sample in range(self.samples)
        ]


DEFAULT_ANSWERS = AnswerSettings()


def check_min_confidence(min_confidence: float | None, *, has_confidence: bool) -> None:
    """Refuse a threshold that is not a probability, or that no answer can reach.

    has_confidence: whether answers have one: they are chosen among known ones, or several samples vote.

    Raises:
        UserError: it is below 0 or above 1, or answers are generated.
    """
    if min_confidence is None:
        return
    given: Any = min_confidence  # also one of numpy's
    if not isinstance(given, Real) or not 0 <= float(given) <= 1:
        raise UserError(f"min_confidence={min_confidence!r}: is not a probability; give one from 0 to 1, such as 0.8")
    if not has_confidence:
        raise UserError(
            f"min_confidence={min_confidence:g}: generated answers have no confidence; leave it out, give the task"
            " labels or the inputs options, or take several `samples`"
        )


def is_unsure(confidence: float | None, min_confidence: float | None) -> bool:
    """Return whether an answer has less confidence than is wanted; one without any confidence has less."""
    return min_confidence is not None and (confidence is None or confidence < min_confidence)
