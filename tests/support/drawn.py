"""An episode of one task, without a recipe."""

from __future__ import annotations

from itertools import islice

from transformers import PreTrainedTokenizerBase

from manyicl.episodes.plan import EpisodeSettings, iter_episodes
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import lengths_of, tokenize_task, with_names
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.planning.preview import DrawnEpisode, cut_episode
from manyicl.tasks.task import Task


def draw_episode(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: EpisodeSettings,
    template: TemplateSettings | None = None,
    number: int = 0,
) -> DrawnEpisode:
    """Return the `number`-th episode that training on `task` alone would see."""
    writer = TaskTokenizer(tokenizer, template or TemplateSettings())
    tokenized = tokenize_task(task, tokenizer=writer)
    if settings.rename_share:
        tokenized = with_names(tokenized, tokenizer=writer)
    episode = next(islice(iter_episodes([lengths_of(tokenized)], settings=settings, seed=0), number, None))
    return cut_episode(episode, tokenized, tokenizer=writer, settings=settings)
