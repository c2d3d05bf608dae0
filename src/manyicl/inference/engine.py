"""Engines answer queries after a prefix: a model that encodes it once, a model that cannot, or a server."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from manyicl.episodes import TaskTokenizer
from manyicl.inference.answering.decoding import GREEDY, Sampler
from manyicl.inference.answering.generation import (
    Generated,
    OnIds,
    generate_after,
    generate_and_score,
    has_ended,
    read_answer,
)
from manyicl.inference.answering.settings import Decoding
from manyicl.inference.budget import row_budget, run_rows
from manyicl.inference.model import InferenceModel
from manyicl.inference.prefix import EngineCount, check_finite, encode_prefix, score_choices
from manyicl.inference.query_rows import edge_logprobs
from manyicl.inference.sharing import sharing_fault
from manyicl.models import (
    EMPTY_PREFIX,
    Prefix,
    device_of,
    float32_head,
    inner_model,
    replaced,
    segment_attention,
)

if TYPE_CHECKING:  # it needs packages that only those who use a server install
    from manyicl.inference.endpoint import EndpointSettings
    from manyicl.inference.endpoint_calls import EndpointCalls

# Most tokens of prompts that transformers' generate() takes at once.
BATCH_TOKENS = 16384

Ids = NDArray[np.int32]
OnAnswer = Callable[[int], None]  # how many more queries have their answer


class Engine(Protocol):
    """Answers queries after a prefix. `choose_engine` makes one; it is entered as a context while it answers."""

    @property
    def has_likelihoods(self) -> bool:
        """Whether `score` and references work; a server only generates."""

    @property
    def sharing_fault(self) -> str | None:
        """Why queries cannot share an encoded prefix; "" if they do, None if nobody knows (a server)."""

    @property
    def server(self) -> Mapping[str, str] | None:
        """URL, model and form of the prompts of a server; None if the model is here."""

    @property
    def count(self) -> EngineCount:
        """The tokens that went through the model so far; a server's are not counted."""

    def __enter__(self) -> Self:
        """Get ready: compile, or connect."""

    def __exit__(self, *_: object) -> None:
        """Leave the model as it was, or disconnect."""

    def encode(self, ids: Ids, *, after: Prefix = EMPTY_PREFIX, room: int = 0) -> Prefix:
        """Return the prefix `after` extended by `ids`. room: tokens of the longest prefix that will extend it."""

    def score(
        self, prefix: Prefix, queries: Sequence[Ids], options: Sequence[Sequence[Sequence[int]]]
    ) -> list[NDArray[np.float64]]:
        """Return the nats of every option of every query after `prefix`: one array (O,) per query.

        options: for each query the ids of its options, terminators included.

        Raises:
            UserError: a likelihood that is not finite, or memory runs out.
            ValueError: a query without ids or options, or an option without ids.
        """

    def generate(
        self,
        prefix: Prefix,
        queries: Sequence[Ids],
        *,
        limits: Sequence[int],
        decodings: Sequence[Decoding] | None = None,
        references: Sequence[Sequence[int]] | None = None,
        on_answer: OnAnswer = lambda _: None,
        on_ids: OnIds | None = None,
    ) -> list[Generated]:
        """Return the answer of each query after `prefix`, up to where it ends or its limit.

        limits: most tokens of each answer.
        decodings: how each answer is generated. Default: greedily, up to its terminator.
        references: ids of an answer to each query, whose nats are wanted too; ignored without likelihoods.
        on_answer: called as answers come, if they come one by one.
        on_ids: called after each token with a query's place and its answer's ids so far; False ends the answer. An
            engine that gets its answers whole never calls it. Not together with `references`.

        Raises:
            UserError: memory runs out, or the server refuses.
        """


def choose_engine(
    model: InferenceModel,
    *,
    endpoint: EndpointSettings | None = None,
    kept: MutableMapping[str, Generated] | None = None,
    calls: EndpointCalls | None = None,
) -> Engine:
    """Return the engine that answers for `model`: a server if there is an `endpoint`, else the model's own.

    kept: answers that the server gave before, by key; those that it gives are added. calls: to the server, by all
    engines that share them. Both are ignored without a server.
    """
    if endpoint is not None:
        from manyicl.inference.endpoint import Endpoint

        return Endpoint(endpoint, model.tokenizer, kept=kept, calls=calls)
    fault = sharing_fault(model.model)
    return WholePrompts(model, fault) if fault else SharedPrefix(model)


class _LocalEngine(ABC):
    """What both engines have in common whose model is on this machine."""

    has_likelihoods = True
    server = None

    def __init__(self, model: InferenceModel) -> None:
        self.model, self.tokenizer, self.answering = model.model, model.tokenizer, model.answering
        self.count = EngineCount()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.answering())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def generate(
        self,
        prefix: Prefix,
        queries: Sequence[Ids],
        *,
        limits: Sequence[int],
        decodings: Sequence[Decoding] | None = None,
        references: Sequence[Sequence[int]] | None = None,
        on_answer: OnAnswer = lambda _: None,  # noqa: ARG002
        on_ids: OnIds | None = None,
    ) -> list[Generated]:
        """Return the answer of each query after `prefix`, those with the same limit together."""
        if references is not None and decodings is not None:  # only greedy answers may begin as their references do
            alone = self.generate(prefix, queries, limits=limits, decodings=decodings, on_ids=on_ids)
            return score_references(self, prefix, queries, alone, references=references)
        answers: dict[int, Generated] = {}
        for limit in dict.fromkeys(limits):
            alike = [place for place, one in enumerate(limits) if one == limit]
            wanted = None if references is None else [references[place] for place in alike]
            how = None if decodings is None else [decodings[place] for place in alike]
            hook = None if on_ids is None else lambda n, ids, alike=alike: on_ids(alike[n], ids)
            asked = [queries[place] for place in alike]
            given = self._generate(prefix, asked, wanted, limit=limit, decodings=how, on_ids=hook)
            answers.update(zip(alike, given, strict=True))
        return [answers[place] for place in range(len(queries))]

    @abstractmethod
    def score(
        self, prefix: Prefix, queries: Sequence[Ids], options: Sequence[Sequence[Sequence[int]]]
    ) -> list[NDArray[np.float64]]:
        """Return the nats (O,) of each query's options."""

    @abstractmethod
    def _generate(
        self,
        prefix: Prefix,
        queries: Sequence[Ids],
        references: Sequence[Sequence[int]] | None,
        *,
        limit: int,
        decodings: Sequence[Decoding] | None,
        on_ids: OnIds | None,
    ) -> list[Generated]:
        """Return the answers of queries that have one limit, with the nats of their references if any."""


class SharedPrefix(_LocalEngine):
    """Encodes a prefix once; many queries then share its keys and values (`prefix`, `generation`)."""

    sharing_fault: ClassVar[str] = ""

    def __enter__(self) -> Self:
        super().__enter__()
        self._stack.enter_context(segment_attention(self.model))  # once, not for each request
        return self

    def encode(self, ids: Ids, *, after: Prefix = EMPTY_PREFIX, room: int = 0) -> Prefix:
        """Return the prefix `after` extended by `ids`, encoding only `ids`."""
        return encode_prefix(self.model, ids, after=after, room=room, count=self.count)

    def score(
        self, prefix: Prefix, queries: Sequence[Ids], options: Sequence[Sequence[Sequence[int]]]
    ) -> list[NDArray[np.float64]]:
        """Return the nats (O,) of each query's options."""
        return score_choices(self.model, prefix, queries, options, count=self.count)

    def _generate(
        self,
        prefix: Prefix,
        queries: Sequence[Ids],
        references: Sequence[Sequence[int]] | None,
        *,
        limit: int,
        decodings: Sequence[Decoding] | None,
        on_ids: OnIds | None,
    ) -> list[Generated]:
        """Return answers, and the nats of the references from the same pass."""
        if references is None:
            return generate_after(
                self.model,
                self.tokenizer,
                prefix,
                queries,
                max_new_tokens=limit,
                decodings=decodings,
                count=self.count,
                on_ids=on_ids,
            )
        pairs = list(zip(queries, references, strict=True))
        texts, nats = generate_and_score(
            self.model, self.tokenizer, prefix, pairs, max_new_tokens=limit, count=self.count
        )
        return [one.with_reference(nll) for one, nll in zip(texts, nats.tolist(), strict=True)]


class WholePrompts(_LocalEngine):
    """Processes every prompt as a whole, for models whose queries cannot share a prefix."""

    def __init__(self, model: InferenceModel, fault: str) -> None:
        super().__init__(model)
        self.sharing_fault = fault

    def encode(self, ids: Ids, *, after: Prefix = EMPTY_PREFIX, room: int = 0) -> Prefix:  # noqa: ARG002
        """Return the prefix `after` extended by `ids`; nothing is encoded yet."""
        return Prefix(ids=np.concatenate([after.ids, ids]).astype(np.int32))

    def score(
        self, prefix: Prefix, queries: Sequence[Ids], options: Sequence[Sequence[Sequence[int]]]
    ) -> list[NDArray[np.float64]]:
        """Return the nats (O,) of each query's options, from one prompt per option."""
        if not all(len(query) for query in queries):
            raise ValueError("a query has no ids; the first token of an answer is predicted from its last")
        if not all(len(group) and all(len(option) for option in group) for group in options):
            raise ValueError("a query needs at least one option, and every option at least one token")
        nats = score_whole_prompts(self.model, prefix.ids, queries, options)
        self.count.num_prefix_tokens += prefix.num_tokens * sum(len(group) for group in options)
        self.count.num_query_tokens += sum(
            len(query) + len(option) for query, group in zip(queries, options, strict=True) for option in group
        )
        check_finite(nats)
        return nats

    def _generate(
        self,
        prefix: Prefix,
        queries: Sequence[Ids],
        references: Sequence[Sequence[int]] | None,
        *,
        limit: int,
        decodings: Sequence[Decoding] | None,
        on_ids: OnIds | None,  # noqa: ARG002
    ) -> list[Generated]:
        """Return answers by transformers' own generate(), and the nats of the references by a pass of their own."""
        answers = generate_whole_prompts(
            self.model, self.tokenizer, prefix.ids, queries, max_new_tokens=limit, decodings=decodings
        )
        self.count.num_prefix_tokens += prefix.num_tokens * len(queries)
        # The last token of an answer is never run.
        num_run = sum(max(0, (one.num_tokens or 0) - 1) for one in answers)
        self.count.num_query_tokens += sum(len(query) for query in queries) + num_run
        if references is None:
            return answers
        return score_references(self, prefix, queries, answers, references=references)


def score_references(
    engine: Engine | _LocalEngine,
    prefix: Prefix,
    queries: Sequence[Ids],
    answers: Sequence[Generated],
    *,
    references: Sequence[Sequence[int]],
) -> list[Generated]:
    """Return the answers to the queries, each with the nats of its reference, found in a pass of their own."""
    nats = engine.score(prefix, queries, [[reference] for reference in references])
    return [one.with_reference(float(nats_O[0])) for one, nats_O in zip(answers, nats, strict=True)]


def score_whole_prompts(
    model: nn.Module, before: Ids, queries: Sequence[Ids], options: Sequence[Sequence[Sequence[int]]]
) -> list[NDArray[np.float64]]:
    """Return the nats (O,) of each query's options, from one prompt per option.

    Prompts of one length share a forward pass, so that nothing is padded.
    """
    budget = row_budget(model)
    nats = [np.zeros(len(group)) for group in options]
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for q, group in enumerate(options):
        for o, option in enumerate(group):
            places.setdefault((len(before) + len(queries[q]) + len(option), len(option)), []).append((q, o))

    for (length, num_answer), members in places.items():

        def run(row: list[tuple[int, int]], num_answer: int = num_answer) -> None:
            ids = np.stack([np.concatenate([before, queries[q], options[q][o]]) for q, o in row])
            logprobs = _score_batch(model, ids, num_answer=num_answer)
            for place, (q, o) in enumerate(row):
                nats[q][o] = -logprobs[place].sum()

        size = budget.fraction(num_tokens=length, num_logits=length)
        run_rows(members, fraction=lambda _, size=size: size, run=run)  # type: ignore[misc]
    return nats


@torch.inference_mode()
def _score_batch(model: nn.Module, ids: Ids, *, num_answer: int) -> NDArray[np.float64]:
    """Return the log-probability (B, A) of the last `num_answer` ids of each row."""
    ids_BT = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)
    scored = num_answer + 1  # the token before the answer, and all of the answer but for its last
    known = inspect.signature(inner_model(model).forward).parameters
    keep = {"logits_to_keep": scored} if "logits_to_keep" in known else {}
    with float32_head(model):
        output: Any = model(input_ids=ids_BT, use_cache=False, **keep)
    logits = output.logits[:, -scored:-1].flatten(0, 1)
    targets = ids_BT[:, -num_answer:].flatten()
    logprobs, _ = edge_logprobs(logits, torch.arange(len(targets), device=targets.device), targets)
    return logprobs.double().cpu().numpy().reshape(len(ids), num_answer)


def generate_whole_prompts(
    model: Any,
    tokenizer: TaskTokenizer,
    before: Ids,
    queries: Sequence[Ids],
    *,
    max_new_tokens: int,
    decodings: Sequence[Decoding] | None = None,
) -> list[Generated]:
    """Return the answer of each query by transformers' own generate(); queries of one length share a batch.

    Equal lengths, because not every model that keeps a state of its own knows what padding is.
    """
    how = decodings or [GREEDY] * len(queries)
    answers: dict[int, Generated] = {}
    budget = row_budget(model, row_tokens=BATCH_TOKENS)

    def run(row: list[int]) -> None:
        ids = np.stack([np.concatenate([before, queries[place]]) for place in row]).astype(np.int32)
        sampler = Sampler([how[place] for place in row], list(ids))
        output = _generate_batch(
            model, tokenizer, torch.from_numpy(ids.astype(np.int64)), sampler=sampler, max_new_tokens=max_new_tokens
        )
        for place, new_ids in zip(row, output, strict=True):
            answers[place] = read_answer(tokenizer, new_ids, how[place].stop)

    for length in dict.fromkeys(map(len, queries)):
        places = [place for place, query in enumerate(queries) if len(query) == length]
        whole = len(before) + length + max_new_tokens
        size = budget.fraction(num_tokens=whole, num_logits=1, num_keys=whole)
        run_rows(places, fraction=lambda _, size=size: size, run=run)  # type: ignore[misc]
    return [answers[place] for place in range(len(queries))]


@torch.inference_mode()
def _generate_batch(
    model: Any, tokenizer: TaskTokenizer, ids: Tensor, *, sampler: Sampler, max_new_tokens: int
) -> list[list[int]]:
    """Return the new ids of each row, up to where it ended."""
    ids = ids.to(device_of(model))
    end_seen = _EndSeen(tokenizer, sampler.decodings, ids.shape[1])
    # transformers fills what we leave open from the checkpoint's own settings, and a repetition penalty among them
    # would forbid the very answers that the shots show.
    with replaced(inner_model(model), "generation_config", GenerationConfig()), float32_head(model):
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(tokenizer.end_ids) or None,
                pad_token_id=tokenizer.end_ids[0] if tokenizer.end_ids else 0,
            ),
            logits_processor=LogitsProcessorList([_ChosenToken(sampler)]),
            stopping_criteria=StoppingCriteriaList([end_seen]),
        )
    rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return [row[:num_tokens] for row, num_tokens in zip(rows, end_seen.num_tokens, strict=True)]


class _ChosenToken(LogitsProcessor):
    """Leaves only the token that the sampler chooses, so that greedy search takes it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        chosen = self.sampler.choose(scores, range(len(scores)))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _EndSeen(StoppingCriteria):
    """Stops each row on its decoded text, so that a terminator merged into another token stops it too.

    num_tokens: what each row has generated until it ended; transformers pads it to the longest row afterwards.
    """

    def __init__(self, tokenizer: TaskTokenizer, decodings: Sequence[Decoding], prompt_tokens: int) -> None:
        self.tokenizer, self.decodings = tokenizer, decodings
        self.prompt_tokens = prompt_tokens
        self.num_tokens, self.ended = [0] * len(decodings), [False] * len(decodings)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        for place, ids in enumerate(input_ids[:, self.prompt_tokens :].tolist()):
            if not self.ended[place]:
                self.num_tokens[place] = len(ids)
                self.ended[place] = has_ended(self.tokenizer, ids, self.decodings[place].stop)
        return torch.tensor(self.ended, device=input_ids.device)
