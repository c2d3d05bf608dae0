"""Settings of the service: its limits and budgets, and which examples are shown before an input."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from manyicl.errors import UserError, check_kind, check_list, take_whole
from manyicl.inference import DEFAULT_ANSWERS, AnswerSettings

# Default of `shot_tokens` on a CPU.
CPU_SHOT_TOKENS = 4096
# Defaults of `max_batch_tokens`, and of inputs and options alone on a CPU, where longer passes are no faster
# (benchmarks/pass_size.py).
BATCH_TOKENS = 8192
CPU_READ_TOKENS = 1024
Policy = Literal["random", "fixed", "nearest"]


@dataclass(frozen=True, slots=True)
class ShotChoice:
    """Which examples of a task are shown before an input.

    Raises:
        UserError: an unknown policy, a negative count, ids without the policy "fixed", or that policy without ids.
    """

    policy: Policy = "random"
    """random: a random order in which labels take turns; fixed: `ids`; nearest: a shared random part, then the examples
    whose words are most like the input's (BM25), the most similar one last."""
    count: int | None = None
    """How many. None: as many as fit."""
    seed: int = 0
    """Decides the random order."""
    ids: tuple[int, ...] = ()
    """The examples to show, in this order; for the policy "fixed" only."""

    def __post_init__(self) -> None:
        if self.policy not in ("random", "fixed", "nearest"):
            raise UserError(f"shots.policy={self.policy!r}: is unknown; known: random, fixed, nearest")
        if self.count is not None:
            object.__setattr__(self, "count", take_whole("shots.count", self.count, least=0))
        object.__setattr__(self, "seed", take_whole("shots.seed", self.seed))
        check_list("shots.ids", self.ids, of=int)
        object.__setattr__(self, "ids", tuple(take_whole("shots.ids", id_) for id_ in self.ids))
        if self.ids and self.policy != "fixed":
            raise UserError(f"shots.ids: need shots.policy 'fixed', not '{self.policy}'")
        if self.policy == "fixed" and not self.ids:
            raise UserError("shots.policy='fixed': needs shots.ids, the examples to show")
        if len(set(self.ids)) < len(self.ids):
            raise UserError("shots.ids: name an example twice; name each once")


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Limits and budgets of a service.

    Raises:
        UserError: a limit that is no whole number, or a negative one.
    """

    shots: ShotChoice = ShotChoice()
    """The examples shown if a request does not choose."""
    shot_tokens: int | None = None
    """Most tokens of shots if a request does not count them. None: as many as fit, on a CPU at most 4,096: encoding
    more would take it half a minute. A large number: as many as fit there too."""
    answering: AnswerSettings = DEFAULT_ANSWERS
    """How an input is answered if its request does not say."""
    max_queue: int = 512
    """Inputs that may wait; more are refused."""
    max_batch_tokens: int | None = None
    """Most tokens of inputs, options and answers in one pass; an input with more has a pass of its own. None: 8,192, of
    which on a CPU at most 1,024 are of inputs and options: more are no faster there, and others wait longer."""
    cache_bytes: int = 2 << 30
    """Memory for encoded prefixes; the one in use is kept even if it is larger."""
    spill_bytes: int = 8 << 30
    """Disk for prefixes that no longer fit that memory; 0: they are dropped."""
    measure: bool = True
    """Whether tasks are measured while nothing else is to be done."""
    measure_tokens: int | None = None
    """Most tokens of a measurement. None: on a CPU about two minutes' work of two cores (13,000 for a model of 135M
    parameters), on a GPU less than a minute's work of an H200 (500,000 for 7B), 4,000,000 on a server."""
    max_tasks: int = 1000
    """Tasks that may be kept."""
    max_examples: int = 50_000
    """Examples of one task."""
    max_input_chars: int = 100_000
    """Characters of one input."""
    max_new_tokens: int = 1024
    """Most tokens of one generated answer, whatever a request wants."""

    def __post_init__(self) -> None:
        check_kind("shots", self.shots, ShotChoice)
        check_kind("answering", self.answering, AnswerSettings)
        for limit in fields(self):
            value = getattr(self, limit.name)
            if limit.name not in ("shots", "answering", "measure") and value is not None:
                object.__setattr__(self, limit.name, take_whole(limit.name, value, least=0))
