"""Look at one episode before any training: its text, and which tokens of it are trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
from rich.text import Text

from manyicl.console import show_controls
from manyicl.episodes import (
    Episode,
    EpisodeSettings,
    TaskTokenizer,
    TokenizedEpisode,
    TokenizedTask,
    iter_episodes,
    join_examples,
    lengths_of,
    targets_of,
)
from manyicl.models import load_tokenizer
from manyicl.training import RunConfig, tokenize_tasks


@dataclass(frozen=True, slots=True)
class DrawnEpisode:
    """An episode with its ids and its text, cut at the borders of the answers."""

    episode: Episode
    tokens: TokenizedEpisode
    pieces: tuple[tuple[str, bool], ...]
    """(text, whether it is trained) in order; a trained text is exactly an answer with its terminator."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(label, its name here) of each label that the episode holds; () if labels have their own names."""
    num_templates: int = 1
    """How many templates its task has."""

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is taken on."""
        num_trained = sum(trained for _, trained in self.pieces)
        spans = self.tokens.spans[len(self.tokens.spans) - num_trained :]
        return int((spans[:, 1] - spans[:, 0]).sum())

    @property
    def counts(self) -> str:
        """One line of counts."""
        num_tokens, num_answers = len(self.tokens.ids), sum(trained for _, trained in self.pieces)
        template = f", template {self.episode.template + 1} of {self.num_templates}" if self.num_templates > 1 else ""
        return (
            f"episode {self.episode.index}, task {self.episode.task}, epoch {self.episode.epoch}{template}:"
            f" {len(self.tokens.spans):,} examples, {num_tokens:,} tokens; trained: {num_answers:,} answers,"
            f" {self.num_targets:,} tokens ({self.num_targets / num_tokens:.1%})"
        )

    @property
    def renaming(self) -> str:
        """One line that says what each label of the episode is called; '' if none is renamed."""
        pairs = ", ".join(f"{label} → {name}" for label, name in self.renamed)
        return f"renamed episode: {pairs}" if pairs else ""


def preview_recipe(config: RunConfig, *, number: int = 0) -> DrawnEpisode:
    """Return the `number`-th episode of a recipe's plan.

    Raises:
        UserError: a fault in the recipe's tasks or tokenizer.
    """
    writer = TaskTokenizer(load_tokenizer(config.model), config.template)
    tasks = tokenize_tasks(config, writer)
    plan = iter_episodes(
        [lengths_of(tasks[name]) for name in sorted(tasks)],
        settings=config.episodes,
        seed=config.seed,
        mixing=config.tasks.mixing,
    )
    episode = next(islice(plan, number, None))
    return cut_episode(episode, tasks[episode.task], tokenizer=writer, settings=config.episodes)


def cut_episode(
    episode: Episode, tokenized: TokenizedTask, *, tokenizer: TaskTokenizer, settings: EpisodeSettings
) -> DrawnEpisode:
    """Return the episode's text cut at its spans."""
    tokens = join_examples(
        tokenized, split="train", indices=episode.examples, names=episode.names, template=episode.template
    )
    pieces = []
    at = 0
    trained = range(*targets_of(len(tokens.spans), settings.targets).indices(len(tokens.spans)))
    for place in trained:
        start, stop = (int(edge) for edge in tokens.spans[place])
        pieces += [(tokenizer.decode(tokens.ids[at:start]), False), (tokenizer.decode(tokens.ids[start:stop]), True)]
        at = stop
    return DrawnEpisode(
        episode=episode,
        tokens=tokens,
        pieces=tuple(pieces),
        renamed=_list_renamed(episode, tokenized),
        num_templates=1 + len(tokenized.wordings),
    )


def _list_renamed(episode: Episode, tokenized: TokenizedTask) -> tuple[tuple[str, str], ...]:
    known, names = tokenized.names, episode.names
    if known is None or names is None:
        return ()
    labels = np.unique(known.label_of["train"][episode.examples]).tolist()
    return tuple((known.texts[label], known.texts[names[label]]) for label in labels)


def render_episode(drawn: DrawnEpisode) -> Text:
    """Return the episode for a terminal: trained text on green, its line breaks shown as ⏎, and what a terminal would
    obey as pictures.
    """
    text = Text()
    for piece, trained in ((show_controls(piece), trained) for piece, trained in drawn.pieces):
        for line in piece.splitlines(keepends=True) if trained else ():
            text.append(line.rstrip("\n") + "⏎" * line.endswith("\n"), style="black on green")
            text.append("\n" * line.endswith("\n"))
        if not trained:
            text.append(piece)
    return text
