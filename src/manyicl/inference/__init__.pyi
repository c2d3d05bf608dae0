from .endpoint import Endpoint, EndpointSettings, UnansweredError
from .generation import Generated, generate_and_score, generate_behind
from .prefix import EngineCount, choose_option, device_of, encode_prefix, score_answers, score_choices
from .prefix_trial import TRIAL_TOKENS
from .sharing import can_share_prefix, sharing_fault
from .tries import build_trie

__all__ = [
    "TRIAL_TOKENS",
    "Endpoint",
    "EndpointSettings",
    "EngineCount",
    "Generated",
    "UnansweredError",
    "build_trie",
    "can_share_prefix",
    "choose_option",
    "device_of",
    "encode_prefix",
    "generate_and_score",
    "generate_behind",
    "score_answers",
    "score_choices",
    "sharing_fault",
]
