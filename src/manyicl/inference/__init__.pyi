from .answering.generation import Generated, OnIds
from .answering.math_answers import is_same_answer
from .answering.questions import Answer, Answered, answer_queries, ask, write_queries
from .drawing import LONG_TRAIN, draw_shots, most_answer_tokens, prefix_lengths, reorder_shots, write_answers
from .endpoint import Endpoint, EndpointSettings
from .engine import Engine, choose_engine
from .model import InferenceModel, load_for_inference, tokenize_for, trained_shots_of
from .prefix import choose_option
from .prefix_files import ModelKey, load_prefix, model_key, prefix_key, save_prefix
from .tries import build_trie

__all__ = [
    "LONG_TRAIN",
    "Answer",
    "Answered",
    "Endpoint",
    "EndpointSettings",
    "Engine",
    "Generated",
    "InferenceModel",
    "ModelKey",
    "OnIds",
    "answer_queries",
    "ask",
    "build_trie",
    "choose_engine",
    "choose_option",
    "draw_shots",
    "is_same_answer",
    "load_for_inference",
    "load_prefix",
    "model_key",
    "most_answer_tokens",
    "prefix_key",
    "prefix_lengths",
    "reorder_shots",
    "save_prefix",
    "tokenize_for",
    "trained_shots_of",
    "write_answers",
    "write_queries",
]
