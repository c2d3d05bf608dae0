"""Episodes in the chat style are, to the character, what the model families' own chat templates write."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import join_examples, query_ids, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.inference.answering.questions import ask
from manyicl.inference.model import load_for_inference
from manyicl.models.loading import ModelNote
from manyicl.models.saving import save_model
from manyicl.tasks.task import Example, Task, load_tasks
from manyicl.training.recipe import RunConfig, make_config
from manyicl.training.run import train
from tests.conftest import make_task, tiny_model, train_tokenizer
from tests.inference.answering.test_generation import reciting_model

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
CHAT = TemplateSettings(style="chat")
# File -> (BOS, end of text, other control tokens of the vocabulary, the end of a turn).
FAMILIES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "llama3.1": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "llama3.2": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "mistral": ("<s>", "</s>", ("[INST]", "[/INST]"), "</s>"),
    "mistral7b": ("<s>", "</s>", ("[INST]", "[/INST]"), "</s>"),
    "gemma2": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "gemma3": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "qwen2.5": (None, "<|im_end|>", ("<|im_start|>",), "<|im_end|>"),
    "qwen3": (None, "<|im_end|>", ("<|im_start|>",), "<|im_end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>", (), "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
}
NAMES = sorted(FAMILIES)
THOUGHT = "<think>\n\n</think>\n\n"
PAIRS = [("is the fox red?", "yes"), ("  two spaces around  ", " no "), ("a\nb", "one\n\ntwo"), ("12 > 7", "漢字")]


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with the family's control tokens and chat template."""
    bos, eos, others, _ = FAMILIES[name]
    tokenizer = copy.deepcopy(train_tokenizer("bpe"))
    tokenizer.add_tokens([token for token in (bos, eos, *others) if token], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="module")
def writers() -> dict[str, TaskTokenizer]:
    return {name: TaskTokenizer(family_tokenizer(name), CHAT) for name in NAMES}


def chat_task(pairs=PAIRS, *, instruction: str = "", test=()) -> Task:
    """Return a task whose train split is `pairs`."""
    train, asked = (tuple(Example(*pair) for pair in some) for some in (pairs, test))
    task = replace(make_task("chat"), family="qa", metric="exact_match", labels=(), instruction=instruction)
    return replace(task, train=train, test=asked, sha256=f"{instruction} {pairs} {test}")


def turns_of(pairs, *, query: str | None = None, instruction: str = "") -> list[dict[str, str]]:
    """Return shots as user and assistant turns, and the query as a last user turn."""
    texts = [text for pair in pairs for text in pair] + ([] if query is None else [query])
    texts[0] = f"{instruction}\n\n{texts[0]}" if instruction else texts[0]
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def as_written_by(name: str, tokenizer, turns, **options) -> str:
    """Return what the chat template itself writes; of Qwen 3, with the thought that it drops from earlier answers."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options)
    if name == "qwen3":
        start = "<|im_start|>assistant\n"
        text = text.replace(start + THOUGHT, start).replace(start, start + THOUGHT)
    if name == "phi3" and not options:
        text = text.removesuffix("<|endoftext|>")
    return text


@pytest.mark.parametrize("instruction", ["", "Answer the question."])
@pytest.mark.parametrize("name", NAMES)
def test_b2_the_text_of_an_episode_is_the_templates_own(name, instruction, writers):
    writer = writers[name]
    tokenized = tokenize_task(chat_task(instruction=instruction), tokenizer=writer)
    episode = join_examples(tokenized, split="train", indices=range(len(PAIRS)))
    turns = turns_of([(given, answer) for given, answer in PAIRS], instruction=instruction)
    # Contents are taken without white space at their ends by templates that strip it.
    if instruction and writer.frame.trims_inputs:
        turns[0]["content"] = f"{instruction}\n\n{PAIRS[0][0]}"
    assert writer.decode(episode.ids) == as_written_by(name, writer.tokenizer, turns)


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen2.5", "qwen3", "smollm2"])
def test_a_system_prompt_is_written_once_where_the_template_puts_it(name):
    writer = TaskTokenizer(family_tokenizer(name), TemplateSettings(style="chat", system="Be brief."))
    tokenized = tokenize_task(chat_task(), tokenizer=writer)
    text = writer.decode(join_examples(tokenized, split="train", indices=range(len(PAIRS))).ids)
    turns = [{"role": "system", "content": "Be brief."}, *turns_of(PAIRS)]
    assert text == as_written_by(name, writer.tokenizer, turns)
    assert text.count("Be brief.") == 1
    assert text.index("Be brief.") < text.index("is the fox red?")
    assert writer.fingerprint != TaskTokenizer(family_tokenizer(name), CHAT).fingerprint


def test_a_system_prompt_that_cannot_be_written_is_refused_in_one_line():
    settings = TemplateSettings(style="chat", system="Be brief.")
    with pytest.raises(UserError, match="the tokenizer's chat template fails: System role not supported"):
        TaskTokenizer(family_tokenizer("gemma2"), settings)
    deaf = family_tokenizer("qwen2.5")
    deaf.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"template.system: the tokenizer's chat template leaves a system prompt out"):
        TaskTokenizer(deaf, settings)
    with pytest.raises(UserError, match=r"template.system: holds a special token of the tokenizer"):
        TaskTokenizer(family_tokenizer("qwen3"), TemplateSettings(style="chat", system="Stop at <|im_end|>."))
    with pytest.raises(ValidationError, match=r"system: is for template.style = 'chat'"):
        TemplateSettings(system="Be brief.")


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_b2_what_a_query_is_asked_with_is_the_templates_own_prompt(name, shots, writers):
    writer = writers[name]
    tokenized = tokenize_task(chat_task(PAIRS[:3], test=PAIRS[3:]), tokenizer=writer)
    before = join_examples(tokenized, split="train", indices=range(shots)).ids
    query = query_ids(tokenized, split="test", index=0, after_shots=shots > 0)
    told = writer.decode([*before, *query])
    turns = turns_of(PAIRS[:shots], query=PAIRS[3][0])
    # Mistral 7B's template writes a space before each answer that its prompt for one leaves to the model.
    space = " " if name == "mistral7b" else ""
    assert told == as_written_by(name, writer.tokenizer, turns, add_generation_prompt=True) + space


def test_b2_without_shots_a_prompt_of_qwen_3_is_its_own_to_the_character(writers):
    writer = writers["qwen3"]
    tokenized = tokenize_task(chat_task(PAIRS[:1]), tokenizer=writer)
    told = writer.decode([*tokenized.head_ids, *query_ids(tokenized, split="train", index=0, after_shots=False)])
    assert told == f"<|im_start|>user\nis the fox red?<|im_end|>\n<|im_start|>assistant\n{THOUGHT}"


@pytest.mark.parametrize("name", NAMES)
def test_b4_an_end_of_turn_ends_an_answer_with_or_without_what_follows_it(name, writers):
    writer = writers[name]
    end = writer.tokenizer.convert_tokens_to_ids(FAMILIES[name][3])
    answer = writer.encode_texts(["yes"])[0]
    newline = writer.encode_texts(["\n"])[0]
    for ids in ([*answer, end], [*answer, end, *newline], [*answer, end, writer.tokenizer.eos_token_id]):
        assert writer.cut_answer(ids) == ("yes", True)
    assert writer.has_ended([*answer, end])
    assert not writer.has_ended(answer)
    assert writer.cut_answer(answer) == ("yes", False)
    assert writer.cut_text(f"yes{FAMILIES[name][3]}") == ("yes", True)


@contextmanager
def time_zone(name: str) -> Iterator[None]:
    """Set the local time zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
        time.tzset()


@contextmanager
def yesterday() -> Iterator[None]:
    """Set the westernmost time zone: its date is never that of `tomorrow`, 26 hours ahead."""
    with time_zone("Etc/GMT+12"):
        yield


@contextmanager
def tomorrow() -> Iterator[None]:
    with time_zone("Etc/GMT-14"):
        yield


def test_b3_a_frame_that_is_kept_is_written_alike_on_another_day():
    tokenizer = family_tokenizer("llama3.2")
    with yesterday():
        first = TaskTokenizer(tokenizer, CHAT)
    with tomorrow():
        anew = TaskTokenizer(tokenizer, CHAT)
        again = TaskTokenizer(tokenizer, CHAT, frame=first.frame)
    task = chat_task()
    assert anew.head_ids(task).tolist() != first.head_ids(task).tolist()
    assert again.head_ids(task).tolist() == first.head_ids(task).tolist()
    assert again.fingerprint == first.fingerprint != anew.fingerprint


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    """Return a folder with tasks, a model whose template writes the date, and a run on it, started the day before."""
    folder = tmp_path_factory.mktemp("dated")
    (folder / "tasks").mkdir()
    lines = [json.dumps({"input": f"item {n}", "answer": ("yes", "no")[n % 2]}) for n in range(60)]
    (folder / "tasks" / "parity.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = family_tokenizer("llama3.2")
    save_model(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, folder / "model", note=ModelNote())
    with yesterday():
        train(recipe(folder), out=folder / "run")
    return folder


def recipe(folder: Path, *, num_steps: int = 2) -> RunConfig:
    return make_config(
        {
            "tasks": {"folder": str(folder / "tasks")},
            "model": {"path": str(folder / "model"), "precision": "fp32"},
            "template": {"style": "chat"},
            "episodes": {"token_budget": 400},
            "train": {"num_steps": num_steps, "log_every_steps": 1, "checkpoint_every_steps": 1, "pack_tokens": 400},
            "held_out": {"episodes": 0},
        },
        source="test",
        kind=RunConfig,
    )


@pytest.mark.slow
def test_b3_a_run_is_asked_and_resumed_on_another_day_in_the_text_it_was_trained_in(chat_run, tmp_path):
    folder = chat_run / "run"
    with tomorrow():
        today = load_for_inference(str(chat_run / "model"), template=CHAT).tokenizer
        asked = load_for_inference(str(folder)).tokenizer
        named = load_for_inference(str(folder), template=CHAT).tokenizer
    kept = json.loads((folder / "run.json").read_text())["frame"]
    assert kept["opening"] == asked.frame.opening == named.frame.opening != today.frame.opening
    # A run that a kill left after its plan was made goes on with that plan's text.
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "checkpoints")
    with tomorrow():
        train(recipe(chat_run), out=killed, resume=True)
        assert load_for_inference(str(killed)).tokenizer.fingerprint == asked.fingerprint


@pytest.mark.slow
def test_b3_an_unfinished_evaluation_of_a_base_model_goes_on_the_next_day(chat_run, tmp_path):
    out, tasks = tmp_path / "r.json", load_tasks(chat_run / "tasks")
    sweep = {"shots": (0, 1, 2), "draws": 2, "queries": 3, "out": out}

    def stop(what: str, done: int, total: int) -> None:
        if done == 6:  # two points of three answers
            raise KeyboardInterrupt

    with yesterday():
        asked = load_for_inference(str(chat_run / "model"), template=CHAT)
        whole = evaluate(asked, tasks, **{**sweep, "out": None})
        with pytest.raises(KeyboardInterrupt):
            evaluate(asked, tasks, **sweep, on_progress=stop)
    with tomorrow():
        again = evaluate(load_for_inference(str(chat_run / "model"), template=CHAT), tasks, **sweep)
    assert again.curves[0].predictions == whole.curves[0].predictions


def test_b4_every_end_token_of_the_generation_config_ends_an_answer(tmp_path):
    tokenizer = copy.deepcopy(train_tokenizer("bpe"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    word = tokenizer("owl", add_special_tokens=False)["input_ids"]
    query = tokenizer("Input: x\nAnswer:\n", add_special_tokens=False)["input_ids"]
    model = reciting_model([query[-1], *word, end], vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [2, end]
    save_model(model, tokenizer, tmp_path / "m", note=ModelNote())
    asked = load_for_inference(str(tmp_path / "m"), precision="fp32")
    assert set(asked.tokenizer.end_ids) == {2, end}
    task = chat_task([("a", "b")])
    (answer,) = ask(asked, task, ["x"], shots=0)
    assert (answer.answer, answer.cut) == ("owl", False)
    (curve,) = evaluate(
        asked, [replace(task, test=(Example("x", "owl"),), sha256="asked")], shots=(0,), draws=1, queries=1
    ).curves
    assert [(p.prediction, p.score, p.cut) for p in curve.predictions] == [("owl", 1.0, False)]


@pytest.mark.real_model
def test_b2_ids_of_an_episode_are_those_of_smollm2s_own_template(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    writer = TaskTokenizer(tokenizer, CHAT)
    pairs = [("Is Paris in France?", "yes"), ("Is 12 > 15?", "no"), ("Ist Rom in Italien?", "yes"), ("漢字?", "no")]
    tokenized = tokenize_task(chat_task(pairs), tokenizer=writer)
    episode = join_examples(tokenized, split="train", indices=range(4))
    own = tokenizer.apply_chat_template(turns_of(pairs), return_dict=True)["input_ids"]
    assert episode.ids.tolist() == own
    before = join_examples(tokenized, split="train", indices=range(3)).ids.tolist()
    prompt = [*before, *query_ids(tokenized, split="train", index=3, after_shots=True).tolist()]
    turns = turns_of(pairs[:3], query="漢字?")
    assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == own[: len(prompt)]
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = (TEMPLATES / "smollm2.jinja").read_text(encoding="utf-8")
    assert copied.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)
