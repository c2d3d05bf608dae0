"""How many tokens a model can read, and whether a tokenizer fits its embedding."""

from __future__ import annotations

from typing import Any

from manyicl.errors import UserError
from manyicl.models.loading import ModelSettings, load_config, read_note
from manyicl.models.structure import common_window


def check_window(config: Any, *, num_tokens: int, what: str) -> None:
    """Refuse sequences longer than the model can use.

    Raises:
        UserError: `num_tokens` exceeds the maximum positions, or the window where every layer's attention slides.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        raise UserError(
            f"{what} = {num_tokens}: the model knows {limit} positions (max_position_embeddings); lower it, or extend"
            " the positions on purpose with model.config.max_position_embeddings and model.config.rope_parameters"
        )
    window = common_window(config)
    if window is not None and num_tokens > window:
        raise UserError(
            f"{what} = {num_tokens}: every layer of the model sees only the last {window} tokens (sliding_window), and"
            f" such models collapse beyond it; set it to at most {window}, or model.config.sliding_window = 'none'"
        )


def check_vocabulary(config: Any, *, path: str, num_tokens: int) -> None:
    """Refuse ids that the model has no embedding for, which would end deep inside of it.

    Raises:
        UserError: `num_tokens`, one more than the largest id in use, exceeds the rows of the embedding.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and num_tokens > rows:
        raise UserError(
            f"{path}: its tokenizer writes token {num_tokens - 1:,}, but the model has only {rows:,}; use the tokenizer"
            " that belongs to it, or give the model more rows (resize_token_embeddings) and save it"
        )


def max_tokens_of(config: Any) -> int:
    """Return the longest sequence that the model can use.

    Raises:
        UserError: its config does not say.
    """
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), common_window(config)]
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise UserError(f"`max_tokens`: a {config.model_type} model does not say how long a sequence may be; say it")
    return min(known)


def find_max_tokens(path: str) -> int | None:
    """Return the longest sequence that the model at `path` is asked with by default; None if it does not say."""
    try:
        most = max_tokens_of(load_config(ModelSettings(path=path)))
    except UserError:
        return None
    return min(most, read_note(path).token_budget or most)
