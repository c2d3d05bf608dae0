"""RunConfig: the settings of every module in one recipe; TOML in, resolved TOML out."""

from __future__ import annotations

import json
import shlex
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyicl.episodes import EpisodeSettings, Mixing, Normalization, TemplateSettings
from manyicl.errors import UserError, check_list, check_text, suggest, take_path
from manyicl.models import ModelSettings, Precision
from manyicl.training.memory.optimizers import Optim

RecomputeSetting = Annotated[int, Field(ge=0)] | Literal["auto", "none", "selective", "full", "offload", "tiled"]
# The setting's name and words in recipes of earlier versions; other values are as they were.
_OLD_RECOMPUTE, _OLD_WORDS = "checkpointed_layers", {0: "none", "all": "selective", "whole": "full"}
DECAY_SHARE = 0.2
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"]


class TaskSettings(BaseModel):
    """Which tasks are trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: str = Field(min_length=1)
    """A folder of task files."""
    names: tuple[str, ...] = ()
    """The tasks to train on. Default: all of the folder."""
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Task -> number above 0 that its fraction of the tokens is multiplied with, such as {rare = 3.0}; 1 for the
    others. The fractions then add up to 1 again."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """With the mixture 'proportional', fractions are proportional to size^(1/temperature), as in mT5: 1 is the size
    itself, 3 brings small tasks much closer to large ones."""
    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Most train rows of a task that are used, drawn by the seed and the same in all epochs. Default: all. On SmolLM2
    1,000 did as well, 300 cost 1.3 points [0.1, 2.5] on new tasks after many shots and 100 cost 2.8 [1.3, 4.2], most of
    both on one task (docs/results.md, "How many tasks, how many rows")."""

    @property
    def mixing(self) -> Mixing:
        """How the tokens are divided among the tasks, as a plan takes it."""
        return Mixing(self.weights, self.temperature, self.max_rows)


class TrainSettings(BaseModel):
    """How the model is trained. Counts of packs are over all ranks, so a run does not depend on their number."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_steps: Annotated[int, Field(gt=0)]
    """Optimizer steps. Four times 80 gained 3.4 points [1.8, 4.9] on new tasks (docs/results.md, "Which default?")."""
    pack_tokens: Annotated[int, Field(gt=0)] | None = None
    """Length of a pack. Default: episodes.token_budget."""
    packs_per_step: Annotated[int, Field(gt=0)] = 8
    """Packs per optimizer step, over all ranks. If episodes fill a pack, a step has as many tasks at most."""
    packs_per_batch: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Packs that go through a rank at once, joined in one row: a number, or 'auto' (as many as keep a GPU at work and
    fit its free memory; 1 on a CPU)."""
    normalization: Normalization = "answer"
    """What counts once in the loss: each 'answer', each 'token', or each 'task' of the step. Tokens cost 2.0 points
    [1.1, 2.9] on new tasks after many shots, tasks nothing that can be told (docs/results.md, "Which default?")."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate. ManyICL's trials chose 1e-4 or 3e-4 on SmolLM2 and 3e-5 on Gemma 3 270M; LoRA did better at
    1e-3 than at 1e-4 (docs/results.md)."""
    optim: Optim = "adamw_torch_fused"
    """Optimizer, by the Trainer's name: 'adamw_torch_fused', 'adamw_torch', 'adafactor', and from bitsandbytes
    'adamw_8bit', 'paged_adamw_8bit', 'paged_adamw_32bit', 'lion_8bit', 'lion_32bit'. A quarter of AdamW's memory with
    8 bits; 'paged' ones move to the host when a GPU is full. Lion wants a third to a tenth of AdamW's learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up, by the Trainer's name: 'cosine' and 'linear' fall to 0, 'inverse_sqrt' slowly,
    'constant' and 'constant_with_warmup' (the same here) stay, and 'warmup_stable_decay' stays and then falls to 0."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = DECAY_SHARE
    """Fraction of num_steps, at the end, in which 'warmup_stable_decay' falls."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients, or of Lion's moment; Adafactor has its own."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Norm that gradients are clipped to; 0: they are not clipped."""
    recompute: RecomputeSetting = "auto"
    """Layers that are computed again in the backward pass, to save memory: 'none', 'selective' (all, but their
    attention's output is kept), 'full' (all, attention too), 'offload' (as 'full', and their inputs wait in the host's
    memory; needs a GPU), 'tiled' (as 'offload', with feed-forward parts in tiles of 4,096 tokens), a number of them
    (selectively), or 'auto' (as few as a GPU has room for, up to 'tiled'; none on a CPU)."""
    compile: bool = False
    """Compile the layers for one row length, to which shorter rows are padded; costs a minute."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Run a row forward and backward as one CUDA graph: true, false, or 'auto' (on one GPU, where passes are so short
    that the GPU would wait for Python: below 1e14 FLOPs, and no layer recomputed)."""
    log_every_steps: Annotated[int, Field(gt=0)] = 10
    """Steps per line of metrics.jsonl."""
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 100
    """Steps between checkpoints, each with a validation loss; a multiple of log_every_steps."""
    validation_tokens: Annotated[int, Field(ge=0)] = 8192
    """Tokens of validation episodes per task; 0: no validation."""
    keep: Literal["best", "last"] = "best"
    """The checkpoint that becomes the run's model: that of the 'best' validation loss, or the 'last'."""
    early_stopping_patience: Annotated[int, Field(gt=0)] | None = None
    """Validations in a row without a better loss after which training ends. The model is that of the best one.
    Default: all steps are trained."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that build batches ahead; with 0, one batch is built while the GPU works on the last."""
    report_to: tuple[str, ...] = ()
    """Trackers by the Trainer's names, such as 'tensorboard', 'wandb' or 'trackio'; none by default. Each needs its
    package, and takes its own environment variables, such as WANDB_MODE=offline."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> TrainSettings:
        if self.early_stopping_patience is not None and not self.validation_tokens:
            raise ValueError("early_stopping_patience: needs a validation loss, and validation_tokens = 0; raise it")
        if self.early_stopping_patience is not None and self.keep != "best":
            raise ValueError("early_stopping_patience: keeps the best checkpoint, and keep = 'last'; set keep = 'best'")
        if self.decay_share != DECAY_SHARE and self.schedule != "warmup_stable_decay":
            raise ValueError(
                f"decay_share = {self.decay_share}: does nothing with schedule = {self.schedule!r}; leave it out, or"
                " set schedule = 'warmup_stable_decay'"
            )
        if self.checkpoint_every_steps % self.log_every_steps:
            raise ValueError(
                f"checkpoint_every_steps = {self.checkpoint_every_steps} is not a multiple of log_every_steps ="
                f" {self.log_every_steps}, so a resumed run could not log what the uninterrupted one logs; make it"
                " one, or lower log_every_steps"
            )
        if self.cuda_graph is True and self.recompute not in ("auto", "none", 0):
            raise ValueError(
                f"cuda_graph = true: layers are recomputed (recompute = {self.recompute!r}), which no graph does; set"
                " cuda_graph to 'auto' or false, or recompute = 'none'"
            )
        if self.packs_per_batch != "auto" and self.packs_per_step % self.packs_per_batch:
            raise ValueError(
                f"packs_per_step = {self.packs_per_step} is not a multiple of packs_per_batch = {self.packs_per_batch}"
            )
        return self

    @property
    def packs_at_once(self) -> int:
        """`packs_per_batch` as a number, after `with_batch`."""
        assert self.packs_per_batch != "auto", "with_batch comes first"
        return self.packs_per_batch


class HeldOutSettings(BaseModel):
    """The table after training: loss per answer on test rows, before, after, and knowing only the answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    episodes: int = Field(4, ge=0)
    """Episodes of test rows per task; 0: no table."""


class RunConfig(BaseModel):
    """One recipe. Paths in a file that begin with a dot are taken from the file's folder, ~ is the user's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    PATHS: ClassVar[tuple[tuple[str, str], ...]] = (("tasks", "folder"), ("model", "path"))
    """(section, key) of every setting that is a path or a list of paths. It may change when work is resumed, if the
    same tasks, weights or texts lie in the new place."""

    seed: int = Field(0, ge=0)
    """Decides episodes, their order and the adapter's first weights."""
    tasks: TaskSettings
    model: ModelSettings
    template: TemplateSettings = TemplateSettings()
    episodes: EpisodeSettings = EpisodeSettings()
    train: TrainSettings
    held_out: HeldOutSettings = HeldOutSettings()

    @model_validator(mode="after")
    def _packs_hold_episodes(self) -> RunConfig:
        if self.pack_tokens < self.episodes.token_budget:
            raise ValueError(
                f"train.pack_tokens = {self.pack_tokens} is less than episodes.token_budget ="
                f" {self.episodes.token_budget}, so an episode would not fit a pack"
            )
        return self

    @model_validator(mode="after")
    def _mixture_has_a_temperature(self) -> RunConfig:
        if self.tasks.temperature != 1 and self.episodes.mixture == "uniform":
            raise ValueError(
                f"tasks.temperature = {self.tasks.temperature}: does nothing with episodes.mixture = 'uniform', the"
                " default; leave it out, or set episodes.mixture = 'proportional'"
            )
        return self

    @property
    def movable(self) -> list[str]:
        """The settings of `PATHS`, such as 'tasks.folder'."""
        return [f"{section}.{key}" for section, key in self.PATHS]

    @property
    def pack_tokens(self) -> int:
        """Length of a pack in tokens."""
        return self.train.pack_tokens or self.episodes.token_budget

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row: of all packs of a batch."""
        return self.pack_tokens * self.train.packs_at_once


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_recipe(path: str | Path, *, overrides: Sequence[str] = (), kind: type[ConfigT] = RunConfig) -> ConfigT:  # type: ignore[assignment]
    """Return the recipe at `path` with `key=value` overrides applied, such as `train.num_steps=20`.

    kind: what the recipe is of: a run, or something that has a run's sections and more.

    Raises:
        UserError: no such file, broken TOML, an unknown key, or a value that does not fit its key.
    """
    check_list("overrides", overrides)
    if isinstance(overrides, Mapping):
        raise UserError(f"overrides={overrides}: is a mapping; give a list, such as ['train.num_steps=20']")
    path = Path(take_path("path", path))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors begin files with a mark
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe (*.toml)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    for section, key in kind.PATHS:
        table = values.get(section)
        if isinstance(table, dict) and key in table:
            table[key] = _resolve_paths(table[key], folder=path.parent)
    _rename_old(values, source=str(path))
    for override in overrides:
        _apply_override(values, override)
        _rename_old(values, source=f"override {override!r}")  # each at once, so that the last one counts
    return make_config(values, source=str(path), kind=kind)


def take_recipe(recipe: str | Path | RunConfig, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the recipe of a run: one that is loaded, or that of a file with its overrides.

    Raises:
        UserError: as `load_recipe`, or there are overrides of a recipe that is loaded.
    """
    check_list("overrides", overrides)
    if not isinstance(recipe, RunConfig):
        return load_recipe(Path(take_path("recipe", recipe)), overrides=overrides)
    if overrides:
        raise UserError(f"overrides={list(overrides)}: are for a recipe that is read from a file; change the RunConfig")
    return recipe


def _resolve_paths(value: Any, *, folder: Path) -> Any:
    """Return a path, or a list of paths, with those that begin with a dot or ~ made absolute; others as they are."""
    if isinstance(value, list):
        return [_resolve_paths(one, folder=folder) for one in value]
    if isinstance(value, str) and value.startswith((".", "~")):
        return str((folder / Path(value).expanduser()).resolve())
    return value


def has_section(path: Path, section: str) -> bool:
    """Return whether the recipe at `path` has a section; False if it cannot be read, which `load_recipe` then tells."""
    try:
        return section in tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


def make_config(values: dict[str, Any], *, source: str, kind: type[ConfigT] = RunConfig) -> ConfigT:  # type: ignore[assignment]
    """Return the config of nested `values`; `source` is named in errors.

    Raises:
        UserError: an unknown key, or a value that does not fit its key; all of them in one line.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # Pydantic counts what is right, and so finds a list of wrong values too short besides.
        wrong_inside = {e["loc"][:-1] for e in error.errors()}
        found = [e for e in error.errors() if e["type"] != "too_short" or e["loc"] not in wrong_inside]
        faults = list(dict.fromkeys(_tell_fault(dict(e), values, kind=kind) for e in found))
        raise UserError(f"{source}: " + "; ".join(faults)) from error


def absolute_paths(config: ConfigT) -> ConfigT:
    """Return the config with the task folder, and a model that is a folder, named by their absolute paths."""
    folder = Path(config.tasks.folder).expanduser()
    model = Path(config.model.path).expanduser()
    return config.model_copy(
        update={
            "tasks": config.tasks.model_copy(update={"folder": str(folder.resolve())}),
            "model": config.model.model_copy(update={"path": str(model.resolve())}) if model.is_dir() else config.model,
        }
    )


def refuse_gone(config: RunConfig, *, where: str, command: str) -> None:
    """Refuse to go on with files or folders that have gone, as they do when a project is moved.

    where: begins the message. command: goes on with the new places, which are written after it.

    Raises:
        UserError: with the settings whose files are not there, and how to say where they are now.
    """
    gone: dict[str, str] = {}
    places = []
    for section, key in config.PATHS:
        value = getattr(getattr(config, section), key)
        paths = [value] if isinstance(value, str) else list(value)
        lost = [path for path in paths if Path(path).is_absolute() and not Path(path).exists()]
        if lost:
            gone[f"{section}.{key}"] = lost[0]
            new = "PATH" if isinstance(value, str) else json.dumps(["PATH"] * len(paths))
            places.append(shlex.quote(f"{section}.{key}={new}"))
    if gone:
        told = " and ".join(f"{key} = {path}" for key, path in gone.items())
        raise UserError(
            f"{where}: {told} is not there any more; if it was moved, say where it is now: {command} {' '.join(places)}"
        )


def refuse_changes(changes: Iterable[str], *, allowed: Sequence[str], where: str, file: str) -> None:
    """Refuse to go on with other settings than those of the start.

    changes: the settings that would be another. where: begins the message. file: holds the settings of the start.

    Raises:
        UserError: a change is not one of those that are allowed.
    """
    others = [key for key in changes if key not in allowed]
    if others:
        raise UserError(
            f"{where}: {', '.join(others)} would be another than in its {file}; leave it out to go on (only"
            f" {', '.join(allowed)} may change), or start anew in another folder"
        )


def with_precision(config: ConfigT, precision: Precision) -> ConfigT:
    """Return the config with `model.precision` resolved."""
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})


def with_batch(config: ConfigT, num_packs: int) -> ConfigT:
    """Return the config with `train.packs_per_batch` resolved."""
    return config.model_copy(update={"train": config.train.model_copy(update={"packs_per_batch": num_packs})})


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as TOML, every setting said but the unset ones (TOML has no null)."""
    return tomli_w.dumps(_without_none(config.model_dump()))  # not mode="json", which has no infinity either


def _rename_old(values: dict[str, Any], *, source: str) -> None:
    """Give a setting of earlier versions its name of today, and say so in one line."""
    train = values.get("train")
    if not isinstance(train, dict) or _OLD_RECOMPUTE not in train:
        return
    old = train.pop(_OLD_RECOMPUTE)
    train["recompute"] = _OLD_WORDS.get(old, old) if isinstance(old, int | str) else old
    warnings.warn(
        f"{source}: train.{_OLD_RECOMPUTE} = {old!r} is now train.recompute = {train['recompute']!r}", stacklevel=1
    )


def _apply_override(values: dict[str, Any], override: str) -> None:
    check_text("overrides", override, "train.num_steps=20")
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {override!r}: write key=value, such as train.num_steps=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: '{section}' is a value, not a section")
    table[last] = value


def _tell_fault(error: dict[str, Any], values: dict[str, Any], *, kind: type[RunConfig]) -> str:
    """Return one fault of pydantic's in our words."""
    place = [str(part) for part in error["loc"]]
    if not place:
        return str(error["msg"].removeprefix("Value error, "))
    # What follows the key is an index, or the name that pydantic gives to one of several types.
    num_parts = next((n for n in range(1, len(place)) if _section_at(place[:n], kind) is None), len(place))
    key, inside = place[:num_parts], place[num_parts:]
    name = ".".join(key)
    section, parent = _section_at(key, kind), _section_at(key[:-1], kind)
    if error["type"] == "extra_forbidden" and parent is not None:
        return f"{name}: unknown key{suggest(key[-1], parent.model_fields)}"
    if error["type"] == "missing" and not inside:
        return f"{name}: is missing; " + ("give it a value" if section is None else f"add a section [{name}]")
    value: Any = values
    for part in key:
        value = value[part]
    if section is not None and not isinstance(value, dict):
        optional = parent is not None and parent.model_fields[key[-1]].default is None
        fix = f"write [{name}], and below it {', '.join(section.model_fields)}"
        return f"{name} = {value!r}: is a section; {fix}{', or leave it out for none' if optional else ''}"
    if parent is not None and any(not part.isdigit() for part in inside):
        use = " ".join(str(parent.model_fields[key[-1]].description).split()).rstrip(".")
        return f"{name} = {value!r}: does not fit; {use[0].lower()}{use[1:]}"
    message = str(error["msg"].removeprefix("Value error, "))
    if error["type"] == "tuple_type" and parent is not None:
        kinds = str(parent.model_fields[key[-1]].annotation)
        message = "needs a list, such as " + ("[0, 1]" if "int" in kinds or "float" in kinds else '["a", "b"]')
    if error["type"] == "too_short":
        message = "is empty; give it a value, or leave it out"
    if section is not None:
        return f"{name}: {message}"
    where = "".join(f"[{part}]" for part in inside)
    return f"{name}{where} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _section_at(names: Sequence[str], kind: type[RunConfig]) -> type[BaseModel] | None:
    """Return the settings of a section of the recipe, None where a single value stands, or nothing."""
    section: type[BaseModel] | None = kind
    for name in names:
        field = section.model_fields.get(name) if section else None
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return section


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
