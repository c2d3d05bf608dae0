from .attention.dispatch import (
    EMPTY_PREFIX,
    KeySink,
    KeyValueBuffer,
    Prefix,
    RowLayout,
    attend_segments,
    drops_attention,
    inner_model,
    segment_attention,
)
from .attention.flash import flash_implementation
from .attention.segments import forget_kernels, kernels_taken
from .compiled_pieces import check_compiler, fused_pieces
from .costs import ModelShape, WeightCounts, count_flops, count_weights, shape_model
from .heads import float32_head
from .isolation import TRIAL_TOKENS, isolation_fault, own_attention, refuse_unusable, row_attention
from .lean_layers import lean_pieces
from .loading import (
    MODEL_FILES,
    RUN_MODEL,
    RUN_STATE,
    LoraSettings,
    ModelNote,
    ModelSettings,
    add_adapter,
    fingerprint_weights,
    load_config,
    load_end_ids,
    load_model,
    load_tokenizer,
    locate_model,
    read_note,
)
from .loss import MOST_LOGITS, AnswerLoss, row_loss, target_logits
from .precision import Precision, PrecisionChoice, multiplies_bf16, resolve_precision
from .saving import hash_weights, merge_adapter, save_beside_weights
from .seed import NEUTRAL_TEXT, TEMPLATE
from .structure import head_dims, key_heads, layer_values, longest_boundary
from .trials import logit_difference, trial_ids
from .windows import check_vocabulary, check_window, find_max_tokens, max_tokens_of

__all__ = [
    "EMPTY_PREFIX",
    "MODEL_FILES",
    "MOST_LOGITS",
    "NEUTRAL_TEXT",
    "RUN_MODEL",
    "RUN_STATE",
    "TEMPLATE",
    "TRIAL_TOKENS",
    "AnswerLoss",
    "KeySink",
    "KeyValueBuffer",
    "LoraSettings",
    "ModelNote",
    "ModelSettings",
    "ModelShape",
    "Precision",
    "PrecisionChoice",
    "Prefix",
    "RowLayout",
    "WeightCounts",
    "add_adapter",
    "attend_segments",
    "check_compiler",
    "check_vocabulary",
    "check_window",
    "count_flops",
    "count_weights",
    "drops_attention",
    "find_max_tokens",
    "fingerprint_weights",
    "flash_implementation",
    "float32_head",
    "forget_kernels",
    "fused_pieces",
    "hash_weights",
    "head_dims",
    "inner_model",
    "isolation_fault",
    "kernels_taken",
    "key_heads",
    "layer_values",
    "lean_pieces",
    "load_config",
    "load_end_ids",
    "load_model",
    "load_tokenizer",
    "locate_model",
    "logit_difference",
    "longest_boundary",
    "max_tokens_of",
    "merge_adapter",
    "multiplies_bf16",
    "own_attention",
    "read_note",
    "refuse_unusable",
    "resolve_precision",
    "row_attention",
    "row_loss",
    "save_beside_weights",
    "segment_attention",
    "shape_model",
    "target_logits",
    "trial_ids",
]
