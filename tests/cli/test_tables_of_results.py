"""Tables and plots for the terminal: every number that was measured, a dash for every one that was not."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from manyicl.cli.tables.results import (
    audit_table,
    curve_plot,
    difference_plot,
    difference_table,
    evaluation_table,
    show_shots,
)
from manyicl.console import Pace, make_console, progress_bar, reporting
from manyicl.evaluation.difference import Difference, MeanDifference, PointDifference
from manyicl.evaluation.points import DrawPoint, Prediction, ShotCurve, ShotPoint
from manyicl.evaluation.results import Evaluation
from manyicl.inference.answering.settings import AnswerSettings
from manyicl.planning.audit import Quantiles, TaskAudit
from manyicl.tasks.task import Fault
from manyicl.training.metrics import BarCallback
from tests.support.rendering import cells_of, render, render_terminal

NAN = math.nan


def cell(shots: int, score: float | None = None, **changes) -> ShotPoint:
    if score is None:
        return ShotPoint(shots, None, None, None, None, 0, 20, None, **changes)
    values = {"low": score - 0.1, "high": score + 0.1, "nll": 1.0, "num_scored": 100, "num_unfit": 0}
    return ShotPoint(**{"shots": shots, "score": score, "majority_score": 0.25, **values, **changes})


def evaluation(*curves: tuple[ShotPoint, ...], kind="sweep") -> Evaluation:
    made = tuple(
        ShotCurve(f"task{n}", "qa", "exact_match", num_queries=20, num_draws=5, points=cells)
        for n, cells in enumerate(curves)
    )
    return Evaluation("some/model", kind, seed=0, max_tokens=512, curves=made)


def answered(how: AnswerSettings, *choices: list[dict[str, float] | None]) -> Evaluation:
    """Evaluation whose tasks have a prediction for each of `choices`: nats of known answers, None if generated."""
    made = evaluation(*[(cell(4, 0.5),)] * len(choices))
    curves = tuple(
        replace(
            curve,
            predictions=tuple(Prediction(curve.task, 0, 4, "q", "owl", "owl", 1.0, 0.5, choice_nll=n) for n in nats),
        )
        for curve, nats in zip(made.curves, choices, strict=True)
    )
    return replace(made, curves=curves, answering=how)


# Shot curves ------------------------------------------------------------------------------------------------------


def test_a_score_stands_with_its_interval_in_percent():
    text = render(
        evaluation_table(evaluation((cell(0, 0.123, chance_score=1 / 3), cell(4, 0.5, low=0.25, high=0.875))))
    )
    assert "some/model: score in % by number of shots, 95 % interval" in text
    assert cells_of(text, "task") == ["task", "metric", "majority", "chance", "0", "4"]
    assert cells_of(text, "task0") == ["task0", "exact_match", "25.0", "33.3", "12.3 [2, 22]", "50.0 [25, 88]"]


def test_settings_of_answering_that_changed_nothing_are_not_in_the_title_but_told():
    sampled = AnswerSettings(temperature=0.7, samples=5)
    labelled, free = [{"owl": 0.5, "fox": 1.0}], [None]
    text = render(evaluation_table(answered(sampled, labelled)))
    assert "some/model: score in % by number of shots, 95 % interval\n" in text
    told = "without effect: --temperature, --samples (answers are chosen among the known ones, not generated)"
    assert f"task0: {told}\n" in text
    text = render(evaluation_table(answered(sampled, labelled, free)))
    assert "95 % interval, sampled at temperature 0.7, majority of 5\n" in text
    assert f"task0: {told}\n" in text
    assert "task1: without" not in text
    text = render(evaluation_table(answered(AnswerSettings(calibrate="contextual"), free)))
    assert "contextual calibration" not in text
    assert "task0: without effect: --calibrate (answers are generated)\n" in text
    text = render(evaluation_table(answered(sampled, *[labelled] * 6)))
    assert text.count("without effect") == 1
    assert f"task0, task1, task2, and 3 more: {told}\n" in text
    # Of a task some of whose rows have options, each setting may change an answer.
    text = render(evaluation_table(answered(sampled, labelled + free)))
    assert "majority of 5" in text
    assert "without effect" not in text


def test_balanced_shots_of_a_task_without_labels_are_told_to_be_random():
    draw = DrawPoint(0, 0.5, "", 0, 0, top_label_share=0.5, num_missing_labels=0, num_cut=0)
    unlabelled = replace(draw, top_label_share=None, num_missing_labels=None)
    shown = evaluation((cell(4, 0.5, draws=(draw,)),), (cell(0, 0.5), cell(4, 0.5, draws=(unlabelled,))))
    told = "task1: without effect: --choose balanced (there are no labels, so the shots are random ones)\n"
    text = render(evaluation_table(replace(shown, choose="balanced")))
    assert told in text
    assert text.count("without effect") == 1
    assert "without effect" not in render(evaluation_table(shown))


def test_a_dash_where_nothing_was_scored_and_a_star_where_extrapolated():
    untested = tuple(cell(k, why_not="it has no test rows") for k in (0, 4))
    shown = evaluation(untested, (cell(0, 0.5), cell(4, 0.75, extrapolated=True)), (cell(0, 0.0),))
    text = render(evaluation_table(shown))
    assert cells_of(text, "task0")[2:] == ["-", "-", "-", "-"]
    assert cells_of(text, "task1")[4:] == ["50.0 [40, 60]", "75.0* [65, 85]"]
    assert cells_of(text, "task2")[4:] == ["0.0 [-10, 10]", "-"]
    assert "* more shots than this task was trained with" in text
    assert "task0: not asked at 0, 4 shots: it has no test rows" in text
    assert "*" not in render(evaluation_table(evaluation((cell(0, 0.5),))))


@pytest.mark.parametrize("unknown", [None, NAN])
def test_a_lone_value_has_no_interval(unknown):
    text = render(evaluation_table(evaluation((cell(0, 0.5, low=unknown, high=unknown),))))
    assert cells_of(text, "task0")[4:] == ["50.0"]


def test_what_was_left_out_or_cut_is_said_below():
    text = render(
        evaluation_table(evaluation((cell(0, 0.5, num_unfit=3, num_cut=2), cell(1, 0.5, num_unfit=3, num_cut=5))))
    )
    assert "task0: 3 queries do not fit after its most shots and were left out at every k" in text
    assert "task0: 7 generated answers reached the token limit before their end" in text


def draw(number: int, score: float, **changes) -> DrawPoint:
    values = {"num_copies": 0, "num_near_copies": 0, "top_label_share": None, "num_missing_labels": None, "num_cut": 0}
    return DrawPoint(draw=number, score=score, shots_sha256="", **{**values, **changes})


def test_the_worst_draw_at_the_most_shots_stands_in_one_column():
    last = cell(4, 0.5, spread=0.0321, worst_draw=0.456, best_draw=0.6)
    text = render(evaluation_table(evaluation((cell(0, 0.5), last, cell(64)), (cell(0, 0.5),))))
    assert cells_of(text, "task")[-1] == "worst draw"
    assert cells_of(text, "task0")[-1] == "45.6 ±3.2"
    assert cells_of(text, "task1")[-1] == "-"
    assert "worst draw: at the most shots that were scored; ±: standard deviation over draws, in points" in text
    assert "worst draw" not in render(evaluation_table(evaluation((cell(0, 0.5), cell(4, 0.5)))))


def test_copies_and_missing_labels_are_told_below_only_where_there_are_any():
    clean = (draw(0, 0.5, top_label_share=0.25, num_missing_labels=0), draw(1, 0.5))
    assert "task0:" not in render(evaluation_table(evaluation((cell(0, 0.5), cell(4, 0.5, draws=clean)))))
    found = (
        draw(0, 0.5, num_copies=2, num_near_copies=1, top_label_share=0.5, num_missing_labels=2),
        draw(1, 0.5, num_copies=0, num_near_copies=1, top_label_share=0.25, num_missing_labels=0),
    )
    text = render(evaluation_table(evaluation((cell(0, 0.5), cell(4, 0.5, draws=found)))))
    assert "task0: 0 to 2 of 20 queries have their very input among its shots at 4" in text
    assert "task0: 1 of 20 queries have a near-duplicate of their input among its shots at 4" in text
    assert "task0: 0 to 2 labels have no example among its shots at 4; the commonest has 25 to 50 %;" in text
    assert "--choose nearest shows each query examples like it" in text


def difference(**changes) -> Difference:
    cells = (
        PointDifference("t", 4, 5, 20, a=0.5, b=0.541, difference=0.041, low=0.012, high=0.07),
        PointDifference("u", 4, 5, 20, a=0.5, b=0.45, difference=-0.05, low=-0.08, high=-0.02),
        PointDifference("u", 16, 5, 20, a=0.5, b=0.5, difference=0.0, low=-0.1, high=0.1),
    )
    means = (MeanDifference(4, ("t", "u"), -0.005, -0.02, 0.011), MeanDifference(16, ("u",), 0.0, -0.1, 0.1))
    values = {"num_rows": 1200, "unjoined": {"the draw is in A alone": 40}, "cells": cells, "means": means}
    return Difference("model a (a.json)", "model b (b.json)", **{**values, **changes})


def test_a_difference_is_a_table_a_sentence_for_each_mean_and_what_did_not_join():
    text = render(difference_table(difference()))
    assert text.startswith("A: model a (a.json)\nB: model b (b.json)\n")
    assert cells_of(text, "task") == ["task", "4", "16"]
    assert cells_of(text, "t") == ["t", "+4.1 [+1.2, +7.0]", "-"]
    assert cells_of(text, "u") == ["u", "−5.0 [−8.0, −2.0]", "0.0 [−10.0, +10.0]"]
    assert cells_of(text, "mean of tasks") == ["mean of tasks", "−0.5 [−2.0, +1.1]", "0.0 [−10.0, +10.0]"]
    assert "no difference can be told at 4 shots, mean of 2 tasks: A is ahead by 0.5 points [−1.1, 2.0]\n" in text
    assert "no difference can be told at 16 shots, u: both score the same [−10.0, 10.0]\n" in text
    assert "1,200 pairs of answers\n" in text
    assert "of 3 cells, about one in 20 stands out by chance alone" in text
    assert "40 rows did not join: the draw is in A alone\n" in text


def test_a_difference_is_drawn_as_two_curves_over_the_shots_that_all_tasks_have():
    points = [
        PointDifference(task, shots, 5, 20, a=a, b=b, difference=b - a, low=None, high=None)
        for task, shots, a, b in (("t", 0, 0.1, 0.2), ("u", 0, 0.3, 0.4), ("t", 4, 0.2, 0.6), ("u", 4, 0.4, 0.8))
    ]
    only_one = PointDifference("t", 64, 5, 20, a=1.0, b=1.0, difference=0.0, low=None, high=None)
    means = tuple(MeanDifference(k, ("t", "u"), 0.1, None, None) for k in (0, 4))
    means += (MeanDifference(64, ("t",), 0.0, None, None),)
    plot = difference_plot(difference(cells=(*points, only_one), means=means), names=("base", "run"), colour=False)
    assert plot is not None
    lines = [line for line in render(plot).splitlines() if line]
    assert lines[0].strip() == "score in %, mean of 2 tasks, against shots"
    assert lines[-2].split() == ["0", "4"]
    assert lines[-1].rstrip() == "o base   x run"
    assert sum("x" in line for line in lines[1:-1]) == 2
    assert (lines[2][:2], lines[-4][:2]) == ("75", "15"), "the means are 20 to 70 %, and the axis a little more"


def test_one_number_of_shots_is_no_curve():
    assert difference_plot(difference()) is None


def test_a_difference_of_one_task_has_no_mean_and_a_lone_value_no_interval():
    lone = PointDifference("t", 4, 1, 1, a=0.0, b=1.0, difference=1.0, low=None, high=None)
    shown = difference(cells=(lone,), means=(MeanDifference(4, ("t",), 1.0, None, None),), unjoined={})
    text = render(difference_table(shown))
    assert cells_of(text, "t") == ["t", "+100.0"]
    assert "mean of tasks" not in text
    assert "by chance alone" not in text
    assert "100.0 points apart at 4 shots, t; a single answer tells no difference" in text


def test_a_better_b_is_green_and_a_worse_red():
    file = StringIO()
    Console(file=file, width=200, force_terminal=True, color_system="standard").print(difference_table(difference()))
    assert "\x1b[32m+4.1 [+1.2, +7.0]" in file.getvalue()
    assert "\x1b[31m−5.0 [−8.0, −2.0]" in file.getvalue()
    assert not re.search(r"\x1b\[3\dm0.0 \[−10.0", file.getvalue())


def test_a_one_pass_curve_says_what_its_number_is():
    assert "greedy exact match in % by number of shots" in render(
        evaluation_table(evaluation((cell(0, 0.5),), kind="one-pass"))
    )


def test_many_shots_are_shown_at_powers_of_two_and_the_last():
    assert show_shots(evaluation(tuple(cell(k, 0.5) for k in range(22))).curves) == [0, 1, 2, 4, 8, 16, 21]
    assert show_shots(evaluation((cell(3, 0.5),), (cell(0, 0.5), cell(7, 0.5))).curves) == [0, 3, 7]


def test_the_plot_shows_the_shots_and_the_mean_of_the_tasks():
    curves = (cell(0, 0.1), cell(1, 0.5), cell(4, 0.9)), (cell(0, 0.3), cell(1, 0.5), cell(4, 0.9))
    text = curve_plot(evaluation(*curves), colour=False).plain
    assert "score in %, mean of 2 tasks, against shots" in text
    assert "shots (log scale)" in text
    ticks = next(line for line in reversed(text.splitlines()) if re.search(r"\d", line))
    assert ticks.split() == ["0", "1", "4"]
    assert "\x1b" not in text
    assert any(ord(mark) > 127 for mark in text)


def test_the_plot_of_one_task_names_it():
    assert "score in %, task0, against shots" in curve_plot(evaluation((cell(0, 0.1), cell(1, 0.5)))).plain


def test_the_plot_leaves_out_shots_where_a_task_was_not_scored():
    text = curve_plot(evaluation((cell(0, 0.1), cell(64, 0.5)), (cell(0, 0.3), cell(64))), colour=False).plain
    assert "64" not in text
    nothing = curve_plot(evaluation((cell(0), cell(1)), (cell(0, 0.3),)), colour=False).plain
    assert nothing == "no curve: at no number of shots was every task scored"


# Audit --------------------------------------------------------------------------------------------------------------


AUDIT = TaskAudit(
    path=Path("t/sums.jsonl"),
    name="sums",
    family="math",
    num_rows=1234,
    kept={"train": 1000, "validation": 100, "test": 120},
    dropped={"duplicate input": 14},
    split_note="by hand",
    labels={},
    input_tokens=Quantiles(12, 20, 31),
    answer_tokens=Quantiles(3, 4, 5),
    fits={2048: 136, 32768: 2184},
    faults=(),
    blockers=(),
    warnings=(),
)


def test_the_audit_shows_counts_lengths_and_the_verdict():
    labelled = replace(
        AUDIT, name="words", labels={"yes": 0.75, "no": 0.25}, warnings=("lopsided: really", "and short")
    )
    text = render(audit_table([AUDIT, labelled]))
    assert cells_of(text, "task")[-5:] == ["input tokens", "answer tokens", "fit 2,048", "fit 32,768", "verdict"]
    numbers = ["1,234", "1,000", "100", "120", "14", "-", "-", "12 (31)", "3 (5)", "136", "2,184", "good"]
    assert cells_of(text, "sums") == ["sums", "math", *numbers]
    assert "75% yes" in cells_of(text, "words")
    assert cells_of(text, "words")[-1] == "usable, but lopsided: really"
    assert "words: and short" in text
    assert "sums: dropped 14: duplicate input" in text
    assert text.count("split: by hand") == 1
    hashed = replace(AUDIT, name="hashed", split_note="by a hash")
    text = render(audit_table([AUDIT, labelled, hashed]))
    assert text.splitlines()[-2:] == ["split of hashed: by a hash", "split of sums, words: by hand"]


def test_the_audit_tells_of_near_duplicates_between_train_and_test():
    assert "near-duplicate" not in render(audit_table([AUDIT]))
    found = [replace(AUDIT, num_near_copies=1200), replace(AUDIT, name="big", num_near_copies=None)]
    text = render(audit_table(found))
    assert "sums: test inputs with a near-duplicate in train: 1,200" in text
    assert "big: near-duplicates between test and train were not looked for (1,234 rows)" in text


def test_a_task_that_cannot_be_read_has_a_line_too():
    faults = tuple(
        Fault(AUDIT.path, kind, (row,), 1, f"t/sums.jsonl, row {row}: {kind}")
        for row, kind in ((3, "bad"), (4, "worse"))
    )
    unread = TaskAudit(AUDIT.path, "sums", "", 0, {}, {}, "", {}, None, None, {}, faults, (), ())
    for others in ((), (AUDIT,)):
        text = render(audit_table([unread, *(replace(audit, name="good") for audit in others)]))
        assert cells_of(text, "sums")[-1] == "cannot be read: t/sums.jsonl, row 3: bad"
        assert "sums: t/sums.jsonl, row 4: worse" in text


# Consoles and progress --------------------------------------------------------------------------------------------


def test_names_are_never_cut_however_narrow_the_terminal():
    text = render_terminal(audit_table([replace(AUDIT, name="a_rather_long_name_of_a_task")]), width=60)
    assert "a_rather_long_name_of_a_task" in text


def test_without_a_terminal_nothing_is_folded_and_texts_are_as_they_are(capsys):
    console = make_console()
    console.print(f"[bold]{'word ' * 200}:cat:")
    assert capsys.readouterr().out == f"[bold]{'word ' * 200}:cat:\n"


def test_progress_without_a_terminal_is_a_plain_line_at_the_end_and_now_and_then():
    file = StringIO()
    with progress_bar(Console(file=file, width=40), total=3) as bar:
        bar.update("[/b] train", 1)
        bar.update("[/b] train", 2)
        bar.printed -= 20
        bar.started -= 10
        bar.update("[/b] train", 2, note="loss 1.0")
        bar.started -= 10
        bar.update("[/b] train", 3, note="a note that is longer than the console is wide")
    assert file.getvalue() == (
        "[/b] train: 2/3, 10 s each, 10.0 s left, loss 1.0\n"
        "[/b] train: 3/3, 10 s each, a note that is longer than the console is wide\n"
    )


def test_a_line_of_progress_repeats_no_old_note_and_an_earlier_process_took_none_of_its_time():
    file = StringIO()
    with progress_bar(Console(file=file), total=100) as bar:
        bar.update("train", 80)  # a resumed run: 80 steps were done before
        for done in (90, 95):
            bar.printed -= 20
            bar.started -= 60
            bar.update("train", done, note="loss 1.0")
    assert file.getvalue() == "train: 90/100, 6 s each, 1.0 min left, loss 1.0\ntrain: 95/100, 8 s each, 40.0 s left\n"


def test_the_time_left_of_a_comparison_is_by_kinds_of_work():
    pace = Pace()
    assert pace.left(["train"]) is None
    pace.add("train", 100)
    pace.add("test", 10)
    pace.add("test", 20)
    assert pace.left(["train", "test", "test"]) == 130
    assert pace.left(["text"]) == pytest.approx(130 / 3)  # never measured: the mean of all


def test_progress_on_a_terminal_is_a_bar():
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with progress_bar(console, total=2) as bar:
        assert isinstance(bar.progress, Progress)
        bar.update("[/b] train", 1, note="[/i] a note")
        bar.progress.refresh()
    assert "[/b] train" in file.getvalue()
    assert "1/2" in file.getvalue()
    assert "[/i] a note" in file.getvalue()


def test_reported_totals_may_change():
    file = StringIO()
    with reporting(Console(file=file)) as report:
        report("first", 1, 5)
        report("second", 5, 5)
    assert file.getvalue() == "second: 5/5\n"


def test_the_bar_of_a_training_shows_the_last_loss_and_rates():
    file = StringIO()
    with progress_bar(Console(file=file, width=200), total=1) as bar:
        callback = BarCallback(bar, "train")
        state = type("State", (), {"global_step": 1})()
        callback.on_step_end(None, state, None)
        callback.on_log(None, None, None, logs={"loss": 1.25, "tokens_per_s": 12345.6, "answers_per_s": 78.9})
        callback.on_log(None, None, None, logs={"eval_loss": 3.0})
        callback.on_train_end(None, state, None)
    assert file.getvalue() == "train: 1/1, loss 1.250, 12,346 tokens/s, 79 answers/s\n"
