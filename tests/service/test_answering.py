"""Prompts of chats: what the chat template writes, and its switches."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.service.answering import Answerer
from manyicl.service.prefix_cache import PrefixCache
from manyicl.service.requests import Item, Request, Ticket

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
CHAT = [{"role": "user", "content": "hello"}]


def write_prompt(model, template: str, **switches) -> str:
    """Return the text that a model with this chat template gets of CHAT."""
    tokenizer = copy.deepcopy(model.tokenizer.tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    tokens = TaskTokenizer(tokenizer, model.tokenizer.settings, end_ids=model.tokenizer.end_ids)
    answerer = Answerer(replace(model, tokenizer=tokens), endpoint=None, cache=PrefixCache(model, most_bytes=1))
    return tokenizer.decode(answerer.encode_prompt(CHAT, switches=switches))


def test_a_model_that_thinks_does_so_only_if_a_chat_asks_for_it(seed_model):
    asked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert write_prompt(seed_model, "qwen3") == asked + "<think>\n\n</think>\n\n"
    assert write_prompt(seed_model, "qwen3", enable_thinking=True) == asked
    assert write_prompt(seed_model, "qwen2.5").endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "name", ["enable_thinkin", "messages", "add_generation_prompt", "chat_template", "bos_token", "", "|"]
)
def test_what_is_no_switch_of_the_template_is_refused(seed_model, name):
    with pytest.raises(UserError, match=re.escape(f"'{name}' is not a switch of this model's chat template")):
        write_prompt(seed_model, "qwen3", **{name: True})


def test_a_switch_has_a_single_value(seed_model):
    with pytest.raises(UserError, match="'enable_thinking' has a list or an object"):
        write_prompt(seed_model, "qwen3", enable_thinking=["yes"])


def test_an_answer_that_is_generated_again_is_not_handed_out_again(seed_model):
    pieces: list[str] = []
    ids = np.asarray(seed_model.tokenizer.tokenizer("The red fox")["input_ids"], dtype=np.int32)
    how = AnswerSettings(max_new_tokens=5)
    items = [Item(place, "The red fox", ids, limit=5, answering=how) for place in range(2)]
    request = Request("", "generation", items, Ticket(), on_text=lambda _, piece: pieces.append(piece))
    with Answerer(seed_model, endpoint=None, cache=PrefixCache(seed_model, most_bytes=1 << 20)) as answerer:
        answerer.answer([(request, items[0])])
        request.outcomes.clear()  # as if its pass had failed after that
        answerer.answer([(request, items[0])])
    assert "".join(pieces) == request.outcomes[0].text != ""
