"""RunConfig: the settings of every module in one recipe; TOML in, resolved TOML out."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyicl.episodes import EpisodeSettings
from manyicl.errors import UserError, suggest
from manyicl.models import ModelSettings
from manyicl.templates import TemplateSettings
from manyicl.training import TrainSettings


class TaskSettings(BaseModel):
    """Which tasks are trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = Field(description="a folder of task files")
    names: tuple[str, ...] = Field((), description="the tasks to train on; all of the folder unless said")


class HeldOutSettings(BaseModel):
    """The table after training: loss per answer on test rows, before, after, and knowing only the answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    episodes: int = Field(4, ge=0, description="episodes of test rows a task; 0: no table")


class RunConfig(BaseModel):
    """One recipe. Paths in a file that begin with a dot are taken from the file's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="decides episodes, their order and the adapter's first weights")
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

    @property
    def pack_tokens(self) -> int:
        """Length of a pack in tokens."""
        return self.train.pack_tokens or self.episodes.token_budget


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the recipe at `path` with `key=value` overrides applied, such as `train.num_steps=20`.

    Raises:
        UserError: no such file, broken TOML, an unknown key, or a value that does not fit its key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe (*.toml)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    for section, key in (("tasks", "folder"), ("model", "path")):
        table = values.get(section)
        if isinstance(table, dict) and str(table.get(key, "")).startswith("."):
            table[key] = str((path.parent / table[key]).resolve())
    for override in overrides:
        _apply_override(values, override)
    return make_config(values, source=str(path))


def make_config(values: dict[str, Any], *, source: str) -> RunConfig:
    """Return the config of nested `values`; `source` is named in errors.

    Raises:
        UserError: an unknown key, or a value that does not fit its key; all of them in one line.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = list(dict.fromkeys(_fault(dict(e)) for e in error.errors()))
        raise UserError(f"{source}: " + "; ".join(faults)) from error


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as TOML, every setting said but the unset ones (TOML has no null)."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
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


def _fault(error: dict[str, Any]) -> str:
    """Return one fault of pydantic's in our words."""
    place = [str(part) for part in error["loc"]]
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key{suggest(place[-1], _known_keys(place[:-1]))}"
    if error["type"] == "missing":
        return f"{name}: is missing; give it a value"
    message = error["msg"].removeprefix("Value error, ")
    if not place:
        return str(message)
    shown = error["input"]
    return (
        f"{name} = {shown!r}: {message[0].lower()}{message[1:]}"
        if not isinstance(shown, dict)
        else f"{name}: {message}"
    )


def _known_keys(sections: Sequence[str]) -> list[str]:
    model: Any = RunConfig
    for section in sections:
        field = model.model_fields.get(section)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
