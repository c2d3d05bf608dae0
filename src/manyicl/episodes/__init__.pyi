from .batch import (
    Batch,
    BatchMaker,
    Divisors,
    Normalization,
    PackDataset,
    join_row,
    pad_row,
    split_row,
    targets_of,
)
from .packing import Pack, pack_episodes
from .plan import TOO_LONG, Episode, EpisodeSettings, Targets, iter_episodes
from .segments import Segments
from .template import Frame, TemplateSettings
from .tokenized import (
    TokenizedEpisode,
    TokenizedTask,
    answer_lengths_of,
    check_lost_answers,
    default_cache_dir,
    join_examples,
    lengths_of,
    query_ids,
    tokenize_task,
    with_names,
)
from .tokenizer import ExampleTokens, TaskTokenizer

__all__ = [
    "TOO_LONG",
    "Batch",
    "BatchMaker",
    "Divisors",
    "Episode",
    "EpisodeSettings",
    "ExampleTokens",
    "Frame",
    "Normalization",
    "Pack",
    "PackDataset",
    "Segments",
    "Targets",
    "TaskTokenizer",
    "TemplateSettings",
    "TokenizedEpisode",
    "TokenizedTask",
    "answer_lengths_of",
    "check_lost_answers",
    "default_cache_dir",
    "iter_episodes",
    "join_examples",
    "join_row",
    "lengths_of",
    "pack_episodes",
    "pad_row",
    "query_ids",
    "split_row",
    "targets_of",
    "tokenize_task",
    "with_names",
]
