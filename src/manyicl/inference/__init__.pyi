from .drawing import LONG_TRAIN, draw_shots, most_answer_tokens, prefix_lengths, reorder_shots, write_answers
from .endpoint import Endpoint, EndpointSettings, UnansweredError
from .generation import Generated, generate_and_score
from .model import InferenceModel, load_for_inference, tokenize_for, trained_shots_of
from .prefix import EngineCount, choose_option, device_of, encode_prefix, score_choices
from .questions import Answer, ask, describe_answers, read_inputs
from .sharing import can_share_prefix, sharing_fault
from .tries import build_trie

__all__ = [
    "LONG_TRAIN",
    "Answer",
    "Endpoint",
    "EndpointSettings",
    "EngineCount",
    "Generated",
    "InferenceModel",
    "UnansweredError",
    "ask",
    "build_trie",
    "can_share_prefix",
    "choose_option",
    "describe_answers",
    "device_of",
    "draw_shots",
    "encode_prefix",
    "generate_and_score",
    "load_for_inference",
    "most_answer_tokens",
    "prefix_lengths",
    "read_inputs",
    "reorder_shots",
    "score_choices",
    "sharing_fault",
    "tokenize_for",
    "trained_shots_of",
    "write_answers",
]
