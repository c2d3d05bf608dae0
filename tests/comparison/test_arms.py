"""What each arm is trained on, and that matched arms spend alike: counted from the packs of their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyicl.comparison.arms import (
    ArmMatcher,
    Spent,
    count_spent,
    episode_changes,
    run_config,
    tell_fewer_shots,
)
from manyicl.comparison.grid import Grid
from manyicl.comparison.settings import ARMS, CompareConfig, choose_roles, choose_tasks
from manyicl.errors import UserError
from manyicl.models.costs import count_flops
from manyicl.training.preparation import fitting_rows, hash_plan, plan_packs, prepare_run
from manyicl.training.recipe import RunConfig, load_recipe
from tests.support.comparison_setting import make_recipe, write_world

SHARED_ARMS = ("zero-shot", "few-shot", "manyicl")
# Tokens of arms that are matched by them, as a share. A run of 20 steps has 40 packs, which fill by leaps.
TOKENS_APART = 0.02


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("arms")
    return folder, write_world(folder)


@pytest.fixture(scope="module")
def tokenized(world):
    return Grid(world[0], make_recipe(*world)).matcher.tasks


def make_matcher(world, tokenized, *, num_steps: int = 20, packs_per_step: int = 2, **compare: Any) -> ArmMatcher:
    train = {"num_steps": num_steps, "pack_tokens": 768, "packs_per_step": packs_per_step, "packs_per_batch": 1}
    return ArmMatcher(make_recipe(*world, episodes={"token_budget": 384}, train=train, **compare), tokenized)


def shares(spent: dict[str, Spent], match: str) -> list[float]:
    amounts = [one.of(match) for one in spent.values()]
    return [amount / amounts[-1] for amount in amounts]


@pytest.mark.parametrize(
    ("arm", "changes"),
    [
        ("zero-shot", {"shots": 0, "targets": "all"}),
        ("few-shot", {"shots": 3, "targets": "last"}),
        ("metaicl", {"shots": 16, "targets": "last", "token_budget": 1024}),
        ("manyicl", {"targets": "all"}),
        ("dedicated", {"shots": 0, "targets": "all"}),
        ("dedicated-tuned", {"shots": 0, "targets": "all"}),
    ],
)
def test_an_arm_changes_the_layout_of_episodes_and_their_targets(world, arm, changes):
    assert (
        episode_changes(arm, make_recipe(*world, episodes={"token_budget": 2048}, train={"pack_tokens": 2048}))
        == changes
    )


@pytest.mark.slow
def test_metaicls_short_sequences_share_packs_so_that_it_spends_what_the_others_do(world, tokenized):
    """A recipe without pack_tokens gave it packs as short as its sequences, a tenth of the others' tokens."""
    recipe = make_recipe(
        *world, episodes={"token_budget": 2048}, train={"pack_tokens": None}, arms=["metaicl", "manyicl"]
    )
    spent = {arm: ArmMatcher(recipe, tokenized).match(arm, seed=0)[1] for arm in ("metaicl", "manyicl")}
    assert shares(spent, "tokens")[0] == pytest.approx(1, abs=TOKENS_APART)


@pytest.mark.slow
def test_arms_share_all_of_the_recipe_but_the_layout_and_the_length_of_packs(world, tokenized):
    matcher = make_matcher(world, tokenized)
    for arm in SHARED_ARMS:
        config, _ = matcher.match(arm, seed=1)
        shared = matcher.config
        assert type(config) is RunConfig
        assert (config.seed, config.tasks.names, config.model) == (1, shared.tasks.names, shared.model)
        assert config.held_out.episodes == 0
        mine, theirs = config.train.model_dump(), shared.train.model_dump()
        assert {key for key in mine if mine[key] != theirs[key]} <= {"pack_tokens"}
        assert config.template == shared.template


@pytest.mark.slow
def test_the_episodes_of_each_arm_are_laid_out_as_it_says(world, tokenized):
    matcher = make_matcher(world, tokenized)
    lengths, answers = {}, {}
    for arm in SHARED_ARMS:
        config, spent = matcher.match(arm, seed=0)
        packs = plan_packs(config, tokenized).packs
        lengths[arm] = [len(episode.examples) for pack in packs for episode in pack.episodes]
        answers[arm] = spent.answers
    assert set(lengths["zero-shot"]) == {1}
    assert max(lengths["few-shot"]) == 4
    assert min(lengths["manyicl"]) > 4
    assert answers["few-shot"] == len(lengths["few-shot"])  # the last answer alone
    assert answers["manyicl"] == sum(lengths["manyicl"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matched_by_tokens_arms_process_as_many_in_as_many_steps(world, tokenized, seed):
    matcher = make_matcher(world, tokenized)
    spent = {arm: matcher.match(arm, seed=seed)[1] for arm in SHARED_ARMS}
    assert {one.steps for one in spent.values()} == {20}
    assert shares(spent, "tokens") == pytest.approx([1, 1, 1], rel=TOKENS_APART)
    # What is not matched is far apart: or the test would hold of plans that are all the same.
    assert spent["manyicl"].answers > 2 * spent["few-shot"].answers


@pytest.mark.slow
@pytest.mark.parametrize("match", ["answers", "flops"])
def test_matched_by_answers_or_flops_arms_take_the_steps_that_come_nearest(world, tokenized, match):
    matcher = make_matcher(world, tokenized, match=match)
    spent = {arm: matcher.match(arm, seed=0)[1] for arm in SHARED_ARMS}
    assert spent["manyicl"].steps == 20
    for arm in ("zero-shot", "few-shot"):
        config, one = matcher.match(arm, seed=0)
        assert config.train.num_steps == one.steps
        a_step = one.of(match) / one.steps
        assert abs(one.of(match) - spent["manyicl"].of(match)) <= a_step
    assert spent["few-shot"].steps != 20 or match == "flops"


@pytest.mark.slow
def test_what_a_plan_spends_is_what_its_packs_hold(world, tokenized):
    """Counted again from the rows that a training step reads, not from the plan's own sums."""
    matcher = make_matcher(world, tokenized, num_steps=3)
    for arm in SHARED_ARMS:
        config, spent = matcher.match(arm, seed=0)
        packs = plan_packs(config, tokenized)
        batches = [packs.collate([packs[i]]) for i in range(len(packs))]
        lengths = [batch.segment_lengths for batch in batches]
        targets = [len(batch.target_positions_N) for batch in batches]
        assert spent.packs == len(batches) == 3 * 2
        assert spent.episodes == sum(map(len, lengths))
        assert spent.answers == sum(len(batch.answer_shots_A) for batch in batches)
        assert spent.targets == sum(targets)
        assert spent.tokens == sum(map(sum, lengths)) == sum(spent.tokens_by_task.values())
        flops = [count_flops(matcher.shape, row, num_targets=n) for row, n in zip(lengths, targets, strict=True)]
        assert spent.flops == sum(flops)


@pytest.mark.slow
def test_what_a_plan_spends_on_instructions_and_which_rows_it_supervises_is_counted(world, tokenized):
    """Review A5: the few-shot arm's targets are its last answers, and each zero-shot example has a head of its own."""
    matcher = make_matcher(world, tokenized, num_steps=3)
    for arm in SHARED_ARMS:
        config, spent = matcher.match(arm, seed=0)
        episodes = [episode for pack in plan_packs(config, tokenized).packs for episode in pack.episodes]
        rows = [episode.examples[-1:] if arm == "few-shot" else episode.examples for episode in episodes]
        assert spent.train_rows == sum(len(task.splits["train"]) for task in tokenized.values())
        assert spent.target_rows == len(
            {(episode.task, int(row)) for episode, mine in zip(episodes, rows, strict=True) for row in mine}
        )
        assert spent.answers == sum(map(len, rows))
        assert spent.head_tokens == sum(len(tokenized[episode.task].head_ids) for episode in episodes)
        assert 0 < spent.head_tokens < spent.tokens


def test_episodes_with_fewer_shots_than_the_recipe_says_are_counted(world, tokenized):
    """What a task's rows leave at the end of a pass is a shorter episode; 60 shots do not fit 192 tokens at all."""
    config = make_recipe(*world)
    for shots, all_short in ((2, False), (60, True)):
        run = run_config(config, seed=0, tasks=config.tasks.names, episodes={"shots": shots, "targets": "last"})
        packs = plan_packs(run, tokenized)
        spent = count_spent(packs, run, ArmMatcher(config, tokenized).shape)
        sizes = [len(episode.examples) for pack in packs.packs for episode in pack.episodes]
        assert spent.short_episodes == sum(size < shots + 1 for size in sizes)
        assert (spent.short_episodes == spent.episodes) is all_short


@pytest.mark.slow
def test_dedicated_models_together_spend_what_the_arm_with_all_tasks_does(world, tokenized):
    matcher = make_matcher(world, tokenized, num_steps=40)
    _, shared = matcher.match("zero-shot", seed=0)
    together = 0
    for task, tokens in shared.tokens_by_task.items():
        config, spent = matcher.match("dedicated", task=task, seed=0)
        assert config.tasks.names == (task,)
        assert set(spent.tokens_by_task) == {task}
        assert spent.tokens == pytest.approx(tokens, rel=0.1)
        together += spent.tokens
    assert together == pytest.approx(shared.tokens, rel=0.02)


@pytest.mark.slow
def test_a_dedicated_model_trains_on_every_row_that_the_arm_with_all_tasks_does(world, tokenized):
    """A step of it has more tokens than a pack here: packs of an even part of them lost every third row of a task."""
    train = {"num_steps": 20, "pack_tokens": 24, "packs_per_step": 8, "packs_per_batch": 1}
    matcher = ArmMatcher(make_recipe(*world, episodes={"token_budget": 24}, train=train), tokenized)
    lost, several = {}, []
    for task in matcher.config.tasks.names:
        shared, _ = matcher.match("zero-shot", seed=0)
        own, _ = matcher.match("dedicated", task=task, seed=0)
        rows = [len(fitting_rows(tokenized[task], config)) for config in (shared, own)]
        lost[task] = rows[0] - rows[1]
        several.append(own.train.packs_per_step > 1)
    assert all(several)
    assert lost == dict.fromkeys(matcher.config.tasks.names, 0)


def test_a_task_that_the_matched_arm_never_reaches_has_no_share_for_a_model_of_its_own(world, tokenized):
    """One step of one short pack holds examples of some tasks only."""
    train = {"num_steps": 1, "pack_tokens": 64, "packs_per_step": 1, "packs_per_batch": 1}
    matcher = ArmMatcher(make_recipe(*world, episodes={"token_budget": 64}, train=train), tokenized)
    _, whole = matcher.match("zero-shot", seed=0)
    missing = sorted(set(tokenized) - set(whole.tokens_by_task))
    assert missing
    with pytest.raises(UserError, match=rf"task '{missing[0]}': no episode of it in the .* steps") as refused:
        matcher.match("dedicated", task=missing[0], seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_tuned_dedicated_model_has_eight_times_the_tokens_and_sixteen_checkpoints_to_choose_from(world, tokenized):
    """B7: a real ceiling, which says that it is not matched."""
    matcher = make_matcher(world, tokenized)
    task = matcher.config.tasks.names[0]
    (matched, own), (tuned, more) = (matcher.match(arm, task=task, seed=0) for arm in ("dedicated", "dedicated-tuned"))
    assert more.tokens / own.tokens == pytest.approx(8, rel=0.05)
    assert tuned.train.pack_tokens == matched.train.pack_tokens  # steps of the same size, so eight times as many
    assert tuned.train.num_steps / tuned.train.checkpoint_every_steps == pytest.approx(16, rel=0.2)
    assert (tuned.train.keep, tuned.train.validation_tokens) == ("best", 8192)
    assert [arm.name for arm in ARMS.values() if not arm.matched] == ["dedicated-tuned"]
    assert ARMS["dedicated-tuned"].title == "dedicated FT, tuned (ceiling, not matched)"


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "own"), [("full", "auto"), (1, "auto"), ("none", "none")])
def test_a_dedicated_models_short_rows_are_not_recomputed_because_long_ones_are(world, tokenized, setting, own):
    """Beside 15 others a step of a dedicated model took 1.6 s instead of 0.05: recomputed layers are no CUDA graph."""
    matcher = ArmMatcher(make_recipe(*world, train={"recompute": setting}), tokenized)
    assert matcher.match("dedicated", seed=0, task=world[1][0][0])[0].train.recompute == own
    assert matcher.match("manyicl", seed=0)[0].train.recompute == setting


@pytest.mark.slow
def test_dedicated_arms_choose_their_checkpoint_as_the_shared_arms_do(world, tokenized):
    """B7: with the recipe's defaults the shared arms kept their best checkpoint, and dedicated ones their last."""
    train = {"num_steps": 40, "checkpoint_every_steps": 10, "keep": "best", "validation_tokens": 500}
    matcher = ArmMatcher(make_recipe(*world, train=train), tokenized)
    task = matcher.config.tasks.names[0]
    shared, _ = matcher.match("manyicl", seed=0)
    dedicated, spent = matcher.match("dedicated", task=task, seed=0)
    for config in (shared, dedicated):
        assert (config.train.keep, config.train.validation_tokens) == ("best", 500)
    assert shared.train.num_steps / shared.train.checkpoint_every_steps == 4
    assert spent.steps / dedicated.train.checkpoint_every_steps == pytest.approx(4, abs=1)
    assert prepare_run(dedicated).validation[1]  # the task has episodes that are measured


@pytest.mark.slow
def test_a_run_on_tasks_that_are_already_read_has_the_same_plan(world, tokenized):
    """Each run of the demo used to read and check its 128 task files again, a quarter of a short run's time."""
    matcher = make_matcher(world, tokenized)
    config, _ = matcher.match("few-shot", seed=0)
    alone, _ = matcher.match("dedicated", task=config.tasks.names[0], seed=0)
    for one in (config, alone):
        given = prepare_run(one, tasks=matcher.tasks)
        assert hash_plan(given.packs) == hash_plan(prepare_run(one).packs)
        assert list(given.tasks) == list(one.tasks.names)


def test_trained_tasks_are_those_named_or_all_that_have_no_other_role(world):
    config = make_recipe(*world)
    names = [*config.tasks.names, *config.compare.held_out_tasks, *config.compare.familiar_tasks]
    assert sorted(choose_tasks(config, names)) == sorted(config.tasks.names)
    nothing_named = config.model_copy(update={"tasks": config.tasks.model_copy(update={"names": ()})})
    named = make_recipe(*world, dedicated_tasks=[])
    assert sorted(choose_tasks(named, names)) == sorted(choose_tasks(nothing_named, names))


@pytest.mark.parametrize(
    ("names", "compare", "message"),
    [
        (["a", "b"], {"held_out_tasks": ["b"]}, r"compare\.held_out_tasks: 'b' is in tasks\.names or"),
        (
            ["a"],
            {"held_out_tasks": ["b"], "familiar_tasks": ["b"]},
            r"'b' is in tasks\.names or compare\.familiar_tasks",
        ),
        (["a"], {"dedicated_tasks": ["c"]}, r"compare\.dedicated_tasks: 'c' is not a trained task; name trained ones"),
        ([], {"held_out_tasks": ["a", "b", "c"]}, r"tasks\.names: every task of the folder is held out; leave some"),
    ],
)
def test_a_task_has_one_role(world, names, compare, message):
    none: dict[str, Any] = {"held_out_tasks": [], "familiar_tasks": [], "dedicated_tasks": []}
    config = make_recipe(*world, **none | compare)
    config = config.model_copy(update={"tasks": config.tasks.model_copy(update={"names": tuple(names)})})
    with pytest.raises(UserError, match=message):
        choose_tasks(config, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.seeds=[0, 0]", r"compare\.seeds = .*: .*names something twice"),
        ('compare.arms=["base", "base"]', r"compare\.arms = .*: .*names something twice"),
        ('compare.arms=["zero-shoot"]', r"compare\.arms\[0\] = 'zero-shoot': input should be 'base', 'zero-shot'"),
        ("compare.shots=[0, 4, 4]", r"compare\.shots = .*: .*names something twice"),
        (
            ("compare.learning_rates=[0.1]", "compare.validation_queries=0"),
            r"compare: learning_rates are chosen by validation rows, and validation_queries = 0",
        ),
        (
            "compare.choose_by=prequential",  # B6
            r"compare: choose_by = 'prequential' is gone; learning rates are chosen by validation_queries rows of each"
            r" task: leave it out",
        ),
        (
            "compare.arm_rates.metaicl=[0.1]",
            r"compare: arm_rates: 'metaicl' is not trained here; leave it out, or name it in arms",
        ),
        ("compare.arm_rates.manyicl=[0.1, 0.1]", r"compare: arm_rates: 'manyicl' names a rate twice"),
        ("compare.arm_rates.manyicl=[]", r"compare\.arm_rates = {'manyicl': \[\]}: does not fit; rates of single arms"),
        ("compare.arm_rates.manyicl=[0]", r"compare\.arm_rates = {'manyicl': \[0\]}: does not fit; rates of single"),
        (
            ("compare.arm_rates.manyicl=[0.1, 0.2]", "compare.validation_queries=0"),
            r"compare: learning_rates are chosen by validation rows, and validation_queries = 0",
        ),
        ("compare.learning_rates=[0.1, 0.1]", r"compare\.learning_rates = .*: .*names something twice"),
        (
            "compare.num_nearest=4",
            r"compare: num_nearest = 4: does nothing with choose = 'random'; set choose = 'nearest'",
        ),
        ("compare.seeds=[]", r"compare\.seeds = \[\]: is empty; give it a value, or leave it out"),
        ("compare.seeds=3", r"compare\.seeds = 3: needs a list, such as \[0, 1\]"),
        ("compare.arms=base", r"compare\.arms = 'base': needs a list, such as \[\"a\", \"b\"\]"),
        ("compare.seeds=[-1]", r"compare\.seeds\[0\] = -1: "),
        (  # not that the list is empty besides
            'compare.arms=["bse"]',
            r"compare\.arms\[0\] = 'bse': input should be 'base', 'zero-shot', [^;]*$",
        ),
        ("compare.match=steps", r"compare\.match = 'steps': input should be 'tokens', 'answers' or 'flops'"),
        ("compare.querys=4", r"compare\.querys: unknown key; did you mean 'queries'\?"),
        (
            ('compare.arms=["dedicated-tuned"]', "compare.validation_queries=0"),
            r"compare: dedicated-tuned is tuned on validation rows, and validation_queries = 0",
        ),
        (
            ("compare.choose=nearest", "compare.calibrate=contextual"),
            r"compare: calibrate=contextual: needs the same shots for all queries; choose random or balanced ones",
        ),
        (
            "compare.max_new_tokens=192",
            r"compare\.max_new_tokens = 192: an answer must leave room for its input in 192 tokens; lower it, or raise"
            r" compare\.max_tokens",
        ),
    ],
)
def test_settings_that_say_nothing_sensible_are_refused_in_one_line(world, override, message):
    make_recipe(*world)
    overrides = [override] if isinstance(override, str) else override
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(world[0] / "recipe.toml", overrides=overrides, kind=CompareConfig)
    assert "\n" not in str(refused.value)


def test_a_recipe_of_an_earlier_version_that_names_the_choice_by_validation_still_loads(world):
    make_recipe(*world)
    overrides = ["compare.choose_by=validation"]
    assert load_recipe(world[0] / "recipe.toml", overrides=overrides, kind=CompareConfig) == make_recipe(*world)


def test_arms_of_earlier_versions_are_left_out_of_a_recipe_with_a_warning(world):
    """B7: old comparison folders can still be opened; their recipes name every setting."""
    make_recipe(*world)
    overrides = ['compare.arms=["base", "dedicated-free", "dedicated-many-shot", "manyicl"]', "compare.free_factor=8.0"]
    with pytest.warns(
        UserWarning, match="dedicated-free and dedicated-many-shot of earlier versions are gone and left"
    ):
        config = load_recipe(world[0] / "recipe.toml", overrides=overrides, kind=CompareConfig)
    assert config == make_recipe(*world, arms=["base", "manyicl"])


def test_a_recipe_without_the_section_is_told_which_one_to_add(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[tasks]\nfolder = "tasks"\n[model]\npath = "seed"\n[train]\nnum_steps = 1\n')
    with pytest.raises(UserError, match=r"compare: is missing; add a section \[compare\]") as refused:
        load_recipe(path, kind=CompareConfig)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("most", "told"),
    [
        ({"long": 16, "tiny": 17}, ""),
        ({"long": 7, "tiny": 17}, "7 of its 16 shots in training, on 1 of 2 tasks (long 7), because {tokens}"),
        ({"long": 17, "tiny": 3}, "3 of its 16 shots in training, on 1 of 2 tasks (tiny 3), because {rows}"),
        (
            {"long": 9, "tiny": 3, "lone": 0, "b": 8, "c": 9, "d": 20},
            "9 of its 16 shots in training, on 5 of 6 tasks (lone 0, tiny 3, b 8, and 2 more), because {tokens} or"
            " {rows}",
        ),
    ],
)
def test_fewer_shots_than_an_arms_own_are_told_with_their_reason(world, most, told):
    assert tell_most(world, {0: most, 1: most}) == (told and f"MetaICL's own setting: at most {told.format(**REASONS)}")


@pytest.mark.parametrize(
    ("most", "told"),
    [
        ({0: {"a": 14, "b": 15}, 1: {"a": 15, "b": 16}}, "15 of its 16 shots in training, on 1 of 2 tasks (a 15)"),
        ({0: {"a": 3}, 1: {"a": 2, "b": 4}}, "4 of its 16 shots in training, on 2 of 2 tasks (a 3, b 4)"),
        ({1: {"a": 14}}, "14 of its 16 shots in training with 1 of 2 seeds, on 1 of 1 tasks (a 14)"),
        ({0: {"a": 5}, 2: {"a": 4}}, "5 of its 16 shots in training with 2 of 3 seeds, on 1 of 1 tasks (a 5)"),
        ({0: {"a": 15}, 1: {"a": 16}}, ""),
        ({}, ""),
    ],
)
def test_a_tasks_shots_are_the_most_of_all_seeds_and_those_of_some_are_told_as_such(world, most, told):
    """`plan` told the first seed's and the report those of all, in the same words."""
    reason = f", because {REASONS['tokens']}"
    found = tell_most(world, most, seeds=[0, 1, 2] if 2 in most else [0, 1])
    assert found == (told and f"MetaICL's own setting: at most {told}{reason}")


def test_shots_are_refused_only_if_no_seeds_episodes_hold_them(world, tokenized):
    """Nine were refused, "lower it to 8": the first seed's most, while the second one has an episode of nine."""

    def matcher(shots: int) -> ArmMatcher:
        small = {"train": {"num_steps": 1}, "episodes": {"token_budget": 100}}
        return ArmMatcher(make_recipe(*world, arms=["few-shot"], few_shot_shots=shots, **small), tokenized)

    assert [max(matcher(9).match("few-shot", seed=seed)[1].most_shots.values()) for seed in (0, 1)] == [8, 9]
    matcher(9).refuse_unfit_shots()
    with pytest.raises(UserError, match=r"= 10: few-shot FT: at most 9 of its 10 shots .*; lower it to 9$"):
        matcher(10).refuse_unfit_shots()


REASONS = {"tokens": "its episodes of 1,024 tokens hold no more", "rows": "a task has no more train rows"}


def tell_most(world, most: dict[int, dict[str, int]], **compare: Any) -> str:
    """Tell MetaICL's shots; every task has 100 rows, but "tiny" 4."""
    num_train = {**dict.fromkeys((name for one in most.values() for name in one), 100), "tiny": 4}
    config = make_recipe(*world, arms=["metaicl"], **compare)
    return tell_fewer_shots("metaicl", config, most=most, num_train=num_train, token_budget=1024)


def test_rates_that_no_arm_would_try_need_no_validation_rows(world):
    rates = {"learning_rates": [1e-3], "arm_rates": {"manyicl": [1e-4]}}
    recipe = make_recipe(*world, arms=["base", "manyicl"], validation_queries=0, **rates)
    assert (recipe.rates_of("manyicl"), recipe.fixed_rate("manyicl")) == ((), 1e-4)


def test_tasks_with_a_model_of_their_own_are_asked_also_of_a_comparison_without_one(world):
    named = sorted(world[1][0])[-2:]  # the last ones, which nothing else would choose
    asked = {}
    for arms in (["base", "manyicl", "dedicated"], ["base", "manyicl"]):
        recipe = make_recipe(*world, arms=arms, dedicated_tasks=named, asked_tasks=3)
        roles = choose_roles(recipe, Grid(world[0], recipe).tasks)
        assert set(named) < set(roles.asked_trained)
        asked[len(arms)] = roles.asked_trained
    assert asked[2] == asked[3]


def test_fewer_asked_tasks_than_named_ones_are_some_of_them(world):
    named = sorted(world[1][0])[-2:]
    recipe = make_recipe(*world, arms=["base", "manyicl"], dedicated_tasks=named, asked_tasks=1)
    (asked,) = choose_roles(recipe, Grid(world[0], recipe).tasks).asked_trained
    assert asked in named
