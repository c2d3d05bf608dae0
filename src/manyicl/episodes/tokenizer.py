"""Text to token ids, with the span of each answer known by construction. The only caller of the tokenizer.

Every segment is tokenised separately, once, and cached; a sequence is a concatenation of slices of that cache. So the
ids of a query at inference are an exact prefix of ids that training could have seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from manyicl.episodes.template import (
    Frame,
    Message,
    TemplateSettings,
    chat_frame,
    input_text,
    instruction_text,
    plain_frame,
    renamed_instruction_text,
)
from manyicl.errors import UserError
from manyicl.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every cache key; raised if the same text gives other ids than before.
CACHE_VERSION = "3"
# Reasons to drop an example, as every table of dropped rows writes them.
TERMINATOR_INSIDE = "terminator inside the answer"
NOT_GIVEN_BACK = "answer the tokenizer cannot give back"

# Held while a tokenizer encodes: whether special tokens are recognised is a state of it, which each call may change.
_encoding = threading.Lock()
# Tokenizers whose add_bos_token has been checked, so that the warning is logged once.
_checked: set[str] = set()


@dataclass(frozen=True, slots=True)
class ExampleTokens:
    """The usable examples of one split as flat ids; example i is `ids[starts[i]:starts[i + 1]]`."""

    ids: NDArray[np.int32]
    """All examples joined, each as [between][input segment][answer][terminator]."""
    starts: NDArray[np.int64]
    """(N + 1,), where each example begins, then the end of the last."""
    answer_starts: NDArray[np.int64]
    """(N,), where each answer begins; it ends with its example."""
    rows: NDArray[np.int32]
    """(N,), each example's index in the task's split, where its text is."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,), tokens of each example, `between` included."""
        return np.diff(self.starts)

    @property
    def answer_lengths(self) -> NDArray[np.int64]:
        """(N,), tokens of each answer, terminator included."""
        return self.starts[1:] - self.answer_starts


class TaskTokenizer:
    """A tokenizer with the frame in which examples are written.

    frame: chat style: the frame that a run was trained with; default: rendered from the chat template now. A template
    may write the date, so a frame rendered on another day can differ.
    end_ids: tokens that end an answer, besides the tokenizer's own end-of-text token (`models.load_end_ids`).

    Raises:
        UserError: there is no chat template, it cannot be split into turns, or the tokenizer cannot write the
            terminator.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TemplateSettings,
        *,
        frame: Frame | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        from transformers import TokenizersBackend  # already imported: the tokenizer came from transformers

        self.tokenizer = tokenizer
        self.settings = settings
        # Generation decodes an answer after each of its tokens. The Rust decoder alone is five times faster than
        # transformers' decode; use it directly if transformers would do nothing else.
        kind: Any = type(tokenizer)
        plain = (kind.decode, getattr(kind, "_decode", None)) == (TokenizersBackend.decode, TokenizersBackend._decode)
        self._backend: Any = tokenizer.backend_tokenizer if plain else None
        # No special token may occur in user text, except the unknown token, which stands for unknown characters.
        added = tokenizer.added_tokens_decoder.items()
        self._specials = {token.content: i for i, token in added if token.special and i != tokenizer.unk_token_id}
        self._special_pattern = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        self.frame = plain_frame(settings) if settings.style == "plain" else frame or self._read_chat_frame()
        bos_id = tokenizer.bos_token_id
        self.bos_ids: list[int] = [] if bos_id is None else [int(bos_id)]
        self.between_ids = self._encode_frame(self.frame.between)
        self.before_answer_ids = self._encode_frame(self.frame.before_answer)
        if self.bos_ids and settings.style == "plain":
            _warn_of_bos(tokenizer)
        self.terminator_ids = self._terminator_ids()
        self._end_of_turn = self._special_pattern.search(self.frame.terminator) if settings.style == "chat" else None
        own_ids = [] if self._end_of_turn is None else [self._specials[self._end_of_turn[0]]]
        if tokenizer.eos_token_id is not None:
            own_ids.append(int(tokenizer.eos_token_id))
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([*own_ids, *end_ids]))

    @property
    def terminator(self) -> str:
        """The text that ends every answer."""
        return self.frame.terminator

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Return the text of `ids`, special tokens included, without any clean-up."""
        listed = np.asarray(ids).tolist()
        if self._backend is not None:
            return str(self._backend.decode(listed, skip_special_tokens=False))
        text = self.tokenizer.decode(listed, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of user text: without special tokens, added or recognised in it.

        A `</s>` in a row stays text. As a special token it would look like the end of a document.
        """
        if not texts:
            return []
        encoded = list(self._encode_all(texts))
        for place, ids in enumerate(encoded):
            # A Unigram vocabulary has the special tokens as ordinary pieces too: cut their names in two to avoid them.
            names = list(self._special_pattern.finditer(texts[place]))
            if any(self._specials[name[0]] in ids for name in names):
                cuts = [name.start() + 1 for name in names]
                parts = [texts[place][a:b] for a, b in pairwise([0, *cuts, len(texts[place])])]
                encoded[place] = [i for part in self._encode_all(parts) for i in part]
        return encoded

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each input as the frame writes it."""
        written = [input_text(text, settings=self.settings) for text in texts]
        return self.encode_texts([text.strip() for text in written] if self.frame.trims_inputs else written)

    def encode_answers(self, texts: Sequence[str]) -> list[list[int] | str]:
        """Return the ids of each answer with its terminator, or the reason why it cannot be used."""
        if self.frame.trims_answers:
            texts = [text.strip() for text in texts]
        distinct = sorted(set(texts))
        known: dict[str, list[int] | str] = {}
        for text, ids in zip(distinct, self.encode_texts(distinct), strict=True):
            whole = ids + self.terminator_ids
            if (text + self.terminator).find(self.end_text) != len(text):
                known[text] = TERMINATOR_INSIDE
            elif self.tokenizer.unk_token_id in ids or self.decode(whole) != text + self.terminator:
                known[text] = NOT_GIVEN_BACK
            else:
                known[text] = whole
        return [known[text] for text in texts]

    @property
    def end_text(self) -> str:
        """The text that ends an answer: the terminator; of a chat template's only up to its first special token.

        Gemma's template ends a turn with `<end_of_turn>` and a line feed, and a model may omit the line feed.
        """
        return self.terminator if self._end_of_turn is None else self.terminator[: self._end_of_turn.end()]

    def has_ended(self, ids: Sequence[int]) -> bool:
        """Return whether the last of the generated `ids` ends the answer."""
        return ids[-1] in self.end_ids or self.end_text in self.decode(ids)

    def cut_answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of generated ids up to the end of the answer, and whether the answer ends.

        It ends at the first of `end_ids` or at the terminator. The terminator is searched in decoded text, so that a
        merged token such as `.\\n\\n` ends the answer too.
        """
        place = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids))
        text, terminator, _ = self.decode(ids[:place]).partition(self.end_text)
        if self._end_of_turn is not None and not terminator and place < len(ids):
            text = text.removesuffix(self.terminator[: self._end_of_turn.start()])
        return text, bool(terminator) or place < len(ids)

    def cut_text(self, text: str) -> tuple[str, bool]:
        """Return an answer that came as text, not ids, up to its end, and whether it ends."""
        marks = [self.end_text, *(self.decode([token]) for token in self.end_ids)]
        places = [place for mark in marks if mark and (place := text.find(mark)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def head_ids(self, task: Task, *, renamed: bool = False) -> NDArray[np.int32]:
        """Return the ids before the first example of every sequence of `task`: opening and instruction.

        In the plain style the opening is BOS, if the tokenizer has one. In the chat style it is the template's, with
        BOS if the template writes it. renamed: of renamed episodes, whose instruction must not name a label.
        """
        opening = self.bos_ids if self.settings.style == "plain" else self._encode_frame(self.frame.opening)
        text = (renamed_instruction_text if renamed else instruction_text)(task, settings=self.settings)
        instruction = self.encode_texts([text.lstrip() if self.frame.trims_inputs else text])[0]
        return np.asarray(opening + instruction, dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text becomes ids. It takes half a second for Gemma's vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        # Cut out padding and truncation, which a caller may have switched on: they don't matter here.
        vocabulary = re.sub(r'^\{(.*?)"added_tokens"', "{", vocabulary, count=1, flags=re.DOTALL)
        # Without a system prompt it is the fingerprint of earlier versions, which had none.
        settings = self.settings.model_dump(exclude=set() if self.settings.system else {"system"})
        parts = [CACHE_VERSION, vocabulary, json.dumps(settings, sort_keys=True)]
        parts.append(json.dumps(asdict(self.frame), sort_keys=True))
        return hashlib.sha256("\0".join([*parts, repr(self.bos_ids)]).encode()).hexdigest()

    def tokenize_examples(self, examples: Sequence[Example]) -> tuple[ExampleTokens, dict[str, int]]:
        """Return the ids of `examples`, and the number of those left out, by reason."""
        inputs = self.encode_inputs([e.input for e in examples])
        answers = self.encode_answers([e.answer for e in examples])
        dropped: dict[str, int] = {}
        pieces: list[list[int]] = []
        rows, lengths, input_lengths = [], [], []
        for row, (ids, answer) in enumerate(zip(inputs, answers, strict=True)):
            if isinstance(answer, str):
                dropped[answer] = dropped.get(answer, 0) + 1
                continue
            before = self.between_ids + ids + self.before_answer_ids
            pieces += [before, answer]
            rows.append(row)
            input_lengths.append(len(before))
            lengths.append(len(before) + len(answer))
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        tokens = ExampleTokens(
            ids=np.fromiter(chain.from_iterable(pieces), dtype=np.int32, count=int(starts[-1])),
            starts=starts,
            answer_starts=starts[:-1] + np.asarray(input_lengths, dtype=np.int64),
            rows=np.asarray(rows, dtype=np.int32),
        )
        return tokens, dropped

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        with _encoding:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _encode_frame(self, text: str) -> list[int]:
        """Return the ids of the frame's text, in which special tokens are recognised."""
        if not text:
            return []
        with _encoding:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def _terminator_ids(self) -> list[int]:
        """Return ids that, appended to any answer, add exactly the terminator's text.

        Tokenised by itself, the terminator may get a mark of a word's start (SentencePiece's '▁'), which decodes to a
        space. Then its ids after a letter are used, separately for each special token of a chat template's end of turn
        and for the text between and after them.
        """
        text = self.frame.terminator
        probes = [(p, ids) for p in ("a", "yes", "9.", "b c") if self.decode(ids := self._encode_frame(p)) == p]
        cuts = [place for match in self._special_pattern.finditer(text) for place in match.span()]
        parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        after_letter = [i for part in parts for i in self._encode_after_letter(part)]
        for candidate in (self._encode_frame(text), after_letter):
            if candidate and probes and all(self.decode(ids + candidate) == p + text for p, ids in probes):
                return candidate
        if self.settings.style == "chat":
            raise UserError(
                f"template.style = 'chat': this tokenizer cannot write {text!r}, the chat template's end of turn, after"
                " an answer; set template.style = 'plain'"
            )
        raise UserError(
            f"template.terminator = {text!r}: this tokenizer cannot write it after an answer; set another one,"
            " such as template.terminator = ' ;'"
        )

    def _encode_after_letter(self, text: str) -> list[int]:
        """Return the ids of `text` after the letter a."""
        letter, both = self._encode_frame("a"), self._encode_frame("a" + text)
        return both[len(letter) :] if both[: len(letter)] == letter else self._encode_frame(text)

    def _read_chat_frame(self) -> Frame:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._chat_template()
        system: list[Message] = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        if self._special_pattern.search(self.settings.system):
            raise UserError("template.system: holds a special token of the tokenizer; write it without")
        options: dict[str, Any] = without_thinking(template)

        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            try:
                text = self.tokenizer.apply_chat_template(
                    [*system, *messages],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **options,
                )
            except TemplateError as error:
                raise UserError(f"template.style = 'chat': the tokenizer's chat template fails: {error}") from error
            assert isinstance(text, str)
            return text

        def find_generated(messages: Sequence[Message]) -> Sequence[tuple[int, int]]:
            if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
                return []
            specials: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
            rendered: Any = render_jinja_template(
                [[*system, *messages]], chat_template=template, return_assistant_tokens_mask=True, **specials, **options
            )
            ranges = rendered[1]
            return [(int(start), int(end)) for start, end in ranges[0]]

        end_of_text = self.tokenizer.eos_token
        frame = chat_frame(
            render,
            find_generated=find_generated,
            end_of_text=end_of_text if isinstance(end_of_text, str) else "",
            drops_thoughts=bool(options),
        )
        if self.settings.system.strip() not in frame.opening:
            raise UserError(
                "template.system: the tokenizer's chat template leaves a system prompt out; put the text into the"
                " tasks' instruction instead"
            )
        return frame

    def _chat_template(self) -> str:
        """Return the tokenizer's chat template.

        Raises:
            UserError: it has none, or several and none is called 'default'.
        """
        template = self.tokenizer.chat_template
        if not template:
            raise UserError("template.style = 'chat': the tokenizer has no chat template; set template.style = 'plain'")
        if isinstance(template, str):
            return template
        if "default" in template:
            return str(template["default"])
        raise UserError(
            f"template.style = 'chat': the tokenizer has several chat templates ({', '.join(sorted(template))}), none"
            " called 'default'; save it with the one to use as tokenizer.chat_template, or set template.style ="
            " 'plain'"
        )


def _warn_of_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if sequences begin with BOS although the tokenizer's settings say not to write it; once, on rank 0."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = str(tokenizer.name_or_path)
    if not name or name in _checked or os.environ.get("RANK", "0") != "0":
        return
    _checked.add(name)
    # Read from the file: the tokenizer's attribute is False even if nothing is set.
    if get_tokenizer_config(name, local_files_only=True).get("add_bos_token") is False:
        logging.getLogger("manyicl").warning(
            "%s: its tokenizer says add_bos_token = false, but here every sequence begins with %r, in training and in"
            " evaluation; if the model was trained without it, remove bos_token from tokenizer_config.json",
            name,
            tokenizer.bos_token,
        )


def without_thinking(template: str) -> dict[str, bool]:
    """Return the variables with which a chat template is written without a thought, so that the answer follows at once.

    They are none if the template has no switch for it.
    """
    return {"enable_thinking": False} if "enable_thinking" in template else {}
