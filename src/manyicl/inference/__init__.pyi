from .drawing import LONG_TRAIN, draw_shots, most_answer_tokens, prefix_lengths, reorder_shots, write_answers
from .endpoint import Endpoint, EndpointSettings
from .engine import Engine, choose_engine
from .generation import Generated
from .model import InferenceModel, load_for_inference, tokenize_for, trained_shots_of
from .prefix import choose_option
from .questions import Answer, ask
from .tries import build_trie

__all__ = [
    "LONG_TRAIN",
    "Answer",
    "Endpoint",
    "EndpointSettings",
    "Engine",
    "Generated",
    "InferenceModel",
    "ask",
    "build_trie",
    "choose_engine",
    "choose_option",
    "draw_shots",
    "load_for_inference",
    "most_answer_tokens",
    "prefix_lengths",
    "reorder_shots",
    "tokenize_for",
    "trained_shots_of",
    "write_answers",
]
