"""Looking at an episode before training: what is coloured is what is trained, and what is shown is what is fed."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from manyicl.episodes.plan import EpisodeSettings
from manyicl.episodes.template import TemplateSettings
from manyicl.errors import UserError
from manyicl.planning.preview import DrawnEpisode, preview_recipe, render_episode
from manyicl.tasks.task import Example, Task
from manyicl.training.preparation import prepare_run
from manyicl.training.recipe import RunConfig, make_config
from tests.cli.test_app import run_manyicl
from tests.conftest import make_task, train_tokenizer
from tests.support.drawn import draw_episode
from tests.trajectory.setting import write_setting

KINDS = ("bpe", "unigram", "sentencepiece")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return write_setting(tmp_path_factory.mktemp("setting"))


def shown(drawn: DrawnEpisode, *, width: int = 80, colour: bool = False) -> str:
    file = StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(render_episode(drawn), soft_wrap=True)
    return file.getvalue()


def answers_of(drawn: DrawnEpisode, task: Task) -> list[str]:
    return [task.train[i].answer for i in drawn.episode.examples]


def test_what_a_terminal_would_obey_is_shown_as_a_picture(config):
    """A data file could clear the screen of who looked at it, or rename its window."""
    pieces = (("a\x1b[2Jb\n", False), ("c\x07\x9b", True))
    drawn = replace(preview_recipe(config, number=0), pieces=pieces)
    assert shown(drawn) == "a␛[2Jb\nc␇\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_pieces_are_the_answers_with_their_terminators(kind, number, tokenizers):
    task = make_task("animals")
    drawn = draw_episode(task, tokenizers[kind], settings=EpisodeSettings(token_budget=300), number=number)
    assert len(drawn.episode.examples) > 3
    assert [text for text, trained in drawn.pieces if trained] == [f"{a}\n\n" for a in answers_of(drawn, task)]
    assert [trained for _, trained in drawn.pieces] == [False, True] * len(drawn.tokens.spans)
    assert drawn.num_targets == sum(stop - start for start, stop in drawn.tokens.spans)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_last_target_only_the_last_answer_is_trained(kind, tokenizers):
    task, settings = make_task("animals"), EpisodeSettings(token_budget=300, targets="last")
    drawn = draw_episode(task, tokenizers[kind], settings=settings)
    everything = draw_episode(task, tokenizers[kind], settings=EpisodeSettings(token_budget=300))
    assert [trained for _, trained in drawn.pieces] == [False, True]
    assert drawn.pieces[-1][0] == f"{answers_of(drawn, task)[-1]}\n\n"
    assert drawn.tokens.ids.tolist() == everything.tokens.ids.tolist()
    start, stop = drawn.tokens.spans[-1]
    assert drawn.num_targets == stop - start


def test_the_pieces_are_the_whole_text():
    task, settings = make_task("animals"), TemplateSettings(input="Q: {input} =", terminator=" ;\n", labels=True)
    drawn = draw_episode(task, train_tokenizer("bpe"), template=settings, settings=EpisodeSettings(token_budget=200))
    shots = [task.train[i] for i in drawn.episode.examples]
    expected = "".join(f"Q: {e.input} ={e.answer} ;\n" for e in shots)
    opening = "<s>Name the animal.\nAnswers: cat, dog, fox, owl\n\n"
    assert "".join(text for text, _ in drawn.pieces) == opening + expected


def test_the_counts_count(config):
    task = make_task("animals")
    drawn = draw_episode(task, train_tokenizer("bpe"), settings=EpisodeSettings(token_budget=300, shots=4), number=1)
    num_tokens = len(drawn.tokens.ids)
    assert drawn.counts == (
        f"episode 1, task animals, epoch 0: 5 examples, {num_tokens} tokens; trained: 5 answers,"
        f" {drawn.num_targets} tokens ({drawn.num_targets / num_tokens:.1%})"
    )
    assert num_tokens == drawn.episode.num_tokens


@pytest.mark.parametrize("targets", ["all", "last"])
def test_the_episodes_shown_are_the_episodes_trained(config, targets):
    values = config.model_dump() | {"episodes": {"token_budget": 160, "targets": targets}}
    config = make_config(values, source="test")
    prepared = prepare_run(config)
    packs = {episode.index: (pack, episode) for pack in prepared.packs.packs for episode in pack.episodes}
    for number in sorted(packs)[::20]:
        pack, planned = packs[number]
        drawn, batch = preview_recipe(config, number=number), prepared.packs.maker.make_batch([pack])
        assert (drawn.episode.task, drawn.episode.index) == (planned.task, number)
        assert drawn.episode.examples.tolist() == planned.examples.tolist()
        segment_ids_T, segment = batch.segment_ids_T, batch.episodes.index(number)
        assert batch.input_ids_1T[0, segment_ids_T == segment].tolist() == drawn.tokens.ids.tolist()
        assert int((segment_ids_T[batch.target_positions_N] == segment).sum()) == drawn.num_targets


def test_a_budget_that_no_example_fits_is_refused():
    with pytest.raises(UserError, match=r"no train example fits .* = 8 "):
        draw_episode(make_task("animals"), train_tokenizer("bpe"), settings=EpisodeSettings(token_budget=8))


def strange_task() -> Task:
    task = make_task("animals")
    texts = ["two\nlines and [bold]no markup[/bold] :cat:", "  spaces  ", "x" * 300]
    return Task(**{**vars(task), "train": tuple(Example(text, f" {text[:9]} ") for text in texts), "labels": ()})


@pytest.mark.parametrize("width", [20, 80])
def test_what_is_shown_is_the_text_itself_but_for_the_marks_of_line_ends(width):
    drawn = draw_episode(strange_task(), train_tokenizer("bpe"), settings=EpisodeSettings(token_budget=2000))
    assert len(drawn.tokens.spans) == 3
    text = "".join(text for text, _ in drawn.pieces)
    assert shown(drawn, width=width).replace("⏎", "") == text + "\n"
    assert shown(drawn, width=width).count("⏎") == sum(text.count("\n") for text, trained in drawn.pieces if trained)


def test_trained_text_is_green_and_nothing_else_is():
    drawn = draw_episode(make_task("animals"), train_tokenizer("bpe"), settings=EpisodeSettings(token_budget=100))
    parts = shown(drawn, colour=True).split("\x1b[")
    coloured = "".join(part.split("m", 1)[1] for part in parts if part.startswith("30;42m"))
    plain = "".join(part.split("m", 1)[1] for part in parts[1:] if part.startswith("0m"))
    assert coloured.replace("⏎", "\n") == "".join(text for text, trained in drawn.pieces if trained)
    assert "⏎" not in plain


def test_show_prints_an_episode_without_colour_where_there_is_no_terminal(config, capfd):
    recipe = Path(config.tasks.folder).parent / "recipe.toml"
    code, out, err = run_manyicl(capfd, "show", recipe, "--episode", 2, "episodes.targets=last")
    values = config.model_dump() | {"episodes": {**config.episodes.model_dump(), "targets": "last"}}
    drawn = preview_recipe(make_config(values, source="test"), number=2)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert out == f"{render_episode(drawn).plain}\n\n{drawn.counts}\n"
    assert "episode 2, task" in drawn.counts
