"""The [compare] section of a recipe: which arms are compared, on which tasks, and how they are evaluated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manyicl.errors import UserError
from manyicl.inference import NUM_NEAREST, AnswerSettings, ShotPolicy, check_choice
from manyicl.tasks import Task
from manyicl.training import RunConfig, absolute_paths, check_weights

ArmName = Literal["base", "zero-shot", "few-shot", "metaicl", "manyicl", "dedicated", "dedicated-tuned"]
# Arms of earlier versions, which old recipes still name.
GONE_ARMS = ("dedicated-many-shot", "dedicated-free")
Match = Literal["tokens", "answers", "flops"]
Role = Literal["trained", "held-out"]
TaskRole = Literal["trained", "held-out", "familiar"]
# The setting of MetaICL's authors (arXiv 2110.15943): so many shots, in sequences of so many tokens.
METAICL_SHOTS, METAICL_TOKENS = 16, 1024
# A run of dedicated-tuned trains on this many times the tokens of the dedicated model of the same task.
TUNED_FACTOR = 8
# Its learning rates as multiples of train.learning_rate, if the recipe names none: steps of half a decade.
TUNED_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training."""

    name: ArmName
    title: str
    """Its name in tables and sentences."""
    about: str
    """A sentence that says how it is trained."""
    trained: bool = True
    """Whether it is trained at all; the base is not."""
    per_task: bool = False
    """Whether every task has a model of its own."""
    matched: bool = True
    """Whether it spends as much as the other arms."""
    tuned: bool = False
    """Whether learning rate and number of steps are chosen for each task separately."""


ARMS: Mapping[ArmName, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "base", "The model as it was, not trained.", trained=False),
        Arm("zero-shot", "zero-shot FT", "All tasks at once, one example per sequence."),
        Arm(
            "few-shot",
            "few-shot FT",
            "All tasks at once, a few shots and one query per sequence; only the last answer is trained.",
        ),
        Arm(
            "metaicl",
            "MetaICL's own setting",
            f"As few-shot FT, with {METAICL_SHOTS} shots per sequence, in at most {METAICL_TOKENS:,} tokens.",
        ),
        Arm("manyicl", "ManyICL", "All tasks at once, as many examples per sequence as fit; every answer is trained."),
        Arm("dedicated", "dedicated FT", "One model per task, one example per sequence.", per_task=True),
        Arm(
            "dedicated-tuned",
            "dedicated FT, tuned (ceiling, not matched)",
            f"As dedicated, with up to {TUNED_FACTOR} times the tokens; learning rate and number of steps are chosen"
            " for each task on its validation rows.",
            per_task=True,
            matched=False,
            tuned=True,
        ),
    )
}


class CompareSettings(BaseModel):
    """Which arms are compared, on which tasks, and how they are evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field("comparison", min_length=1)
    """Title of its report."""
    arms: tuple[ArmName, ...] = Field(("base", "zero-shot", "few-shot", "manyicl", "dedicated"), min_length=1)
    """Arms, in the order of the tables."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    """Training seeds; each has its own episodes, adapters, shots and queries."""
    match: Match = "tokens"
    """The amount that is equal for all arms: processed tokens, supervised answers or FLOPs."""
    few_shot_shots: Annotated[int, Field(gt=0)] = 5
    """Shots per sequence of the few-shot arm."""
    held_out_tasks: tuple[str, ...] = ()
    """New tasks, which no arm is trained on."""
    familiar_tasks: tuple[str, ...] = ()
    """Tasks that the base can already do and no arm is trained on: they measure forgetting, and are not in the
    headline."""
    dedicated_tasks: tuple[str, ...] = ()
    """Tasks that get a model of their own, and the first of the trained ones to be evaluated, also without such an arm.
    Default: all trained tasks."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Rates to try for every arm, with the first seed; the one that scores best on validation rows is used for all
    seeds, and one with a loss that is not finite counts as worst. Default: train.learning_rate, and for dedicated-tuned
    0.1 to 10 times as much."""
    arm_rates: dict[ArmName, Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    """Rates of single arms, one or more above 0 for each, instead of learning_rates. A single one is used without a
    trial, such as one that an earlier comparison chose; dedicated-tuned still chooses its steps."""
    asked_tasks: Annotated[int, Field(ge=0)] = 0
    """How many trained tasks are evaluated, spread over the families; 0: all. Tasks with a dedicated model always
    are."""
    shots: tuple[Annotated[int, Field(ge=0)] | Literal["fill"], ...] = Field((0, 1, 4, 16, 64), min_length=1)
    """Numbers of shots, and fill for as many as fit; those that few-shot and metaicl are trained with are added if they
    are compared."""
    draws: Annotated[int, Field(gt=0)] = 5
    """Draws of shots per task and seed."""
    choose: ShotPolicy = "random"
    """How shots are chosen: at 'random'; 'balanced', labels taking turns; or 'nearest', shared random shots and after
    them those most like the query (BM25). Only in evaluation; training episodes are random."""
    num_nearest: Annotated[int, Field(gt=0)] = NUM_NEAREST
    """Most shots of a query's own, if the nearest are chosen."""
    queries: Annotated[int, Field(gt=0)] = 200
    """Test rows per task, the same for every number of shots and draw."""
    validation_queries: Annotated[int, Field(ge=0)] = 50
    """Validation rows per trained task, to choose the number of shots and the learning rate; 0: every arm gets the most
    shots that it was trained with, and no rates can be tried."""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    """Longest sequence of a query with its shots. Default: episodes.token_budget."""
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """Most tokens of a generated answer. Default: as many as the longest train answer has, at most 256."""
    normalize: Literal["none", "tokens", "characters", "bytes"] = "none"
    """The length that the log-probability of a known answer is divided by before the highest is chosen."""
    calibrate: Literal["none", "contextual"] = "none"
    """contextual: the probability of a known answer is divided by its probability after inputs without content, with
    the same shots."""
    stop: tuple[str, ...] = ()
    """Texts that end a generated answer."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """What logits are divided by before a token of a generated answer is sampled; 0: the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that have this probability together are sampled from."""
    samples: Annotated[int, Field(gt=0)] = 1
    """How often an answer is generated; the one that most samples give is taken."""
    text_files: tuple[str, ...] = ()
    """Files of neutral text, to measure forgetting on."""
    text_windows: Annotated[int, Field(gt=0)] = 200
    """Windows read per text file, evenly spread."""
    text_window_tokens: Annotated[int, Field(gt=1)] = 512
    """Length of a window."""
    drift_points: Annotated[int, Field(gt=0)] = 4
    """How often the texts are read while an arm with one model trains, evenly spread, the last time at its end: how
    forgetting grows."""
    flips: bool = True
    """Evaluate after shots with exchanged labels: does the model read its context?"""
    orders: bool = True
    """Evaluate after the same shots in other orders."""
    examples: Annotated[int, Field(ge=0)] = 2
    """Queries per task that the report shows in full."""

    @model_validator(mode="after")
    def _has_nearest_to_count(self) -> Self:
        """Refuse a number of nearest shots if none are chosen. Recipes that were written out have the default."""
        if self.choose != "nearest" and self.num_nearest != NUM_NEAREST:
            raise ValueError(
                f"num_nearest = {self.num_nearest}: does nothing with choose = '{self.choose}'; set choose = 'nearest',"
                " or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_answered(self) -> Self:
        """Refuse settings of answers that contradict each other, before hours of training instead of after them."""
        try:
            self.answering.decodings(0)
            check_choice(self.choose, self.num_nearest, calibrate=self.calibrate)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def answering(self) -> AnswerSettings:
        """How every arm answers."""
        names = [one.name for one in fields(AnswerSettings)]
        return AnswerSettings(**{name: getattr(self, name) for name in names})

    @property
    def shared_arms(self) -> list[ArmName]:
        """The arms that train one model on all tasks."""
        return [name for name in self.arms if ARMS[name].trained and not ARMS[name].per_task]

    @property
    def fixed_shots(self) -> Mapping[ArmName, int]:
        """Arm -> shots per training sequence, of the arms that are trained with one number of shots."""
        return {"few-shot": self.few_shot_shots, "metaicl": METAICL_SHOTS}

    @model_validator(mode="before")
    @classmethod
    def _knows_what_is_gone(cls, values: Any) -> Any:
        """Accept the recipes of earlier versions, which name every setting; refuse what has no meaning any more."""
        if not isinstance(values, dict):
            return values
        if values.get("choose_by", "validation") != "validation":
            raise ValueError(
                f"choose_by = {values['choose_by']!r} is gone; learning rates are chosen by validation_queries rows of"
                " each task: leave it out"
            )
        values = {key: value for key, value in values.items() if key not in ("choose_by", "free_factor")}
        arms = values.get("arms")
        gone = [arm for arm in arms if arm in GONE_ARMS] if isinstance(arms, list | tuple) else []
        if gone:
            warnings.warn(
                f"compare.arms: {' and '.join(gone)} of earlier versions {'is' if len(gone) == 1 else 'are'} gone and"
                " left out; dedicated-tuned is the ceiling now",
                stacklevel=2,
            )
            values["arms"] = [arm for arm in arms if arm not in GONE_ARMS]
        return values

    @field_validator(
        "arms", "seeds", "held_out_tasks", "familiar_tasks", "dedicated_tasks", "learning_rates", "shots", "text_files"
    )
    @classmethod
    def _has_no_twins(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("names something twice")
        return values

    @model_validator(mode="after")
    def _can_choose_a_rate(self) -> Self:
        for arm, rates in self.arm_rates.items():
            if arm not in self.arms or not ARMS[arm].trained:
                raise ValueError(f"arm_rates: '{arm}' is not trained here; leave it out, or name it in arms")
            if len(set(rates)) < len(rates):
                raise ValueError(f"arm_rates: '{arm}' names a rate twice")
        tried = any(self.rates_to_try(arm) for arm in self.arms if ARMS[arm].trained)
        if tried and not self.validation_queries:
            raise ValueError("learning_rates are chosen by validation rows, and validation_queries = 0; raise it")
        if "dedicated-tuned" in self.arms and not self.validation_queries:
            raise ValueError("dedicated-tuned is tuned on validation rows, and validation_queries = 0; raise it")
        return self

    def rates_to_try(self, arm: ArmName) -> tuple[float, ...]:
        """Return the learning rates that an arm chooses from; () if it has none, or a single one of its own."""
        rates = self.arm_rates.get(arm, self.learning_rates)
        return () if arm in self.arm_rates and len(rates) == 1 else rates

    def drift_steps(self, num_steps: int) -> int:
        """Return after how many steps each the texts are read in a run of `num_steps`."""
        return ceil(num_steps / self.drift_points)


class CompareConfig(RunConfig):
    """A recipe of a comparison: the sections of a run, which all arms share, and [compare]."""

    PATHS: ClassVar[tuple[tuple[str, str], ...]] = (*RunConfig.PATHS, ("compare", "text_files"))

    compare: CompareSettings

    @model_validator(mode="after")
    def _arms_spend_the_same(self) -> Self:
        if self.train.early_stopping_patience is not None:
            raise ValueError("train.early_stopping_patience: the arms of a comparison spend the same; leave it out")
        return self

    @model_validator(mode="after")
    def _leaves_room_for_inputs(self) -> Self:
        limit = self.compare.max_new_tokens
        if limit is not None and limit >= self.max_tokens:
            raise ValueError(
                f"compare.max_new_tokens = {limit}: an answer must leave room for its input in {self.max_tokens:,}"
                " tokens; lower it, or raise compare.max_tokens"
            )
        return self

    @property
    def max_tokens(self) -> int:
        """The longest sequence of a query with its shots."""
        return self.compare.max_tokens or self.episodes.token_budget

    def rates_of(self, arm: ArmName) -> tuple[float, ...]:
        """Return the learning rates that are tried for an arm; () if it is trained at `fixed_rate`."""
        if not ARMS[arm].tuned:
            return self.compare.rates_to_try(arm)
        rates = self.compare.arm_rates.get(arm, self.compare.learning_rates)
        return rates or tuple(float(f"{factor * self.train.learning_rate:.3g}") for factor in TUNED_RATES)

    def fixed_rate(self, arm: ArmName) -> float:
        """Return the learning rate of an arm for which none are tried."""
        return self.compare.arm_rates.get(arm, (self.train.learning_rate,))[0]


@dataclass(frozen=True, slots=True)
class Roles:
    """What each task of a comparison is there for; names are sorted."""

    trained: tuple[str, ...]
    """Tasks that the arms are trained on."""
    held_out: tuple[str, ...]
    """Tasks that no arm is trained on."""
    familiar: tuple[str, ...]
    """Tasks that the base can already do; no arm is trained on them."""
    dedicated: tuple[str, ...]
    """Trained tasks that get a model of their own, if a dedicated arm is compared."""
    asked_trained: tuple[str, ...]
    """Trained tasks that are evaluated."""

    def role_of(self, task: str) -> TaskRole:
        """Return the role of a task."""
        return "held-out" if task in self.held_out else "familiar" if task in self.familiar else "trained"

    @property
    def asked(self) -> tuple[str, ...]:
        """Return all tasks that are evaluated, sorted."""
        return tuple(sorted([*self.asked_trained, *self.held_out, *self.familiar]))


def _take_turns(names: Sequence[str], tasks: Mapping[str, Task]) -> list[str]:
    """Return the names so that the tasks' families take turns, each in the order of its names."""
    by_family: dict[str, list[str]] = {}
    for name in names:
        by_family.setdefault(tasks[name].family, []).append(name)
    return [name for turn in zip_longest(*by_family.values()) for name in turn if name is not None]


def choose_roles(config: CompareConfig, tasks: Mapping[str, Task]) -> Roles:
    """Return the roles of a comparison's tasks.

    tasks: all tasks that have a role, by name.
    """
    settings = config.compare
    held_out, familiar = sorted(settings.held_out_tasks), sorted(settings.familiar_tasks)
    trained = sorted({*tasks} - {*held_out, *familiar})
    dedicated = sorted(settings.dedicated_tasks or trained)
    # Tasks with a model of their own are always evaluated. Those that are named have the next places, so that a
    # comparison asks the same tasks with dedicated arms and without.
    asked = dedicated if any(ARMS[arm].per_task for arm in settings.arms) else []
    named = [name for name in settings.dedicated_tasks if name not in asked]
    others = [name for name in trained if name not in {*asked, *named}]
    turns = [*_take_turns(sorted(named), tasks), *_take_turns(others, tasks)]
    num_left = max(0, (settings.asked_tasks or len(trained)) - len(asked))
    asked_trained = sorted([*asked, *turns[:num_left]])
    return Roles(tuple(trained), tuple(held_out), tuple(familiar), tuple(dedicated), tuple(asked_trained))


def refuse_ignored(config: CompareConfig) -> None:
    """Refuse settings of a run that no arm would have, and a matching to an arm that is not compared.

    Not part of the settings themselves: a comparison that an earlier version began with them goes on.

    Raises:
        UserError: naming the setting.
    """
    usual_episodes = type(config.held_out)().episodes
    for name, value, allowed, why in (
        ("seed", config.seed, (0,), "its models are trained with compare.seeds"),
        ("held_out.episodes", config.held_out.episodes, (usual_episodes, 0), "it asks test rows itself"),
        ("episodes.targets", config.episodes.targets, ("all",), "each arm has its own"),
    ):
        if value not in allowed:
            raise UserError(f"{name} = {value!r}: does nothing in a comparison, as {why}; leave it out")
    settings = config.compare
    others = [arm for arm in settings.arms if ARMS[arm].trained and ARMS[arm].matched]
    # A dedicated model gets the tokens of zero-shot episodes, which are also as many answers and FLOPs.
    differ = len(others) > 1 and any(arm in others for arm in settings.fixed_shots)
    if settings.match != "tokens" and differ and "manyicl" not in others:
        raise UserError(
            f"compare.match = '{settings.match}': arms are matched to ManyICL, which is not compared; add manyicl to"
            " compare.arms, or match by tokens"
        )


def check_splits(config: CompareConfig, roles: Roles, tasks: Mapping[str, Task]) -> None:
    """Refuse tasks that lack the rows that the comparison asks.

    tasks: those of the roles, by name.

    Raises:
        UserError: naming the task or the setting.
    """
    arms = [ARMS[name] for name in config.compare.arms]
    for name in roles.asked:
        if not tasks[name].test:
            raise UserError(f"task '{name}': has no test rows, so no arm can be asked; give it some, or leave it out")
    for name in roles.dedicated if any(arm.tuned for arm in arms) else ():
        if not tasks[name].validation:
            raise UserError(
                f"task '{name}': has no validation rows, which dedicated-tuned chooses its rate and steps by; give it"
                " more train rows, or leave it out of compare.dedicated_tasks"
            )
    for arm in [arm for arm in arms if arm.trained and not arm.tuned and config.rates_of(arm.name)]:
        asked = roles.dedicated if arm.per_task else roles.asked_trained
        if not any(tasks[name].validation for name in asked):
            raise UserError(
                f"compare.learning_rates: no task that {arm.title} is evaluated on has validation rows, so no rate can"
                " be chosen; give the trained tasks more train rows, or name no rates"
            )


def choose_tasks(config: CompareConfig, names: Sequence[str]) -> list[str]:
    """Return the trained tasks among the folder's `names`.

    Raises:
        UserError: a task has two roles, a dedicated one is not trained, or none is left to train on.
    """
    settings = config.compare
    untrained = [*settings.held_out_tasks, *settings.familiar_tasks]
    trained = list(config.tasks.names) or [name for name in names if name not in untrained]
    for name in untrained:
        if name in trained or untrained.count(name) > 1:
            raise UserError(
                f"compare.held_out_tasks: '{name}' is in tasks.names or compare.familiar_tasks too; give it one role"
            )
    if not trained:
        raise UserError("tasks.names: every task of the folder is held out; leave some to train on")
    check_weights(config, trained)
    for name in settings.dedicated_tasks:
        if name not in trained:
            raise UserError(f"compare.dedicated_tasks: '{name}' is not a trained task; name trained ones")
    return trained


def absolute_texts(config: CompareConfig) -> CompareConfig:
    """Return the recipe with all its paths absolute, so that it can be continued from anywhere."""
    config = absolute_paths(config)
    files = tuple(str(Path(file).expanduser().resolve()) for file in config.compare.text_files)
    return config.model_copy(update={"compare": config.compare.model_copy(update={"text_files": files})})
