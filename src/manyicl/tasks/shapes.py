"""Recognises common layouts of rows (chat, ShareGPT, alpaca, SQuAD, MMLU, ARC, ...) and writes a task.json for each."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile

from manyicl.errors import list_some
from manyicl.tasks.columns import Columns, template_fields

# Common names of an input and of an answer column, in order of preference.
_INPUTS = (
    "question",
    "prompt",
    "instruction",
    "query",
    "text",
    "sentence",
    "utterance",
    "review",
    "content",
    "document",
    "article",
    "dialogue",
    "passage",
    "context",
    "source",
    "problem",
    "input",
    "inputs",
    "x",
)
_ANSWERS = (
    "answer",
    "answers",
    "output",
    "outputs",
    "response",
    "completion",
    "label_text",
    "label_name",
    "label",
    "labels",
    "target",
    "targets",
    "intent",
    "category",
    "class",
    "sentiment",
    "summary",
    "highlights",
    "solution",
    "chosen",
    "reference",
    "gold",
    "gold_label",
    "correct_answer",
    "best_answer",
    "ground_truth",
    "expected_output",
    "y",
)
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text_a", "text_b"))
# Names in chats of the list of turns, the speaker and the text.
_CHATS = (("messages", "role", "content"), ("conversations", "from", "value"), ("conversation", "role", "content"))
# Names of texts that a question is about, which stand before it in the input.
_PASSAGES = ("passage", "context", "article", "document", "story", "paragraph", "background", "support", "premise")
# Names of columns that hold one option each, before a number or letter: sol1 and sol2, answerA to answerC.
_OPTION = re.compile(
    r"(?P<name>options?|choices?|sol|solution|endings?|answers?|alternatives?|candidates?|distractors?|opt)[-_ ]?"
    r"(?P<mark>\d|[a-h])",
    re.IGNORECASE,
)

Mapped = dict[str, str | list[str]]


def recognise(record: Mapping[str, object]) -> tuple[str, Mapped] | None:
    """Return what a record seems to be, and the "columns" of a task.json that reads it; None if nothing fits.

    Columns that already have our name are not mapped.
    """
    keys = {name.strip().casefold(): name for name in record}
    for find in (_find_chat, _find_prompted, _find_choices, _find_squad, _find_alpaca, _find_pair, _find_names):
        found = find(record, keys)
        if found is not None:
            name, mapped = found
            return name, {ours: own for ours, own in mapped.items() if own != ours}
    return None


def describe_shape(
    record: Mapping[str, object], *, columns: Mapping[str, object], settings_name: str
) -> tuple[str, dict[str, object]] | None:
    """Return a text that names a record's layout and the task.json that reads it, and that; None if it is not known.

    columns: the columns that the task.json maps already; they are kept.
    """
    found = recognise(record)
    if found is None:
        return None
    name, mapped = found
    every = {**mapped, **columns}
    return f"{name}; to read it, write {write_columns(every)} into {settings_name}", {"columns": every}


def write_columns(mapped: Mapping[str, object]) -> str:
    """Return a task.json with these columns, on one line."""
    return json.dumps({"columns": dict(mapped)}, ensure_ascii=False)


def suggest_columns(record: Mapping[str, object], *, columns: Columns, settings_name: str) -> str:
    """Return a text with a task.json that gives the missing input or answer a column that is not read; "" if none is.

    It is only an example: of the columns that are not read, inputs mostly come first and answers last.
    """
    others = [name for name in record if not columns.reads(name)]
    missing = columns.missing_from(record)
    if len(others) < len(missing):
        return ""
    guess = {ours: others[0 if ours == "input" else -1] for ours in missing}
    return f", or say in {settings_name} which it is, such as {write_columns({**columns.mapped, **guess})}"


def find_option_columns(names: Sequence[str]) -> list[str]:
    """Return the columns that hold one option each, in their order, if there are two or more; else [].

    They are called A, B, C, ..., or have a number or letter at their end: sol1, sol2; option_a, option_b.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _OPTION.fullmatch(name.strip()):
            groups.setdefault(match["name"].casefold(), {})[match["mark"].upper()] = name
    for marked in groups.values():
        for marks in ("0123456789", "123456789", "ABCDEFGH"):
            if len(marked) > 1 and set(marked) == set(marks[: len(marked)]):
                return [marked[mark] for mark in sorted(marked)]
    return _find_letters(names)


def describe_unread(
    unread: Sequence[str], *, answers: Collection[str], columns: Mapping[str, object], settings_name: str
) -> list[str]:
    """Return notes on columns that are not read, and how to read those that look like instructions or options.

    answers: all different answers of the task. columns: what its task.json maps.
    """
    if not unread:
        return []
    notes = [f"columns not read: {list_some(unread, most=12)}"]
    instruction = next((name for name in unread if name.strip().casefold() == "instruction"), None)
    own = columns.get("input", "input")
    if instruction is not None and isinstance(own, str):
        joined = f"{{{instruction}}}\n{own}" if template_fields(own) else [instruction, own]
        mapped = write_columns({**columns, "input": joined})
        notes.append(
            f"each row's {instruction} is not read; to put it before the {own}, write {mapped} into {settings_name}"
        )
    options = find_option_columns(unread)
    words = {word.upper() for name in options for word in (name.strip(), name.strip()[-1:])}
    if options and {answer.upper() for answer in answers} <= words | {str(place) for place in range(len(options))}:
        mapped = write_columns({**columns, "options": options})
        notes.append(f"{', '.join(options)} look like the options; to read them, write {mapped} into {settings_name}")
    return notes


def _find_letters(names: Sequence[str]) -> list[str]:
    folded = {name.strip().upper(): name for name in names}
    found = [folded[letter] for letter in takewhile(folded.__contains__, "ABCDEFGH")]
    return found if len(found) > 1 else []


def _find_chat(record: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    for name, role, content in _CHATS:
        own = keys.get(name)
        turns = record.get(own) if own else None
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            said = next((key for key in (content, "content", "value") if key in turns[-1]), None)
            if said is None:
                continue
            kind = "ShareGPT conversations" if role == "from" else "chat messages"
            more = "" if len(turns) <= 3 else f", of {len(turns)} turns here: this takes the last question and answer"
            return f"a row of {kind}{more}", {"input": f"{own}.-2.{said}", "answer": f"{own}.-1.{said}"}
    return None


def _find_prompted(record: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    """Recognise promptsource's rows, as in P3: texts beside their token ids, and the answer's choices."""
    for source, target in (("inputs_pretokenized", "targets_pretokenized"), ("inputs", "targets")):
        if source not in keys or target not in keys or not isinstance(record[keys[source]], str):
            continue
        mapped: Mapped = {"input": keys[source], "answer": keys[target]}
        choices = record.get(keys.get("answer_choices", ""))
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            mapped["options"] = keys["answer_choices"]
        elif source == "inputs":
            continue  # names alone, which _find_names knows
        return "a row of promptsource's", mapped
    return None


def _find_choices(record: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    """Recognise multiple choice: ARC (choices.text, choices.label, answerKey), MMLU (choices or A to D, answer).

    ARC's own files, and those of OpenBookQA and CommonsenseQA, have the choices inside the question.
    """
    asked = ("question", "input", "ctx", "sentence", "goal", "premise", "query")
    question = next((keys[name] for name in asked if name in keys), None)
    answer = next(
        (keys[n] for n in ("answerkey", "answer", "label", "gold", "answer_index", "correct") if n in keys), None
    )
    if question is None:
        return None
    asked_about = record[question]
    if answer is not None and isinstance(asked_about, dict) and {"stem", "choices"} <= set(asked_about):
        inside = {"input": "stem", "options": "choices.text", "option_labels": "choices.label"}
        return "a row like ARC's", {**{ours: f"{question}.{own}" for ours, own in inside.items()}, "answer": answer}
    source = _with_passage(question, keys)
    own_columns = find_option_columns(list(record))
    if "correct_answer" in keys and own_columns and own_columns[0].casefold().startswith("distractor"):
        right = keys["correct_answer"]
        return "a row like SciQ's", {"input": source, "answer": right, "options": [right, *own_columns]}
    if answer is None:
        return None
    for name in ("choices", "options", "endings"):
        choices = record.get(keys.get(name, name))
        own = keys.get(name, name)
        if isinstance(choices, dict) and not isinstance(choices.get("text"), list):
            continue
        listed = choices if isinstance(choices, list) else [choices]
        with_text = [choice for choice in listed if isinstance(choice, dict) and "text" in choice]
        if listed and len(with_text) == len(listed):
            mapped: Mapped = {"input": source, "answer": answer, "options": f"{own}.text"}
            return "a row like ARC's", mapped | ({"option_labels": f"{own}.label"} if "label" in with_text[0] else {})
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return "a row like MMLU's", {"input": source, "answer": answer, "options": own}
    if own_columns and answer not in own_columns:
        kind = "a row like MMLU's" if len(own_columns[0].strip()) == 1 else "a row with a column per option"
        return kind, {"input": source, "answer": answer, "options": list(own_columns)}
    return None


def _with_passage(question: str, keys: Mapping[str, str]) -> str | list[str]:
    """Return the column of a question, after that of the text it is about if there is one."""
    passage = next((keys[name] for name in _PASSAGES if name in keys and keys[name] != question), None)
    is_question = question.strip().casefold() in ("question", "query")
    return question if passage is None or not is_question else [passage, question]


def _find_squad(record: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    if not {"question", "answers"} <= set(keys):
        return None
    own, answers = keys["answers"], record[keys["answers"]]
    nested = isinstance(answers, dict) and "text" in answers
    nested = nested or (isinstance(answers, list) and all(isinstance(a, dict) and "text" in a for a in answers))
    if not nested and not isinstance(answers, list):
        return None
    source = _with_passage(keys["question"], keys)
    return "a row like SQuAD's", {"input": source, "answer": f"{own}.text" if nested else own}


def _find_alpaca(_: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    if not {"instruction", "output"} <= set(keys):
        return None
    source = [keys["instruction"], keys["input"]] if "input" in keys else keys["instruction"]
    return "a row of alpaca's (instruction, input, output)", {"input": source, "answer": keys["output"]}


def _find_pair(_: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    answer = next((keys[name] for name in _ANSWERS if name in keys), None)
    for first, second in _PAIRS:
        if first in keys and second in keys and answer is not None:
            return f"a row of two texts ({first}, {second})", {"input": [keys[first], keys[second]], "answer": answer}
    return None


def _find_names(record: Mapping[str, object], keys: Mapping[str, str]) -> tuple[str, Mapped] | None:
    """Guess from names alone: an input and another column for the answer must exist."""
    source = keys.get("input") or next((keys[name] for name in _INPUTS if name in keys), None)
    answer = next((keys[name] for name in _ANSWERS if name in keys and keys[name] != source), None)
    if source is None or answer is None or isinstance(record[source], list | dict):
        return None
    if isinstance(record[answer], dict):
        return None
    joined = _with_passage(source, keys)
    inputs = [name for name in ([joined] if isinstance(joined, str) else joined) if name != answer]
    named = " and ".join(map(repr, inputs)) + (" looks like the input" if len(inputs) == 1 else " look like the input")
    mapped: Mapped = {"input": inputs if len(inputs) > 1 else source, "answer": answer}
    return f"{named} and {answer!r} like the answer", mapped
