from .answering.choices import CONTENT_FREE, score_content_free, weigh_all
from .answering.decoding import cut_at
from .answering.generation import Generated, OnIds, generate_after
from .answering.math_answers import is_same_answer
from .answering.questions import (
    Answer,
    Answered,
    Questions,
    answer_queries,
    answer_questions,
    ask,
    pose_questions,
    write_queries,
)
from .answering.settings import DEFAULT_ANSWERS, AnswerSettings, Decoding, Normalize, check_min_confidence, is_unsure
from .answering.voting import generate_voted, sameness_of
from .budget import ROW_TOKENS, part_of_gpu, process_memory, sharing_gpu
from .drawing import (
    LONG_TRAIN,
    NUM_NEAREST,
    InputIndex,
    ShotPolicy,
    check_choice,
    choose_own_shots,
    draw_shots,
    index_examples,
    most_answer_tokens,
    pick_nearest,
    prefix_lengths,
    reorder_shots,
    write_answers,
)
from .endpoint import Endpoint, EndpointSettings
from .endpoint_calls import PATIENCE_S, EndpointCalls
from .engine import Engine, choose_engine, score_references
from .model import InferenceModel, load_for_inference, tokenize_for, trained_shots_of
from .prefix import check_finite, encode_prefix, score_greedily
from .prefix_files import ModelKey, load_prefix, model_key, prefix_key, save_prefix
from .tries import build_trie

__all__ = [
    "CONTENT_FREE",
    "DEFAULT_ANSWERS",
    "LONG_TRAIN",
    "NUM_NEAREST",
    "PATIENCE_S",
    "ROW_TOKENS",
    "Answer",
    "AnswerSettings",
    "Answered",
    "Decoding",
    "Endpoint",
    "EndpointCalls",
    "EndpointSettings",
    "Engine",
    "Generated",
    "InferenceModel",
    "InputIndex",
    "ModelKey",
    "Normalize",
    "OnIds",
    "Questions",
    "ShotPolicy",
    "answer_queries",
    "answer_questions",
    "ask",
    "build_trie",
    "check_choice",
    "check_finite",
    "check_min_confidence",
    "choose_engine",
    "choose_own_shots",
    "cut_at",
    "draw_shots",
    "encode_prefix",
    "generate_after",
    "generate_voted",
    "index_examples",
    "is_same_answer",
    "is_unsure",
    "load_for_inference",
    "load_prefix",
    "model_key",
    "most_answer_tokens",
    "part_of_gpu",
    "pick_nearest",
    "pose_questions",
    "prefix_key",
    "prefix_lengths",
    "process_memory",
    "reorder_shots",
    "sameness_of",
    "save_prefix",
    "score_content_free",
    "score_greedily",
    "score_references",
    "sharing_gpu",
    "tokenize_for",
    "trained_shots_of",
    "weigh_all",
    "write_answers",
    "write_queries",
]
