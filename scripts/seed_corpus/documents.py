"""The documents that the seed model reads: generated text, tasks of the pretraining pool in many formats, and prose.

No format here is manyicl's own (input, ` ->`, line end, answer, blank line): no text here holds that arrow but Python's
documentation. No rule of a task document is one of the open pool, nor is a class name of it; the text's tables draw
their codes from all words.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import count
from pathlib import Path

from scripts.seed_corpus.text import GENRES, write_document

from manyicl.demo.lexicon import coin_words, load_lexicon
from manyicl.demo.tasks import KINDS, draw_task

# Characters of a document of shots; about 4,000 tokens.
MOST_CHARACTERS = 16000
SIGNS = "|=:>/~;,#*-+.!"
# Weights of the kinds: those whose class is named by a word of the input are where a model learns to read a context.
KIND_WEIGHTS = {"keyword": 3, "topic": 3, "tone": 2, "group": 3, "recall": 3, "linear": 2}


def iter_documents(*, seed: int, shares: Mapping[str, float], start: int = 0, step: int = 1) -> Iterator[str]:
    """Yield documents start, start + step, ... of an endless series; each depends only on the seed and its number.

    shares: weight of each source: "text", "tasks" and "prose".
    """
    names, weights = list(shares), list(shares.values())
    for number in count(start, step):
        rng = random.Random(f"{seed} {number}")
        source = rng.choices(names, weights)[0]
        if source == "text":
            yield write_document(rng.choice(GENRES), rng)
        elif source == "tasks":
            yield write_shots(rng)
        else:
            yield rng.choice(read_prose())


def write_shots(rng: random.Random) -> str:
    """Return examples of one task of the pretraining pool, in a format drawn for this document."""
    kinds = [kind for kind in KINDS if kind.pretrained]
    kind = rng.choices(kinds, [KIND_WEIGHTS.get(kind.name, 1) for kind in kinds])[0]
    task = draw_task(kind, rng, pool="pretraining")
    mark, closing = _draw_mark(rng), _draw_closing(rng)
    opening = f"{_draw_link(rng)}{rng.choice((':', '.', ''))}\n" if rng.random() < 0.5 else ""
    num_examples = int(2 ** rng.uniform(3, 8))
    # A few inputs that come again and again teach copying first, which is where reading a context begins.
    known = [task.rule.write(rng) for _ in range(rng.choice((2, 4, 8, 16, 32)))] if rng.random() < 0.25 else []
    written = [opening]
    length = 0
    for _ in range(num_examples):
        draft = rng.choice(known) if known else task.rule.write(rng)
        line = f"{draft.input}{mark}{draft.answer}{closing}"
        length += len(line)
        if length > MOST_CHARACTERS:
            break
        written.append(line)
    return "".join(written)


def _draw_mark(rng: random.Random) -> str:
    """Return the text between an input and its answer: a word, or signs, but never the arrow of the demo's template."""
    if rng.random() < 0.3:
        return f" {_draw_link(rng)} "
    signs = "".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 3))).replace("->", "=>")
    return rng.choice(("", " ", "\n")) + signs + rng.choice((" ", " ", "\n", "\n  "))


def _draw_closing(rng: random.Random) -> str:
    """Return the text that ends an example: perhaps a sign, then one or two line ends, or a gap."""
    return rng.choice(("", "", ".", ";", " |", ")", "!", " --")) + rng.choice(("\n", "\n", "\n\n", "\n---\n", "\n* "))


def _draw_link(rng: random.Random) -> str:
    lexicon = load_lexicon()
    return rng.choice(
        (coin_words(rng, count=1)[0], rng.choice(lexicon.labels), rng.choice(lexicon.plain), "is", "so", "for")
    )


@lru_cache(maxsize=1)
def read_prose() -> tuple[str, ...]:
    """Return the docstrings of Python's standard library, one per document: plain English on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-s]*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found[text] = None
    return tuple(text for text in found if len(text) > 200)
