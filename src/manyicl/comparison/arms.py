"""The arms of a comparison: on what each is trained, and what makes their budgets equal.

Every arm starts from the same weights, sees the same train rows, and has the recipe's optimizer and schedule. What
differs is how the rows are laid out in sequences and which answers are targets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manyicl.episodes import Episode, PackDataset, TokenizedTask, iter_episodes, lengths_of, pack_episodes
from manyicl.errors import UserError
from manyicl.models import ModelShape, count_flops, load_config, shape_model
from manyicl.training import RunConfig, TrainSettings, count_plan, plan_packs

ArmName = Literal["base", "zero-shot", "few-shot", "manyicl", "dedicated", "dedicated-tuned"]
# Arms of earlier versions.
GONE_ARMS = ("dedicated-many-shot", "dedicated-free")
Match = Literal["tokens", "answers", "flops"]
# Tokens of two arms that are matched by them differ by less than this share, where the packs allow it.
TOKEN_TOLERANCE = 0.002
# Pack lengths that are tried, as shares of the recipe's away from the one in proportion.
PACK_CHANGES = tuple(sign * step / 200 for step in range(13) for sign in (1, -1))[1:]
# A run of dedicated-tuned is trained on this many times the tokens of the dedicated model of the same task. It has this
# many checkpoints, and the best of them is kept: so the number of steps is chosen too.
TUNED_FACTOR, TUNED_CHECKPOINTS = 8, 16
# Its learning rates as multiples of train.learning_rate, if the recipe names none: steps of half a decade.
TUNED_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
# Tokens of validation episodes that its checkpoints are compared by, if the recipe measures no validation loss.
TUNED_VALIDATION_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training.

    per_task: a model of its own for every task. matched: it spends what the others spend. tuned: its learning rate and
    its number of steps are chosen for each task alone.
    """

    name: ArmName
    title: str
    about: str
    trained: bool = True
    per_task: bool = False
    matched: bool = True
    tuned: bool = False


ARMS: Mapping[ArmName, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "base", "The model as it was, not trained.", trained=False),
        Arm("zero-shot", "zero-shot FT", "All tasks at once, one example a sequence."),
        Arm(
            "few-shot",
            "few-shot FT",
            "All tasks at once, a few shots and one query a sequence; the last answer trained.",
        ),
        Arm("manyicl", "ManyICL", "All tasks at once, as many examples a sequence as fit; every answer trained."),
        Arm("dedicated", "dedicated FT", "One model a task, one example a sequence.", per_task=True),
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
    """Which arms are compared, on what, and how they are asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("comparison", min_length=1, description="what its report is called")
    arms: tuple[ArmName, ...] = Field(
        ("base", "zero-shot", "few-shot", "manyicl", "dedicated"),
        min_length=1,
        description="in the order of the tables",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="training seeds; each has its own episodes, adapters, shots and queries"
    )
    match: Match = Field(
        "tokens", description="what all arms spend alike: processed tokens, supervised answers or FLOPs"
    )
    few_shot_shots: Annotated[int, Field(gt=0)] = Field(5, description="shots of the few-shot arm's sequences")
    held_out_tasks: tuple[str, ...] = Field((), description="new tasks: no arm is trained on them")
    familiar_tasks: tuple[str, ...] = Field(
        (),
        description="tasks that the base is known to do and no arm is trained on: for forgetting, not for the headline",
    )
    dedicated_tasks: tuple[str, ...] = Field(
        (), description="tasks that get a model of their own; all trained unless said"
    )
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="tried for every arm, with the first seed; the best on validation rows is taken for all seeds."
        " train.learning_rate if none are named, and for dedicated-tuned 0.1 to 10 times as much",
    )
    asked_tasks: Annotated[int, Field(ge=0)] = Field(
        0, description="trained tasks that are asked, spread over the families; 0: all. Dedicated ones always are"
    )
    shots: tuple[Annotated[int, Field(ge=0)] | Literal["fill"], ...] = Field(
        (0, 1, 4, 16, 64),
        min_length=1,
        description="shot counts, and fill for as many as fit; also few_shot_shots if that arm is compared",
    )
    draws: Annotated[int, Field(gt=0)] = Field(5, description="draws of shots a task and seed")
    queries: Annotated[int, Field(gt=0)] = Field(200, description="test rows asked, the same at every k and draw")
    validation_queries: Annotated[int, Field(ge=0)] = Field(
        50,
        description="validation rows asked of each trained task, to choose k and learning rate; 0: all are asked with"
        " the most shots, and no rates can be tried",
    )
    max_tokens: Annotated[int, Field(gt=0)] | None = Field(
        None, description="longest sequence of a question; episodes.token_budget unless said"
    )
    max_new_tokens: Annotated[int, Field(gt=0)] | None = Field(
        None, description="most tokens of a generated answer; as many as the longest train answer has, at most 256"
    )
    text_files: tuple[str, ...] = Field((), description="neutral text, to measure forgetting on")
    text_windows: Annotated[int, Field(gt=0)] = Field(200, description="windows read of each text file, evenly spread")
    text_window_tokens: Annotated[int, Field(gt=1)] = Field(512, description="length of a window")
    flips: bool = Field(True, description="ask behind shots with exchanged labels: does the model read its context?")
    orders: bool = Field(True, description="ask behind the same shots in other orders")
    examples: Annotated[int, Field(ge=0)] = Field(2, description="queries a task whose texts the report shows")

    @model_validator(mode="before")
    @classmethod
    def _knows_what_is_gone(cls, values: Any) -> Any:
        """Take the recipes of earlier versions, which name every setting; refuse what has no meaning any more."""
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
        if self.learning_rates and not self.validation_queries:
            raise ValueError("learning_rates are chosen by validation rows, and validation_queries = 0; ask some")
        if "dedicated-tuned" in self.arms and not self.validation_queries:
            raise ValueError("dedicated-tuned is tuned by validation rows, and validation_queries = 0; ask some")
        return self


class CompareConfig(RunConfig):
    """A recipe of a comparison: a run's sections, which say what the arms share, and [compare]."""

    compare: CompareSettings


@dataclass(frozen=True, slots=True)
class Spent:
    """What a plan spends: optimizer steps, packs, episodes, answers that are targets, target tokens, tokens, FLOPs.

    tokens_by_task: processed tokens of each task. short_episodes: with fewer shots than the recipe says. head_tokens:
    processed tokens of instructions and BOS. train_rows, target_rows: the tasks' train rows, and how many of them are a
    target at least once.
    """

    steps: int
    packs: int
    episodes: int
    answers: int
    targets: int
    tokens: int
    flops: int
    tokens_by_task: Mapping[str, int]
    short_episodes: int = 0
    head_tokens: int = 0
    train_rows: int = 0
    target_rows: int = 0

    def of(self, match: Match) -> int:
        """Return the amount that arms are matched by."""
        return {"tokens": self.tokens, "answers": self.answers, "flops": self.flops}[match]


def run_config(config: CompareConfig, *, seed: int, tasks: Sequence[str], **changes: Mapping[str, Any]) -> RunConfig:
    """Return the recipe of one run on `tasks`: the comparison's own with changes by section."""
    values = config.model_dump(exclude={"compare"})
    values |= {"seed": seed, "held_out": {"episodes": 0}}
    values["tasks"] = {**values["tasks"], "names": tuple(tasks)}
    for section, change in changes.items():
        values[section] = {**values[section], **change}
    return RunConfig.model_validate(values)


def episode_changes(arm: ArmName, settings: CompareSettings) -> dict[str, Any]:
    """Return what an arm changes in [episodes]."""
    if arm == "few-shot":
        return {"shots": settings.few_shot_shots, "targets": "last"}
    if arm == "manyicl":
        return {"targets": "all"}
    return {"shots": 0, "targets": "all"}


def count_spent(packs: PackDataset, config: RunConfig, shape: ModelShape) -> Spent:
    """Return what the packs of a run spend."""
    plan = count_plan(packs, pack_tokens=config.pack_tokens)
    shots = config.episodes.shots
    short = sum(
        len(episode.examples) <= shots for pack in packs.packs for episode in pack.episodes if isinstance(shots, int)
    )
    return Spent(
        steps=config.train.num_steps,
        packs=plan["packs"],
        episodes=plan["episodes"],
        answers=plan["answers"],
        targets=plan["targets"],
        tokens=plan["tokens"],
        flops=_count_plan_flops(packs, shape),
        tokens_by_task=plan["tokens_by_task"],
        short_episodes=short,
        head_tokens=_count_head_tokens(packs),
        train_rows=sum(len(packs.maker.tasks[name].splits["train"]) for name in packs.maker.task_names),
        target_rows=_count_target_rows(packs),
    )


def _count_head_tokens(packs: PackDataset) -> int:
    """Return the tokens before the first example of all episodes; a renamed episode may have a shorter head."""
    tasks = {name: lengths_of(packs.maker.tasks[name], split=packs.maker.split) for name in packs.maker.task_names}
    total = 0
    for episode in (episode for pack in packs.packs for episode in pack.episodes):
        task = tasks[episode.task]
        is_renamed = episode.names is not None and task.labels is not None
        total += task.labels.num_head_tokens if is_renamed and task.labels else task.num_head_tokens
    return total


def _count_target_rows(packs: PackDataset) -> int:
    """Return how many train rows are the target of an episode at least once."""
    first = -1 if packs.settings.targets == "last" else 0
    episodes = (episode for pack in packs.packs for episode in pack.episodes)
    return len({(episode.task, row) for episode in episodes for row in episode.examples[first:].tolist()})


def _count_plan_flops(packs: PackDataset, shape: ModelShape) -> int:
    """Return the model FLOPs of all packs; FLOPs add up, so those of one step may be counted as one row."""
    total = 0
    for step, divisors in enumerate(packs.divisors):
        row = packs.packs[step * packs.packs_per_step : (step + 1) * packs.packs_per_step]
        lengths = [episode.num_tokens for pack in row for episode in pack.episodes]
        total += count_flops(shape, lengths, num_targets=divisors.num_targets)
    return total


class ArmPlanner:
    """Gives each arm its run's recipe, such that all spend alike.

    tasks: the trained tasks in ids, by name.

    Raises:
        UserError: no arm is trained.
    """

    def __init__(self, config: CompareConfig, tasks: Mapping[str, TokenizedTask]) -> None:
        self.config, self.tasks = config, tasks
        model = config.model
        self.shape = shape_model(load_config(model), lora=model.lora, trust_remote_code=model.trust_remote_code)
        self._own_plans: dict[tuple[ArmName, int], tuple[RunConfig, Spent]] = {}
        self._plans: dict[tuple[ArmName, int], tuple[RunConfig, Spent]] = {}
        self._dedicated: dict[tuple[ArmName, str, int], tuple[RunConfig, Spent]] = {}

    def plan_arm(self, arm: ArmName, *, seed: int) -> tuple[RunConfig, Spent]:
        """Return the recipe of an arm that trains one model on all tasks, and what it spends.

        Matched by tokens: as many optimizer steps for all. ManyICL's packs are made such that its step processes what
        one of the arm with the emptiest packs does, as nearly as its long episodes allow; the others' short ones then
        meet what that came to. By answers or FLOPs: as many steps as come nearest to ManyICL's.
        """
        if (arm, seed) not in self._plans:
            match = self.config.compare.match
            plan = self._own_plan(arm, seed=seed)
            if match == "tokens":
                plan = self._fit_packs(*plan, tokens=self._tokens_to_meet(arm, seed=seed))
            elif arm != "manyicl" and "manyicl" in self.shared_arms:
                plan = self._fit_steps(*plan, wanted=self.plan_arm("manyicl", seed=seed)[1].of(match))
            self._plans[arm, seed] = plan
        return self._plans[arm, seed]

    def _tokens_to_meet(self, arm: ArmName, *, seed: int) -> int:
        if arm != "manyicl" and "manyicl" in self.shared_arms:
            return self.plan_arm("manyicl", seed=seed)[1].tokens
        return min(self._own_plan(name, seed=seed)[1].tokens for name in {arm, *self.shared_arms})

    def _own_plan(self, arm: ArmName, *, seed: int) -> tuple[RunConfig, Spent]:
        """Return an arm's recipe before it is fitted, and what it spends."""
        if (arm, seed) not in self._own_plans:
            changes = episode_changes(arm, self.config.compare)
            config = run_config(self.config, seed=seed, tasks=list(self.tasks), episodes=changes)
            self._own_plans[arm, seed] = self._spend(config)
        return self._own_plans[arm, seed]

    @property
    def shared_arms(self) -> list[ArmName]:
        """The arms that train one model on all tasks."""
        chosen = [ARMS[name] for name in self.config.compare.arms]
        return [arm.name for arm in chosen if arm.trained and not arm.per_task]

    def plan_dedicated(self, arm: ArmName, task: str, *, seed: int) -> tuple[RunConfig, Spent]:
        """Return the recipe of one task's own model: its tokens are the task's share of an arm that has all tasks.

        A step holds the task's longest example, or the share of that arm's step if that is more; there are as many
        steps as the tokens then give. A tuned model has `TUNED_FACTOR` times the tokens, in steps of the same size. The
        checkpoint that becomes the model is chosen as in the other arms, by the recipe's train.keep and
        train.validation_tokens; that of a tuned one is always the best by validation loss.

        Raises:
            UserError: that arm has no episode of the task.
        """
        if (arm, task, seed) not in self._dedicated:
            self._dedicated[arm, task, seed] = self._plan_dedicated(arm, task, seed=seed)
        return self._dedicated[arm, task, seed]

    def _plan_dedicated(self, arm: ArmName, task: str, *, seed: int) -> tuple[RunConfig, Spent]:
        _, whole = self.plan_arm("zero-shot", seed=seed)
        if task not in whole.tokens_by_task:
            raise UserError(
                f"task '{task}': no episode of it in the {whole.steps} steps that {ARMS[arm].title} is matched to;"
                " raise train.num_steps, or leave it out of compare.dedicated_tasks"
            )
        matched = whole.tokens_by_task[task]
        tokens = matched * (TUNED_FACTOR if ARMS[arm].tuned else 1)
        changes = episode_changes(arm, self.config.compare)
        shared, alone = self.config.train, lengths_of(self.tasks[task]).alone
        longest = int(alone[alone <= self.config.episodes.token_budget].max(initial=1))
        a_step = max(longest, matched // shared.num_steps)
        packs_per_step = -(-a_step // self.config.pack_tokens)
        pack_tokens = -(-a_step // packs_per_step)
        num_steps = max(1, round(tokens / a_step))
        train: dict[str, Any] = {
            "pack_tokens": pack_tokens,
            "packs_per_step": packs_per_step,
            "packs_per_batch": 1,
            "num_steps": num_steps,
            "warmup_steps": min(shared.warmup_steps, num_steps // 10),
            **_choose_checkpoints(ARMS[arm], num_steps=num_steps, shared=shared),
        }
        changes["token_budget"] = min(self.config.episodes.token_budget, pack_tokens)
        config = run_config(self.config, seed=seed, tasks=[task], episodes=changes, train=train)
        return self._fit_steps(*self._spend(config), wanted=tokens, by="tokens")

    def _spend(self, config: RunConfig) -> tuple[RunConfig, Spent]:
        tasks = {name: self.tasks[name] for name in config.tasks.names}
        return config, count_spent(plan_packs(config, tasks), config, self.shape)

    def _fit_packs(self, config: RunConfig, spent: Spent, *, tokens: int) -> tuple[RunConfig, Spent]:
        """Return the recipe with packs of the length that makes it spend `tokens`, or as near as they allow.

        How full packs are hangs on their length by leaps, so lengths around the proportional one are tried.
        """
        fixed = isinstance(config.episodes.shots, int)
        longest = max(int(task.splits["train"].lengths.max()) + len(task.head_ids) for task in self.tasks.values())
        least = min(longest, config.pack_tokens) if fixed else config.episodes.token_budget
        best, best_tokens = config.pack_tokens, spent.tokens
        count_tokens = self._make_counter(config)
        for change in PACK_CHANGES:
            if abs(best_tokens - tokens) <= TOKEN_TOLERANCE * tokens:
                break
            pack_tokens = max(least, round(config.pack_tokens * (tokens / spent.tokens + change)))
            tried = count_tokens(pack_tokens)
            if abs(tried - tokens) < abs(best_tokens - tokens):
                best, best_tokens = pack_tokens, tried
        return (config, spent) if best == config.pack_tokens else self._spend(_with_packs(config, best))

    def _make_counter(self, config: RunConfig) -> Callable[[int], int]:
        """Return what counts the tokens of the recipe's run with packs of another length.

        Episodes are planned once for all lengths that leave them the same budget.
        """
        plans: dict[int, Callable[[], Iterator[Episode]]] = {}
        lengths = [lengths_of(self.tasks[name], split="train") for name in config.tasks.names]

        def count_tokens(pack_tokens: int) -> int:
            settings = _with_packs(config, pack_tokens).episodes
            if settings.token_budget not in plans:
                plans[settings.token_budget] = _replayed(iter_episodes(lengths, settings=settings, seed=config.seed))
            packs = pack_episodes(plans[settings.token_budget](), pack_tokens=pack_tokens, seed=config.seed)
            return sum(pack.num_tokens for pack in islice(packs, config.train.packs_per_step * config.train.num_steps))

        return count_tokens

    def _fit_steps(
        self, config: RunConfig, spent: Spent, *, wanted: int, by: Match | None = None
    ) -> tuple[RunConfig, Spent]:
        """Return the recipe with the number of steps that spends nearest to `wanted`."""
        match = by or self.config.compare.match
        best = config, spent
        for _ in range(4):
            steps = max(1, round(best[0].train.num_steps * wanted / best[1].of(match)))
            if steps == best[0].train.num_steps:
                break
            values = best[0].model_dump()
            values["train"]["num_steps"] = steps
            tried = self._spend(RunConfig.model_validate(values))
            if abs(tried[1].of(match) - wanted) >= abs(best[1].of(match) - wanted):
                break
            best = tried
        return best


def _choose_checkpoints(arm: Arm, *, num_steps: int, shared: TrainSettings) -> dict[str, Any]:
    """Return what a dedicated run changes in [train] about its checkpoints, of which one becomes its model.

    There are as many as in a run of the arms that share the recipe, or `TUNED_CHECKPOINTS` if steps are to be chosen.
    Without a validation loss none but the last is needed: the run is short.
    """
    tokens = shared.validation_tokens
    num_checkpoints = shared.num_steps / shared.checkpoint_every_steps
    if arm.tuned:
        tokens, num_checkpoints = tokens or TUNED_VALIDATION_TOKENS, TUNED_CHECKPOINTS
    every = max(1, round(num_steps / num_checkpoints)) if tokens else shared.num_steps * 1000
    # A checkpoint holds every line that was logged before it, and the steps of a tuned model are many and tiny.
    log_every = max(1, every // 4) if arm.tuned else 1
    every -= every % log_every
    return {
        "log_every_steps": log_every,
        "checkpoint_every_steps": every,
        "validation_tokens": tokens,
        "keep": "best" if arm.tuned else shared.keep,
    }


def _with_packs(config: RunConfig, pack_tokens: int) -> RunConfig:
    """Return the recipe with packs of another length, which no episode's budget passes."""
    values = config.model_dump()
    values["episodes"]["token_budget"] = min(config.episodes.token_budget, pack_tokens)
    values["train"]["pack_tokens"] = pack_tokens
    return RunConfig.model_validate(values)


def _replayed(source: Iterator[Episode]) -> Callable[[], Iterator[Episode]]:
    """Return what yields an endless plan from its start at each call, taking each episode of it from `source` once."""
    taken: list[Episode] = []

    def replay() -> Iterator[Episode]:
        for number in count():
            if number == len(taken):
                taken.append(next(source))
            yield taken[number]

    return replay


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
    for name in settings.dedicated_tasks:
        if name not in trained:
            raise UserError(f"compare.dedicated_tasks: '{name}' is not a trained task; name trained ones")
    return trained
