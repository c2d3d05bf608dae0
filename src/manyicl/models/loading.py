"""Load and save a causal language model, its tokenizer and its adapter."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from manyicl.episodes import Frame, TemplateSettings
from manyicl.errors import UserError, suggest, suggest_near
from manyicl.models.places import GIVE_MODEL, PACKAGED, find_source, locate_model, read_adapter
from manyicl.models.precision import (
    PrecisionChoice,
    Quantization,
    find_slow_precision,
    limit_kernel_caches,
    resolve_precision,
)
from manyicl.models.quantization.float8 import TOLD, check_float8, store_in_float8
from manyicl.models.quantization.nf4 import check_bitsandbytes, keep_layout, nf4_options, warn_of_blocks
from manyicl.models.structure import check_modules, max_tokens_of

_NEEDS_BF16 = f"{TOLD}: its products are in bfloat16; set model.precision = 'bf16', or leave it out"
# Beside the weights: how examples were written in training, so that whoever asks writes them alike.
MODEL_NOTE = "manyicl.json"
# What save_pretrained writes of a model or an adapter beside its weights.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
# Of which nearly every tokenizer has one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class LoraSettings(BaseModel):
    """A low-rank adapter (peft) on a frozen base."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of each adapter. On SmolLM2, 16 at ten times the rate answered new tasks after many shots as well as
    training all weights did (0.0 points [-0.9, 0.9]) and trained tasks 2.1 points [1.2, 2.9] worse; at the same rate
    it was 5 points worse on both. 64 at ten times the rate answered both about as well, and new ones after 16
    shots 1.2 [0.1, 2.4] worse (docs/results.md, "Which default?")."""
    alpha: Annotated[int, Field(gt=0)] = 32
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""
    modules: str | tuple[str, ...] = "all-linear"
    """'all-linear' (the head never), names of layers, or one regular expression."""


class ModelSettings(BaseModel):
    """Which model is fine-tuned, and how it is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """A folder in Hugging Face layout, a run, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    precision: PrecisionChoice = "auto"
    """Precision of the products: 'auto' (bf16 if the device multiplies it in hardware, else fp32), 'bf16' or 'fp32'.
    Trained weights stay fp32; a frozen base is stored in this precision."""
    quantize: Quantization | None = None
    """Store the linear layers of a frozen base in 4 bits, 'nf4' (QLoRA; double quantisation), or in 8, 'float8', which
    are multiplied as they are: faster on GPUs with units for it, if layers are compiled. Needs `lora` to train."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Changes to the model's own config.json, such as RoPE; recorded with the run."""
    lora: LoraSettings | None = None
    """Train an adapter instead of all weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class ModelNote(BaseModel):
    """What a saved model says of how it was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: TemplateSettings = TemplateSettings()
    trained_shots: dict[str, int] = Field(default_factory=dict)
    """Task -> most shots that an answer was trained after."""
    token_budget: int | None = None
    """Tokens of the longest episode it was trained on."""
    frame: Frame | None = None
    """Chat style only: the template's text as it was trained with, that day's date included; None for the plain style,
    and for models that were saved before frames were kept."""
    quantize: Quantization | None = None
    """How the base was stored while its adapter was trained; the adapter makes up for what that loses."""


def read_note(path: str) -> ModelNote:
    """Return what the model at `path` says of its training; defaults where it says nothing.

    Raises:
        UserError: it says what cannot be read.
    """
    file = Path(locate_model(path)) / MODEL_NOTE
    if not file.is_file():
        return ModelNote()
    try:
        return ModelNote.model_validate_json(file.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise UserError(
            f"{file}: {where}: {fault['msg']}; correct it, or remove it to ask in the default template"
        ) from error


def find_max_tokens(path: str) -> int | None:
    """Return the longest sequence that the model at `path` is asked with by default; None if it does not say."""
    try:
        most = max_tokens_of(load_config(ModelSettings(path=path)))
    except UserError:
        return None
    return min(most, read_note(path).token_budget or most)


def load_tokenizer(settings: ModelSettings) -> Any:
    """Return the tokenizer of a model, adapter or run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    source, revision = find_source(settings.path, "tokenizer_config.json", revision=settings.revision)
    try:
        with _one_line_errors(settings, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=settings.trust_remote_code
            )
    except UserError:
        if not Path(source).is_dir() or any((Path(source) / file).is_file() for file in TOKENIZER_FILES):
            raise
        lacks = f"has no tokenizer (none of {', '.join(TOKENIZER_FILES)})"
    else:
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
        lacks = "has a tokenizer of special tokens alone (its vocabulary, such as tokenizer.json, is missing)"
    raise UserError(f"{settings.path}: {lacks}; save it beside the weights, tokenizer.save_pretrained(FOLDER)")


def load_end_ids(settings: ModelSettings) -> tuple[int, ...]:
    """Return the tokens that end a text, by generation_config.json and config.json. Many chat models name several."""
    found: list[int] = []
    for file, load in (("generation_config.json", GenerationConfig.from_pretrained), ("config.json", None)):
        source, revision = find_source(settings.path, file, revision=settings.revision)
        try:
            config: Any = load_config(settings) if load is None else load(source, revision=revision or "main")
        except (OSError, TypeError) as error:  # TypeError: it is JSON, but no object
            if (path := Path(source, file)).is_file():
                raise UserError(f"{path}: is damaged; restore it, or remove it") from error
            continue  # most base models have none
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list | tuple) else [ids] if isinstance(ids, int) else []
    return tuple(dict.fromkeys(int(token) for token in found if token >= 0))


def load_config(settings: ModelSettings) -> Any:
    """Return the model's config with the changes of `settings.config` made.

    Raises:
        UserError: no such model, or a change to an entry that its config does not have.
    """
    source, revision = find_source(settings.path, "config.json", revision=settings.revision)
    if Path(source).is_dir() and source == locate_model(settings.path) and not (Path(source) / "config.json").is_file():
        raise UserError(f"{settings.path}: has no config.json, so it is no model; {GIVE_MODEL}")
    with _one_line_errors(settings, "config"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=settings.trust_remote_code)
    if hasattr(config, "quantization_config") and read_note(settings.path).quantize:
        del config.quantization_config  # an early version saved how it had packed the base with its adapter
    known = config.to_dict()
    for name, value in settings.config.items():
        if name not in known:
            raise UserError(f"model.config.{name}: {config.model_type} has no such entry{suggest(name, known)}")
        old = known[name]
        # TOML has no null: 'none' switches an entry off.
        new = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        try:
            setattr(config, name, None if new == "none" else new)
        except Exception as error:  # transformers checks types with an error of its own
            raise UserError(f"model.config.{name} = {value!r}: {_one_line(error)}") from error
    return config


def load_model(settings: ModelSettings, *, trainable: bool = False, device: torch.device | str = "cpu") -> Any:
    """Return the model on `device`; with `trainable`, ready for full fine-tuning or inside a fresh adapter.

    A full model to train is loaded in float32 (small updates vanish in bfloat16; autocast makes the products fast);
    everything else is in `settings.precision`, but for the layers that `settings.quantize` packs.

    Raises:
        UserError: it cannot be loaded, or not as the settings want it.
    """
    from peft import PeftModel

    if slow := find_slow_precision(settings.precision, device=torch.device(device)):
        warnings.warn(slow, stacklevel=2)
    limit_kernel_caches()
    precision = torch.bfloat16 if resolve_precision(settings.precision) == "bf16" else torch.float32
    dtype = torch.float32 if trainable and settings.lora is None else precision
    is_adapter = read_adapter(settings.path) is not None
    source, revision = find_source(settings.path, "model.safetensors", revision=settings.revision)
    config = load_config(settings)
    check_causal(config, settings=settings)
    _refuse_pickles(settings, Path(source))
    device = torch.device(device)
    if trainable:
        check_trainable(config, settings=settings)
    elif settings.quantize:
        _refuse_to_quantize(settings, config)
    check_machine(settings, trainable=trainable, device=device)
    packed = nf4_options(dtype=dtype, device=device) if settings.quantize == "nf4" else {}
    with _one_line_errors(settings, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that we name the misfits in our own words
            **packed,
        )
        model, found = loaded
        _check_weights(settings, found)
        if settings.quantize == "nf4":
            warn_of_blocks(model)
            keep_layout(model)
        elif settings.quantize == "float8":
            store_in_float8(model, dtype=dtype, device=device)
        model.has_changed_config = bool(settings.config)
        if is_adapter:
            with _without_rename_warning():
                model = PeftModel.from_pretrained(model, locate_model(settings.path))
    if is_adapter and trainable:
        model, _ = fold_adapter(model)
    model = add_adapter(model, settings.lora, revision=settings.revision) if trainable and settings.lora else model
    return model.to(device)


def check_trainable(config: Any, *, settings: ModelSettings) -> None:
    """Refuse settings that cannot be trained with on any machine. No weight is read.

    config: of the model that `settings` names.

    Raises:
        UserError: an adapter on an adapter, or on modules that the model does not have; a base in fewer bits of which
            all weights would be trained, or that has its products in float32; what `_refuse_to_quantize` refuses.
    """
    if settings.lora and read_adapter(settings.path) is not None:
        raise UserError(
            f"model.path = {settings.path!r}: is an adapter already, and a second one could not be told from it;"
            f" fold it in first: manyicl merge {shlex.quote(settings.path)} --out DIR"
        )
    if settings.quantize and settings.lora is None:
        raise UserError(
            f"model.quantize = {settings.quantize!r}: packed weights cannot be trained; train an adapter (model.lora)"
            " or leave it out"
        )
    if settings.quantize:
        _refuse_to_quantize(settings, config)
    if settings.quantize == "float8" and settings.precision == "fp32":
        raise UserError(_NEEDS_BF16)
    # A model's own code may not run without weights; then `add_adapter` checks the names, once it is loaded.
    if settings.lora and settings.lora.modules != LoraSettings().modules and not settings.trust_remote_code:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        check_modules(model, settings.lora.modules)


def check_machine(settings: ModelSettings, *, trainable: bool, device: torch.device) -> None:
    """Refuse a base in fewer bits where this machine cannot have it.

    Raises:
        UserError: bitsandbytes is not installed, the GPU has no products in 8 bits, or an adapter on 8 bits would be
            trained in the float32 that `precision = "auto"` means here.
    """
    if settings.quantize == "nf4":
        check_bitsandbytes("model.quantize = 'nf4'")
    if settings.quantize == "float8":
        if trainable and resolve_precision(settings.precision) == "fp32":
            raise UserError(_NEEDS_BF16)
        check_float8(device)


def _refuse_to_quantize(settings: ModelSettings, config: Any) -> None:
    """Refuse what fewer bits are not for.

    Raises:
        UserError: the checkpoint is quantised already, or most weights are experts.
    """
    told = f"model.quantize = {settings.quantize!r}"
    if method := getattr(config, "quantization_config", None):
        name = (method if isinstance(method, dict) else method.to_dict()).get("quant_method")
        raise UserError(f"{told}: {settings.path} is quantised already, by {name}; leave it out")
    if getattr(config.get_text_config(), "num_experts_per_tok", None):
        raise UserError(f"{told}: experts cannot be packed, and most weights of {config.model_type} are; leave it out")


def check_causal(config: Any, *, settings: ModelSettings) -> None:
    """Refuse a model that is not a causal language model.

    config: of the model that `settings` names.

    Raises:
        UserError: with what it is.
    """
    names = list(getattr(config, "architectures", None) or [])
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    is_causal = any(name in known or name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if getattr(config, "is_encoder_decoder", False) or (names and not is_causal and not settings.trust_remote_code):
        raise UserError(
            f"{settings.path}: is a {', '.join(names) or config.model_type}, not a causal language model; name one"
            " whose config.json has an architecture such as LlamaForCausalLM"
        )


def _refuse_pickles(settings: ModelSettings, source: Path) -> None:
    """Refuse a checkpoint whose weights are pickles.

    Raises:
        UserError: with how to convert it.
    """
    pickles = sorted(source.glob("pytorch_model*.bin")) if source.is_dir() else []
    if pickles and not any(source.glob("*.safetensors")):
        raise UserError(
            f"{settings.path}: has {pickles[0].name} and no safetensors; convert it once, in Python:"
            f" transformers.AutoModelForCausalLM.from_pretrained({str(source)!r}).save_pretrained({str(source)!r})"
        )


def _check_weights(settings: ModelSettings, found: Any) -> None:
    """Refuse a checkpoint that does not hold the weights its config asks for: transformers would draw them at random.

    Raises:
        UserError: weights are missing, or of other shapes.
    """
    for kind, what in (("mismatched_keys", "have other shapes"), ("missing_keys", "are missing")):
        names = sorted(key if isinstance(key, str) else key[0] for key in found[kind])
        if names:
            raise UserError(
                f"{settings.path}: {len(names)} weights of its config {what}, such as {names[0]}"
                f"{_blame_changes(settings)}"
            )


def add_adapter(model: Any, lora: LoraSettings, *, revision: str | None = None) -> Any:
    """Return `model` inside a fresh adapter. revision: of the base on the hub, which the adapter remembers.

    Raises:
        UserError: the model has no such modules.
    """
    from peft import LoraConfig, get_peft_model

    if lora.modules != LoraSettings().modules:
        check_modules(model, lora.modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.modules if isinstance(lora.modules, str) else list(lora.modules),
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        with _without_rename_warning():
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.modules = {lora.modules!r}: {_one_line(error)}") from error


def fold_adapter(model: Any) -> tuple[Any, bool]:
    """Return the plain model that an adapter and its base make, and whether its head and embedding had to be untied.

    An adapter on one of the two changes only that one; folded into weights that both share it would change both.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = [part for part in (embedding, head) if part is not None and hasattr(part, "base_layer")]
    weights = [getattr(part, "base_layer", part).weight for part in (embedding, head) if part is not None]
    is_tied = len(weights) == 2 and weights[0].data_ptr() == weights[1].data_ptr()
    if adapted and is_tied:
        own = weights[1].detach().clone()
        getattr(head, "base_layer", head).weight = nn.Parameter(own, requires_grad=False)
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    return model.merge_and_unload(), bool(adapted and is_tied)


@contextmanager
def _without_rename_warning() -> Iterator[None]:
    """Keep a user from being told that peft asks for a name which transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def _one_line_errors(settings: ModelSettings, what: str) -> Iterator[None]:
    """Turn what transformers raises for a wrong path, name, file or change into one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)  # its retries
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a file of the user's breaks: safetensors, jinja2, json, ... have their own
        adapter = read_adapter(settings.path)
        is_folder = Path(settings.path).expanduser().is_dir()
        near = suggest_near(settings.path, PACKAGED, cutoff=0.7)
        where = "" if is_folder else f" from the hub (there is no such folder here{near})"
        if adapter is not None and not Path(find_source(settings.path, "config.json")[0]).is_dir():
            base = adapter["base_model_name_or_path"]
            where = f": its base '{base}' (adapter_config.json) is not a folder here or beside it, nor on the hub"
        raise UserError(
            f"{settings.path}: cannot load its {what}{where}: {_one_line(error)}{_blame_changes(settings)}"
        ) from error
    finally:
        transformers_logging.set_verbosity(before)
        hub.setLevel(hub_level)


def _blame_changes(settings: ModelSettings) -> str:
    return f"; check model.config = {settings.config}" if settings.config else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"unknown or missing entry {text}"
    return text if len(text) <= 300 else f"{text[:297]}..."
