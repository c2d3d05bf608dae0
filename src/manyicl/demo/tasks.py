"""Generated tasks, unlimited in number: each has a hidden rule that only its shots, or training on it, can reveal.

A task depends only on its pool, the seed and its number. Its name and instruction are coined words, so that they reveal
nothing about the rule. Rules have no noise: the input and the rule give one answer, so the best possible score is 1.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from manyicl.demo import arithmetic, classification, nli, qa, summarization
from manyicl.demo.lexicon import coin_words, load_lexicon
from manyicl.demo.rules import Draft, DrawRule, Rule, Words
from manyicl.errors import UserError
from manyicl.files import write_atomically
from manyicl.locks import new_folder

Pool = Literal["pretraining", "open"]

METRICS: Mapping[str, str] = {
    "classification": "accuracy",
    "nli": "accuracy",
    "qa": "exact_match",
    "summarization": "rouge_l",
    "math": "math_exact_match",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of task."""

    name: str
    family: str
    """The family of tasks, such as "qa"."""
    draw_rule: DrawRule
    """Draws the hidden rule of one task."""
    pretrained: bool
    """Whether the seed model's text has other tasks of this kind, in other formats."""


KINDS: tuple[Kind, ...] = (
    Kind("topic", "classification", classification.draw_topic, pretrained=True),
    Kind("tone", "classification", classification.draw_tone, pretrained=True),
    Kind("keyword", "classification", classification.draw_keyword, pretrained=True),
    Kind("group", "classification", classification.draw_group, pretrained=True),
    Kind("form", "classification", classification.draw_form, pretrained=False),
    Kind("size", "nli", nli.draw_size, pretrained=True),
    Kind("containment", "nli", nli.draw_containment, pretrained=True),
    Kind("negation", "nli", nli.draw_negation, pretrained=False),
    Kind("quantity", "nli", nli.draw_quantity, pretrained=False),
    Kind("implication", "nli", nli.draw_implication, pretrained=False),
    Kind("fact", "qa", qa.draw_fact, pretrained=True),
    Kind("lookup", "qa", qa.draw_lookup, pretrained=True),
    Kind("two_hop", "qa", qa.draw_two_hop, pretrained=False),
    Kind("yes_no", "qa", qa.draw_yes_no, pretrained=False),
    Kind("choice", "qa", qa.draw_choice, pretrained=False),
    Kind("recall", "qa", qa.draw_recall, pretrained=True),
    Kind("title", "summarization", summarization.draw_title, pretrained=True),
    Kind("line", "summarization", summarization.draw_line, pretrained=False),
    Kind("gist", "summarization", summarization.draw_gist, pretrained=True),
    Kind("section", "summarization", summarization.draw_section, pretrained=False),
    Kind("story", "math", arithmetic.draw_story, pretrained=True),
    Kind("linear", "math", arithmetic.draw_linear, pretrained=True),
    Kind("price", "math", arithmetic.draw_price, pretrained=True),
    Kind("pick", "math", arithmetic.draw_pick, pretrained=True),
    Kind("tally", "math", arithmetic.draw_tally, pretrained=False),
)


@dataclass(frozen=True, slots=True)
class WorldTask:
    """One generated task: its rule, and a name and an instruction that do not give it away."""

    name: str
    kind: Kind
    instruction: str
    rule: Rule

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two tasks that ask the same."""
        return (self.kind.name, *self.rule.parameters)

    def draw_examples(self, rng: random.Random, *, count: int) -> list[Draft]:
        """Return `count` examples with different inputs; fewer if the rule has no more inputs."""
        drafts: dict[str, Draft] = {}
        for _ in range(50 * count):
            if len(drafts) == count:
                break
            draft = self.rule.write(rng)
            drafts.setdefault(draft.input, draft)
        return list(drafts.values())


def find_kinds(names: Sequence[str] | None = None) -> tuple[Kind, ...]:
    """Return the kinds of these names, in the order of KINDS; all kinds if `names` is None."""
    return tuple(kind for kind in KINDS if names is None or kind.name in names)


def pool_words(pool: Pool) -> Words:
    """Return the words for a pool's rules. No label word is in both pools."""
    lexicon = load_lexicon()
    return Words(lexicon, lexicon.labels[0::2] if pool == "pretraining" else lexicon.labels[1::2])


def draw_task(kind: Kind, rng: random.Random, *, pool: Pool) -> WorldTask:
    """Return a task of one kind whose rule belongs to `pool`. No rule belongs to both pools."""
    words = pool_words(pool)
    while True:
        rule = kind.draw_rule(rng, words)
        spellings = (rule.parameters, *rule.twins)
        in_pretraining = any(zlib.crc32(repr((kind.name, spelt)).encode()) % 2 == 0 for spelt in spellings)
        if in_pretraining == (pool == "pretraining"):
            break
    coined = "".join(coin_words(rng, count=2))
    return WorldTask(name=f"{kind.name}_{coined}", kind=kind, instruction=f"{coined}:\n", rule=rule)


def iter_tasks(kinds: Sequence[Kind], *, seed: int, pool: Pool) -> Iterator[WorldTask]:
    """Yield different tasks, the kinds in turn.

    A kind whose rules are used up drops out; the series ends with the last kind.
    """
    seen: set[tuple[object, ...]] = set()
    rng = random.Random(f"{pool} {seed}")
    left = list(kinds)
    while left:
        for kind in tuple(left):
            task = next(
                (t for t in (draw_task(kind, rng, pool=pool) for _ in range(200)) if t.identity not in seen), None
            )
            if task is None:
                left.remove(kind)
                continue
            seen.add(task.identity)
            yield task


def export_tasks(folder: Path, *, num_tasks: int, num_train: int, num_test: int, seed: int) -> None:
    """Write open-pool tasks of all kinds as task files into a new folder.

    Raises:
        UserError: a number is below 1, the folder exists, or a rule has too few inputs for that many rows.
    """
    if min(num_tasks, num_train, num_test) < 1:
        raise UserError(f"num_tasks={num_tasks}, num_train={num_train}, num_test={num_test}: need at least 1 each")
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    tasks = list(islice(iter_tasks(KINDS, seed=seed, pool="open"), num_tasks))
    with new_folder(folder) as partial:
        write_tasks(partial, tasks, num_train=num_train, num_test=num_test, seed=seed)


def write_tasks(folder: Path, tasks: Sequence[WorldTask], *, num_train: int, num_test: int, seed: int) -> None:
    """Write each task as a task file with its task.json; no input is in two splits.

    Raises:
        UserError: a rule has too few inputs for that many rows.
    """
    for task in tasks:
        drafts = task.draw_examples(random.Random(f"{task.name} {seed}"), count=num_train + num_test)
        if len(drafts) < num_train + num_test:
            raise UserError(
                f"task '{task.name}': has only {len(drafts)} different inputs, not {num_train} for training and"
                f" {num_test} for testing; ask for fewer"
            )
        rows = [_make_row(draft, split="train" if n < num_train else "test") for n, draft in enumerate(drafts)]
        settings = {
            "family": task.kind.family,
            "metric": "accuracy" if drafts[0].options else METRICS[task.kind.family],
            "instruction": task.instruction,
            **({"labels": list(task.rule.labels)} if task.rule.labels else {}),
        }
        write_atomically(folder / f"{task.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomically(folder / f"{task.name}.task.json", json.dumps(settings, indent=1) + "\n")


def _make_row(draft: Draft, *, split: str) -> dict[str, object]:
    row: dict[str, object] = {"input": draft.input, "answer": draft.answer, "split": split}
    return row | ({"options": list(draft.options)} if draft.options else {})
