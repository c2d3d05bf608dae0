"""The folder of a run: the one place that knows what lies in it, under which names, and how it is read and written.

config.toml    every setting, resolved; a resumed run reads it, and writes what was changed of `CHANGEABLE`
run.json       `RunState`: versions, git commit, device, hashes of data and plan, counts, the held-out table
metrics.jsonl  one JSON object per line: training losses, losses by shot index, validation losses by task
checkpoints/   whole checkpoints only: the last and the best
model/         Hugging Face layout with tokenizer; loads without this package
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.utils.constants import FSDP_MODEL_NAME
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from manyicl.episodes import Frame
from manyicl.errors import UserError
from manyicl.files import find_others, read_object, sync_folder, sync_tree, write_atomically
from manyicl.locks import LOCK
from manyicl.models import RUN_MODEL, RUN_STATE, fingerprint_weights, locate_model, resolve_precision
from manyicl.training.held_out import HeldOutRow, Losses
from manyicl.training.metrics import MetricsLog
from manyicl.training.origin import device_name, git_commit, package_versions
from manyicl.training.preparation import Prepared, count_dropped, count_plan, hash_plan
from manyicl.training.recipe import RunConfig, dump_config, load_recipe, refuse_changes, refuse_gone, with_precision

RUN_SCHEMA = 1
# Settings of train.* that decide a run's time and memory but not its course (except what dropout draws in batches of
# other packs), so they may change when it is resumed.
CHANGEABLE = ("recompute", "compile", "cuda_graph", "num_workers", "packs_per_batch")
# The Trainer's own record in a checkpoint.
TRAINER_STATE = "trainer_state.json"
# What every checkpoint has, in any launch. The Trainer goes on without optimizer, schedule and random states, and says
# nothing: that would be another run.
_CHECKPOINT_FILES = (TRAINER_STATE, "*model*", "optimizer*", "scheduler.pt", "rng_state*.pth")


class _Record(BaseModel):
    """A part of run.json. What another version wrote beside these fields is kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class TaskRecord(_Record):
    """One task, as the run was started on it."""

    sha256: str
    """Of the task's rows and settings."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Reason -> rows of all splits that are not used."""


class PlanRecord(_Record):
    """The plan of packs in numbers, over the whole run."""

    packs: int
    episodes: int
    answers: int
    targets: int
    """Tokens that the loss is taken on."""
    tokens: int
    tokens_by_task: dict[str, int]
    fill: float
    """Tokens divided by the capacity of the packs."""
    renamed_episodes: int | None = None
    """Episodes whose labels bear other names; absent if the recipe renames none."""
    templates: dict[str, dict[str, int]] | None = None
    """Task -> each of its templates -> the episodes that it writes; absent if no task has several."""
    sha256: str
    """Of the packs in their order: a run goes on only with the plan that it was started with."""


class RowsRecord(_Record):
    """Whether a row may hold several episodes."""

    episodes: Literal["together", "alone"]
    reason: str
    """Why each episode goes through the model alone; '' if they go together."""


class RunState(_Record):
    """What run.json says: of the start, of what training took so far, and of the end."""

    version: int = Field(RUN_SCHEMA, validation_alias="schema", serialization_alias="schema")
    """Of this file's shape."""
    finished: bool
    """Whether the run has its model and its closing table."""
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    """Package -> version, when the run was started."""
    git_commit: str | None = None
    """Of the folder that the run was started in, '+' if it had changes; None outside git."""
    device: str | None = None
    """What it was started on, such as "NVIDIA H100 80GB HBM3" or "CPU, 8 threads"; absent from early versions' runs."""
    model: str = ""
    """The folder or name of the model that the run was started on."""
    weights: str | None = None
    """Its fingerprint; None if it is on the hub, and absent from runs of early versions."""
    frame: Frame | None = None
    """Chat style only: the text around examples, today's date of then included."""
    tasks: dict[str, TaskRecord]
    plan: PlanRecord
    changes: list[dict[str, Any]] = Field(default_factory=list)
    """Settings that were changed when the run was resumed: {"after_step": 20, "train.recompute": "full"}."""
    rows: RowsRecord | None = None
    packs_per_batch: int | None = None
    """Packs that went through a rank at once in the last process."""
    packs_reason: str | None = None
    """Why so many, in words."""
    wall_s: float | None = None
    """Seconds of training over all processes of the run, validation and checkpoints included."""
    peak_bytes: int | None = None
    """The most memory that a process of the run held; None if it is not known."""
    recomputed_layers: int | None = Field(
        None, validation_alias=AliasChoices("recomputed_layers", "checkpointed_layers")
    )
    """Layers that the last process computed again in the backward pass; was called checkpointed_layers."""
    attention_recomputed: bool | None = None
    """Whether their attention was computed again too."""
    inputs_in_host: bool | None = None
    """Whether their inputs waited in the host's memory."""
    feed_forward_in_tiles: bool | None = None
    """Whether their feed-forward parts ran some tokens at a time."""
    cuda_graph: bool | None = None
    """Whether rows ran forward and backward as one CUDA graph in the last process."""
    cuda_graph_reason: str | None = None
    """Why, or why not, in words."""
    flash_attention: str | None = None
    """What stood in for torch's own flash attention, such as 'FA3'."""
    attention_kernels: dict[str, int] = Field(default_factory=dict)
    """Attention kernel -> how often it was taken, by Python; a CUDA graph that is launched again does not count."""
    model_step: int | None = None
    """The step whose checkpoint became the model."""
    stopped_step: int | None = None
    """The step after which `train.early_stopping_patience` ended training; absent if all steps were trained."""
    diverged: str | None = None
    """What was not finite, of a comparison's trial that is not gone on with for that; absent from all other runs."""
    last_process_s: float | None = None
    """Seconds of the last process, from the start of its training."""
    held_out: list[dict[str, Any]] = Field(default_factory=list)
    """The rows of the held-out table (`HeldOutRow`), null instead of NaN."""

    def to_json(self) -> str:
        """Return the text of run.json: what was set, not what is only a default."""
        return _to_json(self.model_dump(by_alias=True, exclude_unset=True))


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    folder: Path
    model: Path
    """The folder to load or ask."""
    held_out: tuple[HeldOutRow, ...]
    """The closing table; empty if the recipe wants none, and on all ranks but the main process, which alone writes."""
    is_main_process: bool = True


class RunFolder:
    """The folder of a run, which need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.state_file = self.path / RUN_STATE
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.model = self.path / RUN_MODEL
        self._losses_before_file = self.path / "held_out_before.json"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_started(self) -> bool:
        """Whether a run was started here, so that it can be resumed."""
        return self.config_file.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether a run lies here that got its model and its closing table; the model may have gone since."""
        return self.state_file.is_file() and self.read_state().finished

    def read_config(self, *, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the resolved config, with `key=value` overrides applied.

        Raises:
            UserError: the folder is not a run, or an override has no such key or value.
        """
        if not self.is_started:
            raise UserError(f"{self}: is not a run (no {self.config_file.name}); name the folder of a run")
        return load_recipe(self.config_file, overrides=overrides)

    def read_state(self) -> RunState:
        """Return what run.json says.

        Raises:
            UserError: it is not there, or is not what a run writes.
        """
        try:
            return RunState.model_validate_json(self.state_file.read_bytes())
        except (OSError, ValueError) as error:  # pydantic's is a ValueError
            told = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path}: has no {RUN_STATE} that can be read ({told}); train it anew") from error

    def update_state(self, **changes: Any) -> None:
        """Write fields of `RunState` to run.json, and leave the others as they are."""
        unknown = changes.keys() - RunState.model_fields.keys()
        assert not unknown, unknown
        content = self.read_state().model_dump(by_alias=True, exclude_unset=True)
        write_atomically(self.state_file, RunState.model_validate(content | changes).to_json())

    def take_losses_before(self, measure: Callable[[], Losses]) -> Losses:
        """Return the untrained model's held-out losses, measured once per run: a resumed run has no untrained model."""
        if not self._losses_before_file.exists():
            write_atomically(self._losses_before_file, _to_json(measure()))
        losses: Losses | None = read_object(self._losses_before_file)
        if losses is None:
            raise UserError(
                f"{self._losses_before_file}: is damaged; restore it, or remove it: its losses are measured again"
            )
        return losses

    @contextmanager
    def writing_model(self) -> Iterator[Path]:
        """Give the block a folder of another name to write the model in; it becomes `model` once whole and durable."""
        partial = self.path / f".{RUN_MODEL}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir()
        yield partial
        sync_tree(partial)
        partial.rename(self.model)

    def start(self, prepared: Prepared) -> None:
        """Write config.toml and run.json of a new run; of one that is resumed, what was changed."""
        is_new = not self.is_started
        if is_new:
            write_atomically(self.state_file, describe_run(prepared).to_json())
            write_atomically(self.config_file, dump_config(prepared.config))
        self.checkpoints.clear_unfinished()
        if is_new:
            return
        changes = find_changes(load_recipe(self.config_file), prepared.config)
        if changes and not self.is_finished:
            step = max((step for step, _ in self.checkpoints.all()), default=0)
            self.update_state(changes=[*self.read_state().changes, {"after_step": step, **changes}])
            write_atomically(self.config_file, dump_config(prepared.config))
        elif set(changes) & set(prepared.config.movable):
            self.take_places(prepared.config)

    def take_places(self, config: RunConfig) -> None:
        """Write where the tasks and the base lie now into config.toml, and the base into the adapter, if it has one."""
        before = self.read_config()
        base = config.model.path
        adapter = self.model / "adapter_config.json"
        content = read_object(adapter) if adapter.is_file() else None
        if content is not None and content.get("base_model_name_or_path") == before.model.path:
            write_atomically(adapter, _to_json(content | {"base_model_name_or_path": base}))
        tasks = before.tasks.model_copy(update={"folder": config.tasks.folder})
        moved = before.model_copy(update={"tasks": tasks, "model": before.model.model_copy(update={"path": base})})
        write_atomically(self.config_file, dump_config(moved))

    def open(self, config: RunConfig, *, resume: bool) -> RunConfig:
        """Return the config to train with: its precision resolved, on any machine the one that the run was started in.

        Raises:
            UserError: the folder is not empty; with `resume`, the config differs from the run's in a setting that must
                not change, or the run's tasks or model have gone.
        """
        # Compared as settings, not as text: a run started before a setting was added has its default.
        before: RunConfig | None = load_recipe(self.config_file) if resume else None
        if config.model.precision == "auto":
            config = with_precision(config, resolve_precision("auto" if before is None else before.model.precision))
        if before is not None:
            changes = find_changes(before, config)
            allowed = [*(f"train.{key}" for key in CHANGEABLE), *config.movable]
            refuse_changes(changes, allowed=allowed, where=f"resume={self}", file=self.config_file.name)
            refuse_gone(config, where=f"resume={self}", command=f"manyicl train --resume {shlex.quote(str(self))}")
        elif self.is_started or find_others(self.path, [LOCK, RUN_STATE]):  # run.json: of one that was killed at once
            fix = f"go on with resume={self}, or name" if self.is_started else "name"
            raise UserError(f"out={self}: is not empty; {fix} another")
        return config

    def refuse_other_data(self, prepared: Prepared) -> None:
        """Refuse to go on with tasks or weights that changed since the run was started: its packs would differ.

        Raises:
            UserError: naming the first task that differs.
        """
        before, now = self.read_state(), describe_run(prepared)
        for name, task in now.tasks.items():
            if name not in before.tasks or before.tasks[name].sha256 != task.sha256:
                raise UserError(
                    f"resume={self}: task '{name}' is not what it was when the run was started; put its files back,"
                    " or start a new run"
                )
        if "weights" in before.model_fields_set and before.weights != now.weights:
            raise UserError(
                f"resume={self}: model.path = {now.model} holds other weights than the run was started on; put"
                " them back, or name the folder that they were moved to"
            )
        if before.plan != now.plan:
            raise UserError(
                f"resume={self}: was started with another tokenizer or version of manyicl, and its plan of packs"
                " would be another now; go on with those, or start a new run"
            )


class Checkpoints:
    """The folder of a run's checkpoints. One is written under another name, and whole once it bears its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of the whole checkpoints, oldest first."""
        found = [(path.name.removeprefix("checkpoint-"), path) for path in self.path.glob("checkpoint-*")]
        return sorted((int(step), path) for step, path in found if step.isdecimal())  # a user may have put one aside

    def at(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or goes once it is whole."""
        return self.path / f"checkpoint-{step}"

    def begin(self, step: int) -> Path:
        """Return the folder that the checkpoint of a step is to be written in; the same on all ranks."""
        partial = self.path / f".saving-{step}"
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def complete(self, step: int, partial: Path, *, keep: Sequence[int]) -> None:
        """Give a whole and durable checkpoint its name, then drop those of other steps than `keep` and this one."""
        partial.rename(self.at(step))
        sync_folder(self.path)
        for other, path in self.all():
            if other not in (step, *keep):
                shutil.rmtree(path)

    def clear_unfinished(self) -> None:
        """Make the folder, without what a killed save left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".saving-*"):
            shutil.rmtree(leftover)

    def remove(self) -> None:
        """Remove all of them: a finished run does not need them."""
        shutil.rmtree(self.path, ignore_errors=True)


def read_best_step(checkpoint: Path) -> int | None:
    """Return the step of the best checkpoint until this one; None if the run does not validate."""
    step: int | None = json.loads((checkpoint / TRAINER_STATE).read_bytes())["best_global_step"]
    return step or None


def refuse_damaged(checkpoint: Path) -> None:
    """Refuse a checkpoint of which a file is cut short, empty or gone, before anything is loaded from it.

    Raises:
        UserError: naming the file, and how to go on without the checkpoint.
    """
    gone = [checkpoint / names for names in _CHECKPOINT_FILES if not any(checkpoint.glob(names))]
    for path in sorted({*checkpoint.iterdir(), *gone}):
        try:
            if path in gone:
                damage = "no such file"
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    continue
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path):  # what torch.save writes; its directory stands at the end
                    continue
            elif path.suffix != ".json" or isinstance(json.loads(path.read_bytes()), dict):
                continue
            else:
                damage = "not a JSON object"
        except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
            damage = str(error)
        raise UserError(
            f"{path}: is damaged ({damage}); remove {checkpoint} and go on from the checkpoint before it, or from the"
            f" start: manyicl train --resume {shlex.quote(str(checkpoint.parents[1]))}"
        )


def refuse_other_sharding(checkpoint: Path, *, sharded: bool) -> None:
    """Refuse a checkpoint of a run that was sharded by FSDP2 without FSDP2, and the reverse: their files differ.

    Raises:
        UserError: naming the launch that it needs.
    """
    was_sharded = (checkpoint / f"{FSDP_MODEL_NAME}.bin").exists() or (checkpoint / f"{FSDP_MODEL_NAME}_0").exists()
    if was_sharded == sharded:
        return
    run = shlex.quote(str(checkpoint.parents[1]))
    if was_sharded:
        how = "under FSDP; resume it so: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m manyicl train"
    else:
        how = "without FSDP; resume it so: manyicl train"
    raise UserError(f"{checkpoint}: was written {how} --resume {run}")


def find_changes(before: RunConfig, now: RunConfig) -> dict[str, Any]:
    """Return the settings in which two recipes differ, such as 'train.num_steps', as they are now."""

    def settings(config: RunConfig) -> dict[str, Any]:
        content = config.model_dump()
        flat = {key: value for key, value in content.items() if not isinstance(value, dict)}
        tables = [(section, table) for section, table in content.items() if isinstance(table, dict)]
        return flat | {f"{section}.{key}": value for section, table in tables for key, value in table.items()}

    old, new = settings(before), settings(now)
    return {key: value for key, value in new.items() if value != old[key]}


def describe_run(prepared: Prepared) -> RunState:
    """Return what run.json says from the start: versions, commit, hashes, and the plan's counts."""
    config = prepared.config
    content = {
        "schema": RUN_SCHEMA,
        "finished": False,
        "python": platform.python_version(),
        "packages": package_versions(),
        "git_commit": git_commit(),
        "device": device_name(),
        "model": locate_model(config.model.path),
        "weights": fingerprint_weights(locate_model(config.model.path)),
        **({"frame": asdict(prepared.frame)} if config.template.style == "chat" else {}),
        "tasks": {
            name: {"sha256": t.task.sha256, "dropped": count_dropped(t, config)} for name, t in prepared.tasks.items()
        },
        "plan": {**count_plan(prepared.packs, pack_tokens=config.pack_tokens), "sha256": hash_plan(prepared.packs)},
    }
    return RunState.model_validate(content)


def _to_json(content: Any) -> str:
    """Return JSON as the files of a run have it: indented, with a line end."""
    return json.dumps(content, indent=1) + "\n"
