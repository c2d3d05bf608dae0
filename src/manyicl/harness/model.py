"""The model `manyicl` of lm-evaluation-harness: its requests are answered by our engine, which shares their prefixes.

Importing this module registers the model. It is a subclass of the harness's own `hf` model, so requests are tokenised,
cut and stopped in the same way. Only the passes through the model differ: contexts that begin alike are encoded once up
to where they part, and the options of a context are a trie. Sampling, beams and the windows of long texts, which share
nothing, go through the `hf` model's own code, as does a model whose queries cannot share a prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from manyicl.errors import UserError, suggest
from manyicl.harness.sharing import share_contexts
from manyicl.inference import (
    choose_engine,
    encode_prefix,
    generate_after,
    load_for_inference,
    score_greedily,
)
from manyicl.models import EMPTY_PREFIX

_PRECISIONS = {"auto": "auto", "float32": "fp32", "fp32": "fp32", "bfloat16": "bf16", "bf16": "bf16"}
# A request as the harness hands it on: its texts, or None of a window of a long text; ids of context and continuation.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("manyicl")
class ManyICL(HFLM):  # type: ignore[misc]  # untyped
    """A checkpoint, adapter, run or packaged model, asked by lm-evaluation-harness.

    pretrained: as MODEL_OR_RUN of `manyicl eval`. dtype: auto, float32 or bfloat16. trust_remote_code: run Python code
    that comes with the model. max_length, add_bos_token, prefix_token_id, truncation: as of the `hf` model. device:
    "cpu" to leave a GPU alone. The engine finds the size of its batches by itself; batch_size is of what goes through
    the `hf` model's own code.

    Raises:
        UserError: the model is not named or cannot be loaded, or an argument or its value is not known.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        **options: Any,
    ) -> None:
        if str(dtype) not in _PRECISIONS:
            raise UserError(f"dtype={dtype}: is unknown{suggest(str(dtype), _PRECISIONS)}")
        passed_on = ("max_length", "add_bos_token", "prefix_token_id", "truncation")
        for name, value in options.items():
            if name not in passed_on:
                known = ("pretrained", "dtype", "trust_remote_code", *passed_on)
                raise UserError(f"{name}={value}: the model manyicl has no such argument{suggest(name, known)}")
        if not pretrained:
            raise UserError("pretrained: is missing; name a model, --model_args pretrained=MODEL_OR_RUN")
        precision: Any = _PRECISIONS[str(dtype)]
        asked = load_for_inference(pretrained, precision=precision, trust_remote_code=bool(trust_remote_code))
        if device is not None:
            _place(asked.model, device)
        super().__init__(
            pretrained=asked.model,
            tokenizer=asked.tokenizer.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **options,
        )
        self.asked = asked
        self.engine = choose_engine(asked)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would give it."""
        if self.engine.sharing_fault or all(texts is None for texts, _, _ in requests):
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return answers
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            # As the hf model does: what is too long loses its beginning.
            kept = max(0, self.max_length + 1 - len(continuation))
            cut = tuple(context[-kept:]) if kept else ()
            asked.setdefault(cut, {}).setdefault(tuple(continuation), []).append(place)
        if () in asked:
            longest = max(map(len, asked[()]))
            raise UserError(f"a continuation of {longest} tokens leaves no room for its context in {self.max_length}")
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self.engine:
            for contexts, queries, prefix in self._run_groups(asked):
                options = [list(asked[context]) for context in contexts]
                scored = score_greedily(self.model, prefix, queries, options, count=self.engine.count)
                for context, group, (nats_O, greedy_O) in zip(contexts, options, scored, strict=True):
                    for option, nats, greedy in zip(group, nats_O.tolist(), greedy_O.tolist(), strict=True):
                        for place in asked[context][option]:
                            found[place] = (-nats, greedy)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _run_groups(self, contexts: Iterable[tuple[int, ...]]) -> Iterable[tuple[Any, list[Any], Any]]:
        """Yield groups of contexts, what follows their shared prefix in each, and the encoded prefix."""
        for group in share_contexts(list(contexts)):
            ids = np.asarray(group.prefix, dtype=np.int32)
            prefix = encode_prefix(self.model, ids, after=EMPTY_PREFIX, count=self.engine.count)
            rest = [np.asarray(context[len(ids) :], dtype=np.int32) for context in group.contexts]
            yield group.contexts, rest, prefix

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model generates after each context, up to a stop text, its end or the limit."""
        found: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(place)
        for places in alike.values():
            some = [requests[place] for place in places]
            settings = normalize_gen_kwargs(some[0].args[1], self.max_gen_toks)
            if self.engine.sharing_fault or not _is_greedy(settings):
                texts = super().generate_until(some, disable_tqdm=disable_tqdm)
            else:
                texts = self._generate_greedily([request.args for request in some], settings)
            found.update(zip(places, texts, strict=True))
        return [found[place] for place in range(len(requests))]

    def _generate_greedily(self, pairs: Sequence[tuple[str, dict[str, Any]]], settings: dict[str, Any]) -> list[str]:
        most = int(settings["max_gen_toks"])
        if most >= self.max_length:
            raise UserError(f"max_gen_toks={most}: leaves no room for a context in {self.max_length} tokens; lower it")
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.get("until"), eos=end)
        contexts = [tuple(self.tok_encode(text))[-(self.max_length - most) :] for text, _ in pairs]
        ends: Any = _Ends(self.tok_decode, until, frozenset(self.asked.tokenizer.end_ids) | {self.eot_token_id})
        texts: dict[tuple[int, ...], str] = {}
        with self.engine:
            for group, queries, prefix in self._run_groups(contexts):
                given = generate_after(self.model, ends, prefix, queries, max_new_tokens=most, count=self.engine.count)
                texts.update(zip(group, (one.text for one in given), strict=True))
        for (text, gen_kwargs), context in zip(pairs, contexts, strict=True):
            self.cache_hook.add_partial("generate_until", (text, gen_kwargs), texts[context])
        return [texts[context] for context in contexts]


def _place(model: torch.nn.Module, device: str) -> None:
    """Move a model to a device; one of a GPU that is not there leaves it where it is, as the `hf` model does.

    The command line asks for "cuda:0" if its user names no device.

    Raises:
        UserError: there is no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger("manyicl").warning("device %s: is not there; the model stays on the CPU", device)
        return
    try:
        model.to(device)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"device={device}: cannot be used ({str(error).splitlines()[0]}); give cpu, cuda or cuda:N"
        ) from error


def _is_greedy(settings: dict[str, Any]) -> bool:
    """Return whether generation settings leave nothing to chance, and ask for nothing but limits."""
    others = set(settings) - {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k"}
    return not settings.get("do_sample") and not others


class _Ends:
    """Says where a generated answer ends: at the model's end, or at a stop text, which is not part of it."""

    def __init__(self, decode: Callable[[list[int]], str], until: Sequence[str], end_ids: frozenset[int]) -> None:
        self._decode, self._until, self._end_ids = decode, until, end_ids

    def has_ended(self, ids: Sequence[int]) -> bool:
        """Return whether an answer that begins with `ids` is complete."""
        if ids[-1] in self._end_ids:
            return True
        text = self._decode(list(ids))
        return any(stop in text for stop in self._until)

    def cut_answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Return an answer's text as the hf model does, and whether it ended before the limit."""
        text = postprocess_generated_text(
            generation=self._decode(list(ids)), stop=list(self._until), think_end_token=None
        )
        return text, self.has_ended(ids)
