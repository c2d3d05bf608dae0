"""The text around examples: settings, the plain style, and frames read off chat templates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from manyicl.episodes.template import (
    Frame,
    Message,
    TemplateSettings,
    chat_frame,
    input_text,
    instruction_text,
    plain_frame,
)
from manyicl.episodes.tokenized import join_examples, tokenize_task
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from tests.conftest import make_task

# Jinja as the models' own tokenizer_config.json has it, shortened to what a user and an assistant turn need.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL, "marked": MARKED}
TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")

# Qwen 3 writes an empty thinking part into the last turn and leaves it out of every earlier one.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Return a copy of `tokenizer` with a chat template, whose turn tokens it knows."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([token for token in TURN_TOKENS if token in template], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def read_frame(
    write_turn: Callable[[Message, bool], str],
    *,
    prompt: str = "A: ",
    marks: Sequence[str] = (),
) -> Frame:
    """Return the frame of a template given as a function (turn, is it the last) -> text; `marks` are generated."""

    def render(messages, add_generation_prompt):
        text = "".join(write_turn(m, m is messages[-1]) for m in messages)
        return text + (prompt if add_generation_prompt else "")

    def find_generated(messages):
        text = render(messages, False)
        return [(text.index(mark), text.index(mark) + len(mark)) for mark in marks]

    return chat_frame(render, find_generated=find_generated)


def write_simple(turn: Message, last: bool) -> str:
    return f"U: {turn['content']}\n" if turn["role"] == "user" else f"A: {turn['content']} END\n"


@pytest.mark.parametrize("text", ["no place", "{input} and {input}"])
def test_the_input_segment_has_one_placeholder(text):
    with pytest.raises(ValidationError, match=r"needs \{input\} exactly once"):
        TemplateSettings(input=text)


def test_an_empty_terminator_is_refused():
    with pytest.raises(ValidationError, match="generation would not know where an answer ends"):
        TemplateSettings(terminator="")


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        TemplateSettings(terminater="\n")


def test_the_plain_style_puts_every_separator_into_the_input_segment():
    settings = TemplateSettings(input="Q: {input}\nA:", terminator=" ;")
    assert plain_frame(settings) == Frame(opening="", between="", before_answer="", terminator=" ;")
    assert input_text("2 + 2", settings=settings) == "Q: 2 + 2\nA:"


def test_a_placeholder_inside_an_input_is_text():
    assert input_text("{input}", settings=TemplateSettings(input="<{input}>")) == "<{input}>"


def test_the_chat_style_writes_the_input_alone():
    assert input_text("2 + 2", settings=TemplateSettings(style="chat")) == "2 + 2"


@pytest.mark.parametrize(
    ("instruction", "labels", "text"),
    [
        (True, False, "Name the animal.\n\n"),
        (True, True, "Name the animal.\nAnswers: cat, dog, fox, owl\n\n"),
        (False, True, "Answers: cat, dog, fox, owl\n\n"),
        (False, False, ""),
    ],
)
def test_instruction_text(instruction, labels, text):
    settings = TemplateSettings(instruction=instruction, labels=labels)
    assert instruction_text(make_task("animals"), settings=settings) == text


def test_an_empty_instruction_and_no_labels_write_nothing():
    task = replace(make_task("animals"), instruction="", labels=())
    assert instruction_text(task, settings=TemplateSettings(labels=True)) == ""


def test_a_frame_is_read_off_a_template():
    assert read_frame(write_simple) == Frame(opening="U: ", between="U: ", before_answer="\nA: ", terminator=" END\n")


@pytest.mark.parametrize(
    ("marks", "terminator", "between"),
    [
        (["[[answer-1]] END", "[[answer-2]] END"], " END", "\nU: "),  # the line feed is not generated
        (["[[answer-1]]", "[[answer-2]]"], " END\n", "U: "),  # no end is marked: all up to the next turn
        (["A: [[answer-1]] END\n"], " END\n", "U: "),  # a mark may begin before the answer
        (["[[answer-2]] END"], " END\n", "U: "),  # a mark elsewhere says nothing of the first answer
    ],
)
def test_the_terminator_is_the_generated_part_after_the_answer(marks, terminator, between):
    frame = read_frame(write_simple, marks=marks)
    assert (frame.terminator, frame.between) == (terminator, between)
    assert (frame.opening, frame.before_answer) == ("U: ", "\nA: ")


def write_thinking(turn: Message, last: bool) -> str:
    text = write_simple(turn, last)
    return text.replace("A: ", "A: <think></think>") if last else text


def write_shortened(turn: Message, last: bool) -> str:
    return write_simple(turn, last) if last or turn["role"] == "assistant" else "U: ...\n"


def write_last_end(turn: Message, last: bool) -> str:
    return write_simple(turn, last) + ("<end of document>" if last else "")


@pytest.mark.parametrize("write_turn", [write_thinking, write_last_end])
def test_a_template_that_rewrites_earlier_turns_is_refused(write_turn):
    with pytest.raises(UserError, match="rewrites earlier turns") as error:
        read_frame(write_turn)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("times", "content"), [(0, ""), (2, "{0} {0}")])
def test_a_template_that_drops_or_repeats_a_content_is_refused(times, content):
    def write(turn, last):
        text = content.format(turn["content"]) if turn["role"] == "user" else turn["content"]
        return f"{text}\n"

    with pytest.raises(UserError, match=f"writes a turn {times} times") as error:
        read_frame(write, prompt="")
    assert "\n" not in str(error.value)


def test_a_template_without_an_end_of_turn_is_refused():
    with pytest.raises(UserError, match="nothing after an answer"):
        read_frame(lambda turn, last: turn["content"], prompt="")


FRAMES = {
    "chatml": Frame(
        opening="<|im_start|>user\n",
        between="<|im_start|>user\n",
        before_answer="<|im_end|>\n<|im_start|>assistant\n",
        terminator="<|im_end|>\n",
    ),
    "gemma": Frame(
        opening="<s><start_of_turn>user\n",
        between="<start_of_turn>user\n",
        before_answer="<end_of_turn>\n<start_of_turn>model\n",
        terminator="<end_of_turn>\n",
        trims_inputs=True,
        trims_answers=True,
    ),
    "mistral": Frame(opening="<s>[INST] ", between="[INST] ", before_answer=" [/INST] ", terminator="</s>"),
    "marked": Frame(
        opening="<|im_start|>user\n",
        between="\n<|im_start|>user\n",
        before_answer="<|im_end|>\n<|im_start|>assistant\n",
        terminator="<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_the_frames_of_known_chat_templates(name, tokenizers):
    tokenizer = chat_tokenizer(tokenizers["bpe"], CHAT_TEMPLATES[name])
    assert TaskTokenizer(tokenizer, TemplateSettings(style="chat")).frame == FRAMES[name]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (QWEN3, "rewrites earlier turns"),
        ("{% for m in messages %}{{ m['role'] + '\n' }}{% endfor %}", "writes a turn 0 times"),
        ("{{ raise_exception('only system turns') }}", "fails: only system turns"),
        ("{% for m in messages %}{{ m['content'] + no_such_token }}{% endfor %}", "'no_such_token' is undefined"),
        ("{% for m in messages %}", "fails: "),  # not valid Jinja
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_in_one_line(template, message, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bpe"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        TaskTokenizer(tokenizer, TemplateSettings(style="chat"))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("template.style = 'chat': ")


def test_a_template_that_refuses_a_system_turn_is_used_trial_52(tokenizers):
    """An instruction is a part of the first user turn, so there is no system turn to refuse."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    writer = TaskTokenizer(chat_tokenizer(tokenizers["bpe"], refusing), TemplateSettings(style="chat"))
    assert writer.frame == FRAMES["chatml"]
    tokenized = tokenize_task(make_task("animals"), tokenizer=writer)
    assert writer.decode(join_examples(tokenized, split="train", indices=[0]).ids) == (
        "<|im_start|>user\nName the animal.\n\nthe red owl 20<|im_end|>\n<|im_start|>assistant\nowl<|im_end|>\n"
    )
