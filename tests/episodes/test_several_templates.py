"""Several templates per task: an episode of training draws one for all its examples, evaluation takes the first."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest

from manyicl.conversion.importing import import_tasks
from manyicl.episodes.plan import EpisodeSettings, iter_episodes
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenized import join_examples, lengths_of, tokenize_task, with_names, with_wordings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.evaluation.results import Evaluation
from manyicl.inference.model import load_for_inference
from manyicl.planning.forecast import are_exact_prefixes
from manyicl.planning.preview import preview_recipe
from manyicl.tasks.task import inspect_task, load_task, with_template
from manyicl.training.preparation import count_plan, prepare_run
from manyicl.training.recipe import make_config
from tests.cli.test_app import run_manyicl

TEMPLATES = [
    "{premise} Therefore: {hypothesis}",
    'Does "{premise}" mean that {hypothesis}?',
    "{hypothesis} // {premise}",
]
ANIMALS = ("fox", "owl", "cat", "hen", "dog", "cow")
# Rows 0 to 29 are train, 30 to 35 validation, 36 to 41 test.
ROWS = [
    {
        "premise": f"{ANIMALS[i % 6]} {i} runs",
        "hypothesis": f"{ANIMALS[(i + i % 2) % 6]} {i} moves",
        "label": "yes" if i % 2 else "no",
        "split": "train" if i < 30 else "validation" if i < 36 else "test",
    }
    for i in range(42)
]


def write_task(folder, *, name="nli", templates=TEMPLATES, rows=ROWS, **settings):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"columns": {"answer": "label"}, "family": "nli", **settings}
    if templates is not None:
        own["templates"] = templates
    (folder / f"{name}.task.json").write_text(json.dumps(own))
    return path


def test_every_row_has_its_input_in_every_template_and_the_first_is_its_own(tmp_path):
    task = load_task(write_task(tmp_path / "t"))
    alone = load_task(write_task(tmp_path / "one", templates=None, columns={"input": TEMPLATES[0], "answer": "label"}))
    assert task.train[0].input == "fox 0 runs Therefore: fox 0 moves"
    assert task.train[0].wordings == ('Does "fox 0 runs" mean that fox 0 moves?', "fox 0 moves // fox 0 runs")
    assert [e.input for e in task.train] == [e.input for e in alone.train]
    assert [e.id for e in task.test] == [e.id for e in alone.test]
    assert (task.labels, task.templates, alone.templates) == (("no", "yes"), tuple(TEMPLATES), ())
    assert "3 templates: training draws one per episode" in task.notes
    assert task.sha256 != alone.sha256


def test_a_list_of_one_template_is_the_same_task_as_the_template_in_columns(tmp_path):
    listed = load_task(write_task(tmp_path / "a", templates=TEMPLATES[:1]))
    mapped = load_task(write_task(tmp_path / "b", templates=None, columns={"input": TEMPLATES[0], "answer": "label"}))
    assert listed == mapped


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"templates": []}, "templates [] is not a list of texts with columns in braces, as"),
        ({"templates": "{premise}"}, "templates '{premise}' is not a list of texts with columns in braces, as"),
        ({"templates": ["{premise}", "the answer is"]}, "is not a list of texts with columns in braces, as"),
        ({"templates": ["{premise}", "{premise}"]}, "holds one template twice; remove one of them"),
        (
            {"templates": ["{premise} {hypothesis}", "{premise}"]},
            "uses {hypothesis} in only one of templates 1 and 2; use it in all or in none",
        ),
        (
            {"columns": {"input": "premise", "answer": "label"}},
            '"templates" and the input of "columns" both say how an input is written; keep one of them',
        ),
        ({"template": "{premise}"}, "unknown key 'template'; did you mean 'templates'?"),
    ],
)
def test_templates_that_do_not_fit_are_told_in_one_line(tmp_path, settings, told):
    task, faults = inspect_task(write_task(tmp_path / "t", **settings))
    assert task is None
    assert [told in fault.message and "\n" not in fault.message for fault in faults] == [True], faults


def test_a_field_of_a_template_must_not_be_empty(tmp_path):
    task, faults = inspect_task(write_task(tmp_path / "t", rows=[{**ROWS[0], "premise": " "}, *ROWS[1:]]))
    assert task is None
    assert "row 1: column 'premise' of the template of 'input' is empty; fill it in or remove" in faults[0].message


def test_a_task_in_another_of_its_templates(tmp_path):
    task = load_task(write_task(tmp_path / "t"))
    third = with_template(task, 3)
    assert third.test[0].input == "fox 36 moves // fox 36 runs"
    assert [e.answer for e in third.test] == [e.answer for e in task.test]
    assert third.sha256 != task.sha256
    assert with_template(task, 1) is task
    with pytest.raises(UserError, match=r"^template=4: task 'nli' has templates 1 to 3; choose one that it has, or"):
        with_template(task, 4)
    plain = load_task(write_task(tmp_path / "t", name="p", templates=TEMPLATES[:1]))
    with pytest.raises(UserError, match=r"^template=2: task 'p' has one template; choose one that it has, or leave"):
        with_template(plain, 2)


def tokenized_of(path, tokenizer, *, named=False):
    writer = TaskTokenizer(tokenizer, TemplateSettings())
    tokenized = with_wordings(tokenize_task(load_task(path), tokenizer=writer), tokenizer=writer)
    return (with_names(tokenized, tokenizer=writer) if named else tokenized), writer


def plan_of(tokenized, number, **options):
    settings = EpisodeSettings(**{"token_budget": 400, **options})
    return list(islice(iter_episodes([lengths_of(tokenized)], settings=settings, seed=1), number))


def text_of(tokenized, writer, episode):
    built = join_examples(
        tokenized, split="train", indices=episode.examples, names=episode.names, template=episode.template
    )
    assert len(built.ids) == episode.num_tokens
    return writer.decode(built.ids[len(writer.bos_ids) :])


def test_an_episode_draws_one_template_for_all_its_examples(tmp_path, tokenizers):
    tokenized, writer = tokenized_of(write_task(tmp_path / "t"), tokenizers["bpe"])
    episodes = plan_of(tokenized, 300, shots=2)
    for episode in episodes[:20]:
        rows = [tokenized.task.train[i].in_template(episode.template + 1) for i in episode.examples]
        expected = "".join(f"Input: {row.input}\nAnswer:\n{row.answer}\n\n" for row in rows)
        assert text_of(tokenized, writer, episode) == expected
        assert are_exact_prefixes(tokenized, episode, queries=[len(rows) - 1], tokenizer=writer) == [True]
    counts = Counter(episode.template for episode in episodes)
    assert sorted(counts) == [0, 1, 2]
    assert min(counts.values()) > 75


def test_templates_change_neither_the_order_of_examples_nor_what_is_renamed(tmp_path, tokenizers):
    """The template of an episode is drawn from a stream of its own."""
    several, _ = tokenized_of(write_task(tmp_path / "t"), tokenizers["bpe"], named=True)
    one, _ = tokenized_of(write_task(tmp_path / "t", templates=TEMPLATES[:1]), tokenizers["bpe"], named=True)
    a, b = (plan_of(tokenized, 60, shots=3, rename_share=0.5) for tokenized in (several, one))
    assert [e.examples.tolist() for e in a] == [e.examples.tolist() for e in b]
    assert [e.names is None for e in a] == [e.names is None for e in b]
    assert {e.names is None for e in a} == {True, False}
    assert {e.template for e in b} == {0}


def test_renamed_episodes_are_written_in_their_template(tmp_path, tokenizers):
    tokenized, writer = tokenized_of(write_task(tmp_path / "t"), tokenizers["bpe"], named=True)
    episode = next(e for e in plan_of(tokenized, 50, rename_share=1.0) if e.template == 2)
    text = text_of(tokenized, writer, episode)
    assert text.startswith(f"Input: {tokenized.task.train[episode.examples[0]].wordings[1]}\nAnswer:\n")
    assert "Answer:\nyes\n" not in text


def test_every_episode_fits_its_budget_whatever_its_template(tmp_path, tokenizers):
    """An example that is too long in one of the templates is left out: else an episode that draws it would be empty."""
    long = "{premise} and {hypothesis}, " + "as is well known, " * 12 + "{premise}"
    tokenized, _ = tokenized_of(write_task(tmp_path / "t", templates=[TEMPLATES[0], long]), tokenizers["bpe"])
    lengths = lengths_of(tokenized)
    budget = int(sorted(lengths.alone)[20])  # ten examples or so are too long, in the second template alone
    assert int(lengths.lengths.max()) < budget
    episodes = plan_of(tokenized, 60, token_budget=budget)
    assert all(0 < e.num_tokens <= budget and len(e.examples) for e in episodes)
    seen = {int(i) for e in episodes for i in e.examples}
    assert seen == {i for i, alone in enumerate(lengths.alone) if alone <= budget}
    assert len(seen) < len(lengths.alone)


def recipe(tmp_path, **changes):
    write_task(tmp_path / "tasks")
    values = {"tasks": {"folder": str(tmp_path / "tasks")}, "model": {"path": "seed"}, "train": {"num_steps": 8}}
    return make_config({**values, "episodes": {"token_budget": 300}, **changes}, source="test")


def test_a_run_counts_the_episodes_of_each_template_and_validates_in_the_first(tmp_path):
    prepared = prepare_run(recipe(tmp_path))
    counts = count_plan(prepared.packs, pack_tokens=prepared.config.pack_tokens)
    assert list(counts["templates"]["nli"]) == TEMPLATES
    assert sum(counts["templates"]["nli"].values()) == counts["episodes"]
    assert min(counts["templates"]["nli"].values()) > 0
    batches = [prepared.packs.collate([item]) for item in prepared.packs]
    assert counts["tokens"] == sum(batch.num_tokens for batch in batches)
    _, planned = prepared.validation
    assert {episode.template for one in planned for episode in one.episodes} == {0}


def test_check_and_show_say_that_there_are_several(tmp_path, capfd):
    config = recipe(tmp_path)
    drawn = [preview_recipe(config, number=number) for number in range(4)]
    assert {f"template {one.episode.template + 1} of 3" in one.counts for one in drawn} == {True}
    code, out, _ = run_manyicl(capfd, "check", tmp_path / "tasks")
    assert code == 0
    assert "3 templates: training draws one per episode" in " ".join(out.split())


def test_an_import_says_that_other_templates_than_the_first_are_lost(tmp_path):
    write_task(tmp_path / "t")
    (task,) = import_tasks(tmp_path / "t", tmp_path / "out").tasks
    assert "inputs are those of the first of 3 templates; the others are lost" in task.notes
    assert task.task.train[0].input == "fox 0 runs Therefore: fox 0 moves"


@pytest.mark.real_model
def test_a_real_base_is_asked_in_the_first_template_or_the_one_that_is_named(tmp_path, smollm2):
    """Asked in template 2, a task gives to the bit what a task gives whose only template that is."""
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=300)
    task = load_task(write_task(tmp_path / "t"))
    alone = load_task(write_task(tmp_path / "one", templates=TEMPLATES[1:2]))
    asked = {"shots": (2,), "draws": 1, "queries": 3}
    first, second = (
        evaluate(model, [task], template=number, out=tmp_path / f"{number}.json", **asked) for number in (1, 2)
    )
    other = evaluate(model, [alone], **asked)
    assert second.predictions == other.predictions
    assert first.predictions != second.predictions
    assert [one.curves[0].template for one in (first, second, other)] == [1, 2, None]
    assert Evaluation.load(tmp_path / "2.json").curves[0].template == 2
    with pytest.raises(UserError, match=r"2\.json: holds a finished result with other sha256; name another file"):
        evaluate(model, [task], template=1, out=tmp_path / "2.json", **asked)


def test_a_template_that_a_task_lacks_is_refused_before_a_model_is_loaded(tmp_path, capfd):
    write_task(tmp_path / "t")
    code, _, err = run_manyicl(capfd, "eval", "seed", "--tasks", tmp_path / "t", "--template", 4)
    assert (code, err) == (
        2,
        "error: --template 4: task 'nli' has templates 1 to 3; choose one that it has, or leave it out\n",
    )
