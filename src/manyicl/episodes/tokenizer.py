"""Text to ids, with the span of every answer known from building them. The only caller of the tokenizer.

Every segment is tokenised on its own, once, and cached; a sequence is nothing but a concatenation of slices of that
cache. So the ids that a query is asked with are an exact prefix of ids that training could have seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
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

CACHE_VERSION = "3"
# Why an example is not used; the words of every table of dropped rows.
TERMINATOR_INSIDE = "terminator inside the answer"
NOT_GIVEN_BACK = "answer the tokenizer cannot give back"

# Tokenizers whose add_bos_token was looked at: it is told once.
_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class ExampleTokens:
    """The kept examples of one split as flat ids; example i is `ids[starts[i]:starts[i + 1]]`.

    ids: int32, all examples joined: [between][input segment][answer][terminator] each.
    starts: int64, (N + 1,), where each example begins.
    answer_starts: int64, (N,), where each answer begins; it ends with its example.
    rows: int32, (N,), the example's index in the task's own split, to find its text again.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    answer_starts: NDArray[np.int64]
    rows: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, `between` included, (N,)."""
        return np.diff(self.starts)

    @property
    def answer_lengths(self) -> NDArray[np.int64]:
        """Tokens of each answer, terminator included, (N,)."""
        return self.starts[1:] - self.answer_starts


class TaskTokenizer:
    """A tokenizer together with the frame that examples are written in.

    frame: of the chat style, the one that a run was trained with; None renders the chat template now. A template may
    write today's date, so a frame that is rendered again tomorrow can be another one.
    end_ids: tokens besides the tokenizer's own end-of-text token that end an answer (`models.load_end_ids`).

    Raises:
        UserError: no chat template, one that cannot be cut into turns, or a terminator that the tokenizer cannot write.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TemplateSettings,
        *,
        frame: Frame | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        from transformers import TokenizersBackend  # loaded long since by whoever made the tokenizer

        self.tokenizer = tokenizer
        self.settings = settings
        # Answers are decoded at each of their tokens: by the Rust decoder itself, five times faster, where transformers
        # would add nothing to it.
        kind: Any = type(tokenizer)
        plain = (kind.decode, getattr(kind, "_decode", None)) == (TokenizersBackend.decode, TokenizersBackend._decode)
        self._backend: Any = tokenizer.backend_tokenizer if plain else None
        # Unknown characters become the unknown token, so it may stand for text; no other special token may.
        added = tokenizer.added_tokens_decoder.items()
        self._specials = {token.content: i for i, token in added if token.special and i != tokenizer.unk_token_id}
        self._special_pattern = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        self.frame = plain_frame(settings) if settings.style == "plain" else frame or self._read_chat_frame()
        bos_id = tokenizer.bos_token_id
        self.bos_ids: list[int] = [] if bos_id is None else [int(bos_id)]
        self.between_ids = self._encode_frame(self.frame.between)
        self.before_answer_ids = self._encode_frame(self.frame.before_answer)
        if self.bos_ids and settings.style == "plain":
            _tell_bos(tokenizer)
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
        """Return the text of `ids`, special tokens included, nothing cleaned up."""
        listed = np.asarray(ids).tolist()
        if self._backend is not None:
            return str(self._backend.decode(listed, skip_special_tokens=False))
        text = self.tokenizer.decode(listed, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of user text: no special tokens added, and none recognised inside it.

        A `</s>` that a row happens to contain stays text; as a special token it would look like a document's end.
        """
        if not texts:
            return []
        encoded = list(self._encode_all(texts))
        for place, ids in enumerate(encoded):
            # A Unigram vocabulary holds the special tokens as pieces: cut in two, their names are not found in it.
            names = list(self._special_pattern.finditer(texts[place]))
            if any(self._specials[name[0]] in ids for name in names):
                cuts = [name.start() + 1 for name in names]
                parts = [texts[place][a:b] for a, b in pairwise([0, *cuts, len(texts[place])])]
                encoded[place] = [i for part in self._encode_all(parts) for i in part]
        return encoded

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each example's input as the frame writes it."""
        written = [input_text(text, settings=self.settings) for text in texts]
        return self.encode_texts([text.strip() for text in written] if self.frame.trims_inputs else written)

    def encode_answers(self, texts: Sequence[str]) -> list[list[int] | str]:
        """Return each answer's ids with its terminator, or the reason why it cannot be used."""
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
        """The text that an answer is over with: the terminator, of a chat template up to its first special token.

        Gemma's template ends a turn by `<end_of_turn>` and a line feed; a model need not write the line feed.
        """
        return self.terminator if self._end_of_turn is None else self.terminator[: self._end_of_turn.end()]

    def has_ended(self, ids: Sequence[int]) -> bool:
        """Return whether the last of the generated `ids` ends the answer."""
        return ids[-1] in self.end_ids or self.end_text in self.decode(ids)

    def cut_answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Return generated ids as text up to where the answer ends, and whether it does.

        It ends at the first of `end_ids`, or at the terminator, which is judged on decoded text, so that a merged
        `.\\n\\n` ends it too.
        """
        place = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids))
        text, terminator, _ = self.decode(ids[:place]).partition(self.end_text)
        if self._end_of_turn is not None and not terminator and place < len(ids):
            text = text.removesuffix(self.terminator[: self._end_of_turn.start()])
        return text, bool(terminator) or place < len(ids)

    def cut_text(self, text: str) -> tuple[str, bool]:
        """Return an answer that came as text, without ids, up to where it ends, and whether it does."""
        marks = [self.end_text, *(self.decode([token]) for token in self.end_ids)]
        places = [place for mark in marks if mark and (place := text.find(mark)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def head_ids(self, task: Task, *, renamed: bool = False) -> NDArray[np.int32]:
        """Return what opens every sequence of `task`, or every renamed one: opening and instruction, once each.

        The opening of the plain style is BOS, if the tokenizer has one; of the chat style it is the template's own,
        which holds BOS if the template writes it.
        """
        opening = self.bos_ids if self.settings.style == "plain" else self._encode_frame(self.frame.opening)
        text = (renamed_instruction_text if renamed else instruction_text)(task, settings=self.settings)
        instruction = self.encode_texts([text.lstrip() if self.frame.trims_inputs else text])[0]
        return np.asarray(opening + instruction, dtype=np.int32)

    def fingerprint(self) -> str:
        """Return a hash of all that decides how text becomes ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        # Padding and truncation that some caller switched on are stored in the same text, and decide nothing here.
        vocabulary = re.sub(r'^\{(.*?)"added_tokens"', "{", vocabulary, count=1, flags=re.DOTALL)
        parts = [CACHE_VERSION, vocabulary, json.dumps(self.settings.model_dump(), sort_keys=True)]
        parts.append(json.dumps(asdict(self.frame), sort_keys=True))
        return hashlib.sha256("\0".join([*parts, repr(self.bos_ids)]).encode()).hexdigest()

    def tokenize_examples(self, examples: Sequence[Example]) -> tuple[ExampleTokens, dict[str, int]]:
        """Return the ids of `examples`, and how many were left out for which reason."""
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
            ids=np.fromiter((i for piece in pieces for i in piece), dtype=np.int32, count=int(starts[-1])),
            starts=starts,
            answer_starts=starts[:-1] + np.asarray(input_lengths, dtype=np.int64),
            rows=np.asarray(rows, dtype=np.int32),
        )
        return tokens, dropped

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _encode_frame(self, text: str) -> list[int]:
        """Return the ids of the template's own text, whose special tokens are meant."""
        if not text:
            return []
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def _terminator_ids(self) -> list[int]:
        """Return ids that, appended to any answer, add the terminator's text and nothing else.

        Made alone, they may carry a word-start mark ('▁' of SentencePiece) that would show as a space before the
        blank line; then the ids that the tokenizer itself writes after a letter are taken, for each special token of
        a chat template's end of turn and the text behind it apart.
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
        """Return the ids that the tokenizer writes for `text` behind the letter a."""
        letter, both = self._encode_frame("a"), self._encode_frame("a" + text)
        return both[len(letter) :] if both[: len(letter)] == letter else self._encode_frame(text)

    def _read_chat_frame(self) -> Frame:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._chat_template()
        # Templates that can write a model's thoughts are rendered without any: an answer follows at once.
        options: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in template else {}

        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            try:
                text = self.tokenizer.apply_chat_template(
                    list(messages),
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
                [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **specials, **options
            )
            ranges = rendered[1]
            return [(int(start), int(end)) for start, end in ranges[0]]

        end_of_text = self.tokenizer.eos_token
        return chat_frame(
            render,
            find_generated=find_generated,
            end_of_text=end_of_text if isinstance(end_of_text, str) else "",
            drops_thoughts=bool(options),
        )

    def _chat_template(self) -> str:
        """Return the tokenizer's chat template.

        Raises:
            UserError: it has none, or several of which none is called 'default'.
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


def _tell_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Log once, in the main process of a launch, that BOS is written although the tokenizer is set to write none."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = str(tokenizer.name_or_path)
    if not name or name in _told or os.environ.get("RANK", "0") != "0":
        return
    _told.add(name)
    # As written: the tokenizer itself says False also if nothing is set.
    if get_tokenizer_config(name, local_files_only=True).get("add_bos_token") is False:
        logging.getLogger("manyicl").warning(
            "%s: its tokenizer says add_bos_token = false, but %r opens every sequence here, in training and in"
            " questions alike; if the model was trained without it, take bos_token out of tokenizer_config.json",
            name,
            tokenizer.bos_token,
        )
