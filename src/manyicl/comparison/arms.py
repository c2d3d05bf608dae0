"""What each arm is trained on, and how the budgets of the arms are made equal.

Every arm starts from the same weights, sees the same train rows, and has the recipe's optimizer and schedule. The arms
differ in how the rows are laid out in sequences and in which answers are targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from manyicl.comparison.settings import (
    ARMS,
    METAICL_TOKENS,
    TUNED_FACTOR,
    Arm,
    ArmName,
    CompareConfig,
    Match,
)
from manyicl.episodes import Episode, PackDataset, TokenizedTask, iter_episodes, lengths_of, pack_episodes
from manyicl.errors import UserError, list_some
from manyicl.models import ModelShape, load_config, shape_model
from manyicl.planning import note_warmup
from manyicl.training import RunConfig, TrainSettings, count_plan, count_step_flops, most_shots, plan_packs

# Two arms that are matched by tokens differ by less than this fraction of them, if the packs allow it.
TOKEN_TOLERANCE = 0.002
# Lengths of packs to try: the one in proportion to the wanted tokens, changed by these fractions of the recipe's.
PACK_CHANGES = tuple(sign * step / 200 for step in range(13) for sign in (1, -1))[1:]
# A run of dedicated-tuned has this many checkpoints, and the best of them is kept: that chooses the number of steps.
TUNED_CHECKPOINTS = 16
# Tokens of validation episodes that its checkpoints are compared by, if the recipe measures no validation loss.
TUNED_VALIDATION_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Spent:
    """The training budget that a run uses, counted from its packs before it is trained."""

    steps: int
    """Optimizer steps."""
    packs: int
    """Sequences of episodes that go through the model together."""
    episodes: int
    """Instructions with their examples, several of which share a pack."""
    answers: int
    """Answers that are targets."""
    targets: int
    """Tokens that are targets."""
    tokens: int
    """Tokens that go through the model, without padding."""
    flops: int
    """Model FLOPs, forward and backward."""
    tokens_by_task: Mapping[str, int]
    """Task -> the part of `tokens` that is its own."""
    short_episodes: int = 0
    """Episodes with fewer shots than the recipe says."""
    head_tokens: int = 0
    """Tokens of instructions and BOS, among `tokens`."""
    train_rows: int = 0
    """Train rows of the run's tasks."""
    target_rows: int = 0
    """Train rows that are a target at least once."""
    most_shots: Mapping[str, int] = field(default_factory=dict)
    """Task -> the most shots that an answer is trained after."""

    def of(self, match: Match) -> int:
        """Return the amount that arms are matched by."""
        return {"tokens": self.tokens, "answers": self.answers, "flops": self.flops}[match]


def run_config(config: CompareConfig, *, seed: int, tasks: Sequence[str], **changes: Mapping[str, Any]) -> RunConfig:
    """Return the recipe of one run on `tasks`: the comparison's own, with `changes` by section."""
    values = config.model_dump(exclude={"compare"})
    values |= {"seed": seed, "held_out": {"episodes": 0}}
    weights = {name: weight for name, weight in config.tasks.weights.items() if name in tasks}
    values["tasks"] = {**values["tasks"], "names": tuple(tasks), "weights": weights}
    for section, change in changes.items():
        values[section] = {**values[section], **change}
    return RunConfig.model_validate(values)


def episode_changes(arm: ArmName, config: CompareConfig) -> dict[str, Any]:
    """Return the settings that an arm changes in [episodes]."""
    if arm in config.compare.fixed_shots:
        changes: dict[str, Any] = {"shots": config.compare.fixed_shots[arm], "targets": "last"}
        if arm == "metaicl":
            changes["token_budget"] = min(METAICL_TOKENS, config.episodes.token_budget)
        return changes
    if arm == "manyicl":
        return {"targets": "all"}
    return {"shots": 0, "targets": "all"}


def count_spent(packs: PackDataset, config: RunConfig, shape: ModelShape) -> Spent:
    """Return the budget that the packs of a run use."""
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
        flops=sum(count_step_flops(packs, shape)),
        tokens_by_task=plan["tokens_by_task"],
        short_episodes=short,
        head_tokens=_count_head_tokens(packs),
        train_rows=sum(len(packs.maker.tasks[name].splits["train"]) for name in packs.maker.task_names),
        target_rows=_count_target_rows(packs),
        most_shots=most_shots(packs),
    )


def tell_fewer_shots(
    arm: ArmName,
    config: CompareConfig,
    *,
    most: Mapping[int, Mapping[str, int]],
    num_train: Mapping[str, int],
    token_budget: int,
) -> str:
    """Return which tasks an arm is trained on with fewer shots than its own number, and why; "" if there are none.

    For each task it is the largest number over the counted seeds. If only some seeds were counted, it says how many.

    most: training seed -> task -> the most shots that an answer is trained after.
    num_train: task -> its train rows.
    token_budget: of the arm's episodes.
    """
    wanted = config.compare.fixed_shots.get(arm, 0)
    tasks = {name for shots in most.values() for name in shots}
    ranked = sorted((max(shots.get(name, 0) for shots in most.values()), name) for name in tasks)
    fewer = [(shots, name) for shots, name in ranked if shots < wanted]
    if not fewer:
        return ""
    is_short = [min(num_train[name], config.tasks.max_rows or num_train[name]) <= shots + 1 for shots, name in fewer]
    reasons = [
        *([] if all(is_short) else [f"its episodes of {token_budget:,} tokens hold no more"]),
        *(["a task has no more train rows"] if any(is_short) else []),
    ]
    named = list_some(f"{name} {shots:,}" for shots, name in fewer)
    num_seeds = len(config.compare.seeds)
    counted = f" with {len(most):,} of {num_seeds:,} seeds" if len(most) < num_seeds else ""
    return (
        f"{ARMS[arm].title}: at most {fewer[-1][0]:,} of its {wanted:,} shots in training{counted}, on"
        f" {len(fewer):,} of {len(tasks):,} tasks ({named}), because {' or '.join(reasons)}"
    )


def _count_head_tokens(packs: PackDataset) -> int:
    """Return the tokens before the first example, summed over episodes."""
    tasks = {name: lengths_of(packs.maker.tasks[name], split=packs.maker.split) for name in packs.maker.task_names}
    total = 0
    for episode in (episode for pack in packs.packs for episode in pack.episodes):
        task = tasks[episode.task]
        # Other label names may change the length of the instruction.
        is_renamed = episode.names is not None and task.labels is not None
        total += task.labels.num_head_tokens if is_renamed and task.labels else task.num_head_tokens
    return total


def _count_target_rows(packs: PackDataset) -> int:
    """Return how many train rows are the target of an episode at least once."""
    first = -1 if packs.settings.targets == "last" else 0
    episodes = (episode for pack in packs.packs for episode in pack.episodes)
    return len({(episode.task, row) for episode in episodes for row in episode.examples[first:].tolist()})


class ArmMatcher:
    """Gives each arm the recipe of its run, so that all arms spend the same amount.

    tasks: the trained tasks in ids, by name.
    """

    def __init__(self, config: CompareConfig, tasks: Mapping[str, TokenizedTask]) -> None:
        self.config, self.tasks = config, tasks
        model = config.model
        self.shape = shape_model(load_config(model), lora=model.lora, trust_remote_code=model.trust_remote_code)
        self._unmatched: dict[tuple[ArmName, int], tuple[RunConfig, Spent]] = {}
        self._matched: dict[tuple[ArmName, int, str | None], tuple[RunConfig, Spent]] = {}

    def match(self, arm: ArmName, *, seed: int, task: str | None = None) -> tuple[RunConfig, Spent]:
        """Return the recipe of a run and what it spends, at the recipe's own learning rate.

        task: the one that a dedicated model is trained on; None for an arm that trains one model on all tasks.

        Matched by tokens, all arms take the same number of optimizer steps. ManyICL's packs get the length at which a
        step processes as many tokens as one of the arm with the emptiest packs, as nearly as long episodes allow; the
        other arms, whose short episodes can be packed more exactly, then aim at the total that ManyICL reached. Matched
        by answers or FLOPs, an arm takes the number of steps that comes nearest to ManyICL's amount.

        A dedicated model gets the tokens that a zero-shot run on all tasks spends on its task. A step holds the task's
        longest example, or the task's part of a step of that run if that is more, in packs that the longest example
        fits; the tokens then give the number of steps, of which the warm-up is at most a tenth. A tuned model gets
        `TUNED_FACTOR` times the tokens, in steps of the same size. The checkpoint that becomes the model is chosen as
        in the other arms, by train.keep and train.validation_tokens; for a tuned model it is always the one with the
        best validation loss.

        Raises:
            UserError: the run that a dedicated model is matched to has no episode of `task`.
        """
        key = arm, seed, task
        if key not in self._matched:
            self._matched[key] = (
                self._match_shared(arm, seed=seed) if task is None else self._match_dedicated(arm, task, seed=seed)
            )
        return self._matched[key]

    def refuse_unfit_shots(self) -> None:
        """Refuse a number of shots of few-shot fine-tuning that no episode of any task holds.

        MetaICL's number is not the user's choice: its authors show fewer, too, where no more fit.

        Raises:
            UserError: with the number that some episodes hold.
        """
        wanted, most = self.config.compare.few_shot_shots, 0
        for seed in self.config.compare.seeds:
            most = max(most, max(self.match("few-shot", seed=seed)[1].most_shots.values(), default=0))
            if most >= wanted:
                return
        fix = f"lower it to {most:,}" if most else "leave few-shot out of compare.arms"
        told = self._note_shots("few-shot", seeds=self.config.compare.seeds)
        raise UserError(f"compare.few_shot_shots = {wanted:,}: {told}; {fix}")

    def list_notes(self, *, seeds: Sequence[int]) -> list[str]:
        """Return what is seldom meant to be so of each arm with one model: a line each.

        seeds: those whose shots are counted. Other seeds' runs are taken to be as long.
        """
        notes = []
        for arm in self.config.compare.shared_arms:
            warmup = note_warmup(self.match(arm, seed=self.config.compare.seeds[0])[0].train)
            notes += [self._note_shots(arm, seeds=seeds), f"{ARMS[arm].title}: {warmup}" if warmup else ""]
        return [note for note in notes if note]

    def _note_shots(self, arm: ArmName, *, seeds: Sequence[int]) -> str:
        config, spent = self.match(arm, seed=seeds[0])
        wanted = self.config.compare.fixed_shots.get(arm, 0)
        # No further seed lowers a task's most shots, and to match one takes seconds to minutes.
        if all(spent.most_shots.get(name, 0) >= wanted for name in self.tasks):
            return ""
        return tell_fewer_shots(
            arm,
            self.config,
            most={seed: self.match(arm, seed=seed)[1].most_shots for seed in seeds},
            num_train={name: len(tokenized.task.train) for name, tokenized in self.tasks.items()},
            token_budget=config.episodes.token_budget,
        )

    def _match_shared(self, arm: ArmName, *, seed: int) -> tuple[RunConfig, Spent]:
        match = self.config.compare.match
        run = self._unmatched_run(arm, seed=seed)
        if match == "tokens":
            return self._fit_packs(*run, tokens=self._tokens_to_meet(arm, seed=seed))
        if arm != "manyicl" and "manyicl" in self.config.compare.shared_arms:
            return self._fit_steps(*run, wanted=self.match("manyicl", seed=seed)[1].of(match))
        return run

    def _tokens_to_meet(self, arm: ArmName, *, seed: int) -> int:
        if arm != "manyicl" and "manyicl" in self.config.compare.shared_arms:
            return self.match("manyicl", seed=seed)[1].tokens
        return min(self._unmatched_run(name, seed=seed)[1].tokens for name in {arm, *self.config.compare.shared_arms})

    def _unmatched_run(self, arm: ArmName, *, seed: int) -> tuple[RunConfig, Spent]:
        """Return an arm's recipe before it is matched to the others, and what it spends."""
        if (arm, seed) not in self._unmatched:
            changes = episode_changes(arm, self.config)
            # Episodes with a shorter budget of their own share packs of the recipe's length.
            train = {"pack_tokens": self.config.pack_tokens} if "token_budget" in changes else {}
            config = run_config(self.config, seed=seed, tasks=list(self.tasks), episodes=changes, train=train)
            self._unmatched[arm, seed] = self._spend(config)
        return self._unmatched[arm, seed]

    def _match_dedicated(self, arm: ArmName, task: str, *, seed: int) -> tuple[RunConfig, Spent]:
        _, whole = self.match("zero-shot", seed=seed)
        if task not in whole.tokens_by_task:
            raise UserError(
                f"task '{task}': no episode of it in the {whole.steps} steps that {ARMS[arm].title} is matched to;"
                " raise train.num_steps, or leave it out of compare.dedicated_tasks"
            )
        matched = whole.tokens_by_task[task]
        tokens = matched * (TUNED_FACTOR if ARMS[arm].tuned else 1)
        changes = episode_changes(arm, self.config)
        shared, alone = self.config.train, lengths_of(self.tasks[task]).alone
        longest = int(alone[alone <= self.config.episodes.token_budget].max(initial=1))
        a_step = max(longest, matched // shared.num_steps)
        packs_per_step = -(-a_step // self.config.pack_tokens)
        pack_tokens = max(longest, -(-a_step // packs_per_step))  # shorter ones would lose rows
        num_steps = max(1, round(tokens / a_step))
        train: dict[str, Any] = {
            "pack_tokens": pack_tokens,
            "packs_per_step": packs_per_step,
            "packs_per_batch": "auto" if shared.packs_per_batch == "auto" else 1,
            # What long rows need to fit would only slow these short ones, which may be CUDA graphs without it.
            "recompute": "none" if shared.recompute == "none" else "auto",
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
        """Return the recipe with packs of the length that makes it spend `tokens`, as nearly as possible.

        How full packs are changes with their length by leaps, so lengths around the proportional one are tried.
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
        """Return a function that counts the tokens of the recipe's run if its packs have a given length.

        Lengths that leave episodes the same token budget share one series of episodes.
        """
        plans: dict[int, Callable[[], Iterator[Episode]]] = {}
        lengths = [lengths_of(self.tasks[name], split="train") for name in config.tasks.names]

        def count_tokens(pack_tokens: int) -> int:
            settings = _with_packs(config, pack_tokens).episodes
            if settings.token_budget not in plans:
                episodes = iter_episodes(lengths, settings=settings, seed=config.seed, mixing=config.tasks.mixing)
                plans[settings.token_budget] = _replayed(episodes)
            packs = pack_episodes(plans[settings.token_budget](), pack_tokens=pack_tokens, seed=config.seed)
            return sum(pack.num_tokens for pack in islice(packs, config.train.packs_per_step * config.train.num_steps))

        return count_tokens

    def _fit_steps(
        self, config: RunConfig, spent: Spent, *, wanted: int, by: Match | None = None
    ) -> tuple[RunConfig, Spent]:
        """Return the recipe with the number of steps whose budget is nearest to `wanted`."""
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
    """Return the changes in [train] that give a dedicated run its checkpoints, one of which becomes its model.

    There are as many as in a run of the arms that share the recipe, or `TUNED_CHECKPOINTS` if they choose the number of
    steps. If no validation loss is measured, only the last checkpoint is needed, and the run is short.
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
    """Return the recipe with packs of another length, which also limits the token budget of episodes."""
    values = config.model_dump()
    values["episodes"]["token_budget"] = min(config.episodes.token_budget, pack_tokens)
    values["train"]["pack_tokens"] = pack_tokens
    return RunConfig.model_validate(values)


def _replayed(source: Iterator[Episode]) -> Callable[[], Iterator[Episode]]:
    """Return a function that yields the endless series `source` from its start at each call.

    Each episode is taken from `source` once and kept.
    """
    taken: list[Episode] = []

    def replay() -> Iterator[Episode]:
        for number in count():
            if number == len(taken):
                taken.append(next(source))
            yield taken[number]

    return replay
