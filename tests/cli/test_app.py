"""The command line as a user meets it: help, mistakes, and every verb on a tiny model and two tiny tasks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM
from typer.main import get_command

from manyicl.cli import app, evaluate
from manyicl.cli.options import in_flags
from manyicl.errors import TerminatedError, UserError
from manyicl.evaluation.loop import one_pass_curve
from manyicl.evaluation.points import PREDICTION_SCHEMA, read_predictions
from manyicl.evaluation.results import Evaluation
from manyicl.evaluation.scoring.answers import score_answer
from manyicl.evaluation.scoring.confidence import measure_confidence
from manyicl.inference.model import load_for_inference
from manyicl.models.loading import MODEL_NOTE, ModelNote
from manyicl.tasks.task import load_tasks
from manyicl.training import run as runs
from manyicl.training import trainer
from tests.conftest import make_task, tiny_model, train_tokenizer
from tests.support.comparison_setting import make_recipe, write_world
from tests.trajectory.setting import write_setting

VERBS = {
    "check": "Audit task files",
    "import": "Make a folder of tasks from other data",
    "show": "Print one episode as training will see it",
    "plan": "What a recipe would train",
    "export": "Write the episodes that a recipe trains on",
    "train": "Fine-tune as a recipe says",
    "eval": "Score against number of shots",
    "curve": "one forward pass over each episode of test rows",
    "diff": "Which of two results is better",
    "ask": "Answer one input per line, after as many examples as fit",
    "serve": "Serve a model over HTTP",
    "token": "Make a token for",
    "merge": "Fold a run's adapter into its base",
    "world": "Write tasks of the embedded world",
    "compare": "Train the arms of the paper from one recipe",
    "report": "Write a comparison's report.html and report.md anew",
    "demo": "The paper's comparison in minutes on two cores",
}
CELL = {"shots", "score", "low", "high", "nll", "num_scored", "num_unfit", "majority_score"}


def run_manyicl(capfd, *arguments: object) -> tuple[int, str, str]:
    """Run a command line in this process; return its exit code, and what it wrote to stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["manyicl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            app.main()
    out, err = capfd.readouterr()
    return int(exited.value.code or 0), out, err


def refusal(capfd, *arguments: object) -> str:
    """Return the one line of a command line that is refused."""
    code, out, err = run_manyicl(capfd, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").removesuffix("\n")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with `model` and `tasks`: animals has labels, sums has open answers. Not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "model")
    train_tokenizer("bpe").save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    animals = make_task("animals")
    rows = {
        "animals": [
            {"input": e.input, "answer": e.answer, "split": split}
            for split in ("train", "validation", "test")
            for e in getattr(animals, split)
        ],
        "sums": [
            {"input": f"{n} + {n % 7}", "answer": str(n + n % 7), "split": "test" if n < 8 else "train"}
            for n in range(60)
        ],
    }
    for name, lines in rows.items():
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"family": "classification", "instruction": "Name the animal.", "labels": list(animals.labels)}
    (folder / "tasks" / "animals.task.json").write_text(json.dumps(about))
    (folder / "tasks" / "sums.task.json").write_text(json.dumps({"family": "math"}))
    return folder


# Help and mistakes ------------------------------------------------------------------------------------------------


def test_help_names_every_verb(capfd):
    code, out, err = run_manyicl(capfd, "--help")
    assert (code, err) == (0, "")
    listed = {line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line.split()[1].isalpha()}
    assert listed >= set(VERBS)
    assert "Start with manyicl demo" in out
    assert set(get_command(app.app).commands) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_says_what_it_does_and_explains_every_option(verb, capfd):
    code, out, err = run_manyicl(capfd, verb, "--help")
    assert (code, err) == (0, "")
    assert VERBS[verb] in " ".join(out.split())
    assert "runs/-" not in out  # <name> would be taken for markup
    for line in out.splitlines():
        if line.startswith("│") and "--" in line.split("│")[1][:30]:
            assert len(line.strip("│ ").split("  ")[-1]) > 5, line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Usage: "),
        (["check", "tasks"], 0, "Supervision audit"),
        (["diff", "no.json", "b.json"], 2, "error: no.json"),
    ],
    ids=["help", "check", "diff"],
)
def test_what_needs_no_model_runs_as_a_module_without_torch_which_takes_seconds_to_import(
    tmp_path, arguments, code, said
):
    write_setting(tmp_path)
    script = (
        f"import sys, runpy; sys.argv = ['manyicl', *{arguments}]\n"
        "try: runpy.run_module('manyicl', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_without_a_verb_the_help_is_shown(capfd):
    code, out, err = run_manyicl(capfd)
    assert code == 2
    assert "[OPTIONS] COMMAND [ARGS]..." in out + err
    assert "error: " not in out + err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("evl",), "No such command 'evl'. Did you mean 'eval'?; see manyicl --help"),
        (("eval",), "Missing argument 'MODEL_OR_RUN'; see manyicl eval --help"),
        (("eval", "m"), "Missing option '--tasks'; see manyicl eval --help"),
        (
            ("eval", "m", "--tasks", "t", "--shot", "3"),
            "No such option: --shot (Possible options: --out, --shots, --stop); see manyicl eval --help",
        ),
        (
            ("eval", "m", "--tasks", "t", "--precision", "fp16"),
            "--precision fp16: 'fp16' is not one of 'auto', 'bf16', 'fp32'; see manyicl eval --help",
        ),
        (
            ("eval", "m", "--tasks", "t", "--draws=0"),
            "--draws 0: input should be greater than or equal to 1; see manyicl eval --help",
        ),
        (
            ("eval", "m", "--tasks", "t", "--queries", "many"),
            "--queries many: input should be a valid integer, unable to parse string as an integer; see manyicl eval"
            " --help",
        ),
        (("eval", "m", "--tasks", "t", "--seed", "-1"), "--seed -1: input should be greater than or equal to 0; see"),
        (("eval", "m", "--tasks", "t", "--max-tokens", "0"), "--max-tokens 0: input should be greater than or equal "),
        (("curve", "m", "--tasks", "t", "--episodes", "0"), "--episodes 0: input should be greater than or equal to 1"),
        (("ask", "m", "--tasks", "t"), "Missing option '--task'; see manyicl ask --help"),
        (("ask", "m", "--tasks", "t", "--task", "a", "--shots", "-1"), "--shots -1: input should be greater than or"),
        (("ask", "m", "--tasks", "t", "--task", "a", "--temperature", "nan"), "--temperature nan: input should be"),
        (
            ("show", "r", "--episode", "-1"),
            "--episode -1: input should be greater than or equal to 0; see",
        ),
        (("merge", "m"), "Missing option '--out'; see manyicl merge --help"),
        (("diff", "a"), "Missing argument 'B.json'; see manyicl diff --help"),
        (("diff", "a", "b", "c"), "Got unexpected extra argument(s) (c); see manyicl diff --help"),
        (("eval", "m", "--tasks"), "Option '--tasks' requires an argument; see manyicl --help"),
    ],
)
def test_a_wrong_option_is_one_line_with_its_value(arguments, expected, capfd):
    assert refusal(capfd, *arguments).startswith(expected)


@pytest.mark.parametrize("verb", ["show", "train"])
def test_a_wrong_recipe_is_one_line(verb, tmp_path, capfd):
    recipe = tmp_path / "r.toml"
    assert (
        refusal(capfd, verb, recipe)
        == f"{recipe}: cannot be read (No such file or directory); give the path of a recipe (*.toml)"
    )
    recipe.write_text('[tasks]\nfolder = "t"\n[model]\npath = "./m"\n[train]\nnum_steps = 1\n')
    assert (
        refusal(capfd, verb, recipe, "train.num_step=3")
        == f"{recipe}: train.num_step: unknown key; did you mean 'num_steps'?"
    )
    assert refusal(capfd, verb, recipe).startswith(f"{tmp_path / 'm'}: no such folder; ")


def test_wrong_uses_of_train_are_one_line(tmp_path, capfd):
    assert refusal(capfd, "train") == "name a recipe (*.toml), or a run to resume: --resume DIR"
    assert (
        refusal(capfd, "train", "--resume", tmp_path)
        == f"{tmp_path}: is not a run (no config.toml); name the folder of a run"
    )
    assert refusal(capfd, "train", "--resume", tmp_path, "--out", tmp_path).startswith(f"--out {tmp_path}: ")


@pytest.mark.slow
def test_wrong_models_tasks_and_inputs_are_one_line(folder, tmp_path, capfd):
    tasks, model = ("--tasks", folder / "tasks"), folder / "model"
    for verb in ("eval", "curve"):
        assert refusal(capfd, verb, model, "--tasks", tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder")
        assert refusal(capfd, verb, tmp_path / "no", *tasks).startswith(f"{tmp_path / 'no'}: no such folder")
        assert refusal(capfd, verb, "no-such", *tasks).startswith("no-such: cannot load its config from the hub")
        assert refusal(capfd, verb, model, *tasks, "--task", "anmals").endswith(
            "no task 'anmals'; did you mean 'animals'?"
        )
        assert refusal(capfd, verb, model, *tasks, "--max-tokens", 513).startswith(
            "--max-tokens = 513: the model knows 512"
        )
        assert refusal(capfd, verb, model, *tasks, "--out", tmp_path).startswith(f"--out {tmp_path}: is a folder; ")
        below = model / "config.json" / "curve.json"
        assert refusal(capfd, verb, model, *tasks, "--out", below).startswith(
            f"--out {below}: cannot be written below "
        )
    ask = ("ask", model, *tasks, "--task", "sums")
    assert refusal(capfd, *ask, tmp_path / "no.txt").startswith(f"{tmp_path / 'no.txt'}: cannot be read ")
    for text, expected in (
        ("", "is empty; give one input per line"),
        ("a\n\nb\n", "in.txt, line 2: is empty; remove it"),
        ("1 + 1\n" + "9 " * 600, "input 2: has no room for its answer in 512 tokens, even without shots; shorten it"),
    ):
        (tmp_path / "in.txt").write_text(text)
        assert expected in refusal(capfd, *ask, tmp_path / "in.txt")
    (tmp_path / "in.txt").write_text("1 + 1\n")
    few = refusal(capfd, *ask, tmp_path / "in.txt", "--shots", 46)
    assert few.startswith("input 1: is the longest, and leaves room for ")
    assert few.endswith(", or lower --shots")
    short = refusal(capfd, *ask, tmp_path / "in.txt", "--max-tokens", 3)
    assert short == (
        "input 1: has no room for its answer in 3 tokens, even without shots; shorten it, or raise --max-tokens"
    )
    assert "has only 46 train rows" in refusal(capfd, *ask, tmp_path / "in.txt", "--shots", 60)
    assert refusal(capfd, "merge", model, "--out", tmp_path / "out").endswith(
        "has no adapter to merge; its model is whole already"
    )
    assert refusal(capfd, "demo", "--out", tmp_path) == f"--out {tmp_path}: is not empty (in.txt); name a new folder"


@pytest.mark.parametrize(("text", "counts"), [("0", (0,)), ("0,1,4", (0, 1, 4)), ("16, 4", (16, 4))])
def test_shot_counts_are_numbers_between_commas(text, counts):
    assert evaluate.parse_shots(text) == counts


def test_a_parameter_that_an_error_of_the_library_names_is_a_flag_here(folder, capfd):
    told = refusal(capfd, "eval", folder / "model", "--tasks", folder / "tasks", "--max-new-tokens", 99999)
    assert told.startswith("--max-new-tokens 99999: an answer must leave room for its input in 512 tokens")
    told = in_flags("`endpoint.model` is not `manyicl`; lower `shots`, or leave `compiled` out")
    assert told == "--endpoint-model is not `manyicl`; lower --shots, or leave --compile out"


@pytest.mark.parametrize("text", ["", "1,", "a", "1;2", "1.5", "-1", "0,-4"])
def test_other_shot_counts_are_refused(text, folder, capfd):
    with pytest.raises(UserError, match="--shots"):
        evaluate.parse_shots(text)
    assert refusal(capfd, "eval", folder / "model", "--tasks", folder / "tasks", f"--shots={text}").startswith(
        "--shots "
    )


# eval, curve, ask -------------------------------------------------------------------------------------------------


def evaluate_tiny(folder: Path, capfd, out: Path, *options: object) -> tuple[dict, str]:
    model, tasks = folder / "model", folder / "tasks"
    sizes = ("--draws", 2, "--queries", 6, "--shots", "0,2,99")
    code, printed, _ = run_manyicl(capfd, "eval", model, "--tasks", tasks, "--out", out, *sizes, *options)
    assert code == 0
    return json.loads(out.read_text()), printed


@pytest.mark.slow
def test_eval_says_by_what_known_answers_were_chosen(folder, tmp_path, capfd):
    result, printed = evaluate_tiny(folder, capfd, tmp_path / "sum.json")
    assert result["answering"]["normalize"] == "none"
    assert "log-probability per" not in printed
    result, printed = evaluate_tiny(folder, capfd, tmp_path / "mean.json", "--normalize", "tokens")
    assert result["answering"]["normalize"] == "tokens"
    assert "known answers chosen by log-probability per token" in printed


@pytest.mark.slow
def test_eval_writes_curves_and_every_prediction(folder, tmp_path, capfd):
    result, printed = evaluate_tiny(folder, capfd, tmp_path / "new" / "curve.json")
    assert (result["schema"], result["model"], result["kind"]) == (2, str(folder / "model"), "sweep")
    assert [task["task"] for task in result["tasks"]] == ["animals", "sums"]
    for task in result["tasks"]:
        keys = {"task", "family", "metric", "sha256", "num_queries", "num_draws", "num_encoded_tokens"}
        keys |= {"left_out", "curve"}
        assert set(task) == keys
        assert (task["num_queries"], task["num_draws"]) == (6, 2)
        assert task["num_encoded_tokens"] > 0
        assert [cell["shots"] for cell in task["curve"]] == [0, 2, 99]
        assert all(set(cell) >= CELL for cell in task["curve"])
        zero, two, none = task["curve"]
        assert (zero["num_scored"], two["num_scored"], none["num_scored"]) == (6, 12, 0)
        assert all(0 <= cell["score"] <= 1 and cell["nll"] > 0 for cell in (zero, two))
        assert all(none[key] is None for key in ("score", "low", "high", "nll", "majority_score"))
    assert [(t["family"], t["metric"]) for t in result["tasks"]] == [
        ("classification", "accuracy"), ("math", "math_exact_match"),
    ]  # fmt: skip
    path = tmp_path / "new" / "curve.predictions.parquet"
    assert result["predictions"] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    table = pa.parquet.read_table(path)
    assert table.schema.equals(PREDICTION_SCHEMA)
    assert table.column_names == [
        "task", "draw", "shots", "query", "prediction", "answer", "score", "nll", "cut", "choice_nll", "fill",
            "other_scores", "confidence",
    ]  # fmt: skip
    assert f"wrote {tmp_path / 'new' / 'curve.json'} and {path}" in printed
    assert "animals" in printed
    assert "sums: not asked at 99 shots: it has only 46 train rows" in printed
    assert "\x1b" not in printed


@pytest.mark.slow
def test_the_predictions_are_what_the_curve_is_made_of(folder, tmp_path, capfd):
    result, _ = evaluate_tiny(folder, capfd, tmp_path / "curve.json")
    predictions = read_predictions(tmp_path / "curve.predictions.parquet")
    tasks = {task.name: task for task in load_tasks(folder / "tasks")}
    for told in result["tasks"]:
        task = tasks[told["task"]]
        answers = {example.id: example.answer for example in task.test}
        for cell in told["curve"]:
            rows = [p for p in predictions if (p.task, p.shots) == (task.name, cell["shots"])]
            assert len(rows) == cell["num_scored"]
            assert all(row.answer == answers[row.query] for row in rows)
            assert all(row.score == score_answer(row.prediction, answer=row.answer, metric=task.metric) for row in rows)
            assert not task.labels or {row.prediction for row in rows} <= set(task.labels)
            if rows:
                assert sum(row.score for row in rows) / len(rows) == pytest.approx(cell["score"])
                assert sum(row.nll for row in rows) / len(rows) == pytest.approx(cell["nll"])
        assert len({row.query for row in predictions if row.task == task.name}) == told["num_queries"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(folder, tmp_path, capfd):
    first, _ = evaluate_tiny(folder, capfd, tmp_path / "a.json", "--seed", 3)
    second, _ = evaluate_tiny(folder, capfd, tmp_path / "b.json", "--seed", 3)
    assert first["tasks"] == second["tasks"]
    assert first["predictions"]["sha256"] == second["predictions"]["sha256"]


def test_one_query_of_one_task_has_a_score_and_no_interval(folder, tmp_path, capfd):
    options = ("--task", "sums", "--queries", 1, "--draws", 1, "--shots", "0,2")
    result, printed = evaluate_tiny(folder, capfd, tmp_path / "curve.json", *options)
    (task,) = result["tasks"]
    assert [(cell["low"], cell["high"]) for cell in task["curve"]] == [(None, None)] * 2
    assert all(cell["score"] is not None for cell in task["curve"])
    assert "nan" not in printed


def test_more_shots_than_were_trained_are_starred(folder, tmp_path, capfd):
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "model").iterdir():
        (model / file.name).symlink_to(file)
    (model / MODEL_NOTE).write_text(ModelNote(trained_shots={"sums": 1}).model_dump_json())
    sizes = ("--draws", 1, "--queries", 3, "--shots", "0,1,2", "--task", "sums", "--out", tmp_path / "c.json")
    code, printed, _ = run_manyicl(capfd, "eval", model, "--tasks", folder / "tasks", *sizes)
    assert code == 0
    assert [cell["extrapolated"] for cell in json.loads((tmp_path / "c.json").read_text())["tasks"][0]["curve"]] == [
        False,
        False,
        True,
    ]
    assert "* more shots than this task was trained with" in printed


@pytest.mark.slow
def test_curve_writes_every_k_of_one_pass(folder, tmp_path, capfd):
    out = tmp_path / "curve.json"
    options = ("--episodes", 2, "--max-tokens", 200, "--precision", "fp32", "--out", out)
    code, printed, _ = run_manyicl(capfd, "curve", folder / "model", "--tasks", folder / "tasks", *options)
    assert code == 0
    result = json.loads(out.read_text())
    assert (result["schema"], result["kind"], result["max_tokens"]) == (2, "one-pass", 200)
    assert "predictions" not in result
    tasks = load_tasks(folder / "tasks")
    asked = load_for_inference(str(folder / "model"), precision="fp32", max_tokens=200)
    expected = one_pass_curve(asked, tasks, episodes=2)
    assert result == {**expected.to_json(), "tasks": result["tasks"]}
    for told, curve in zip(result["tasks"], expected.curves, strict=True):
        assert [cell["shots"] for cell in told["curve"]] == list(range(len(told["curve"])))
        assert all(set(cell) >= CELL for cell in told["curve"])
        assert [cell["nll"] for cell in told["curve"]] == [cell.nll for cell in curve.points]
    assert "greedy exact match in % by number of shots" in printed


@pytest.mark.slow
def test_diff_compares_two_results_on_the_same_rows(folder, tmp_path, capfd):
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    train_tokenizer("bpe").save_pretrained(other)
    sizes = ("--draws", 2, "--queries", 6, "--shots", "0,2")
    for name, model in (("a", folder / "model"), ("b", other)):
        out = ("--out", tmp_path / f"{name}.json")
        assert run_manyicl(capfd, "eval", model, "--tasks", folder / "tasks", *sizes, *out)[0] == 0
    a, b = (read_predictions(tmp_path / f"{name}.predictions.parquet") for name in "ab")
    code, printed, _ = run_manyicl(capfd, "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0
    assert printed.startswith(f"A: {folder / 'model'} ({tmp_path / 'a.json'})\nB: {other} (")
    assert "36 pairs of answers" in printed
    code, printed, _ = run_manyicl(capfd, "diff", tmp_path / "a.json", tmp_path / "b.json", "--json")
    told = json.loads(printed)
    assert (told["num_rows"], told["unjoined"]) == (36, {})
    for cell in told["cells"]:
        pairs = [(p, q) for p, q in zip(a, b, strict=True) if (p.task, p.shots) == (cell["task"], cell["shots"])]
        assert len(pairs) == cell["num_draws"] * cell["num_queries"]
        assert cell["difference"] == pytest.approx(sum(q.score - p.score for p, q in pairs) / len(pairs))
    seeded = ("--seed", 1, "--task", "sums", "--shots", "2", "--out", tmp_path / "s.json")
    assert run_manyicl(capfd, "eval", other, "--tasks", folder / "tasks", *sizes[:4], *seeded)[0] == 0
    line = refusal(capfd, "diff", tmp_path / "a.json", tmp_path / "s.json")
    assert "nothing to compare (" in line
    assert "other shots were drawn (another seed, other task data, or a tokenizer that drops other rows)" in line
    assert refusal(capfd, "diff", tmp_path / "a.json", tmp_path / "no.json").startswith(f"{tmp_path / 'no.json'}: ")


@pytest.mark.slow
def test_an_unfinished_evaluation_of_other_arguments_is_refused(folder, tmp_path, capfd):
    out = tmp_path / "c.json"
    evaluate = ("eval", folder / "model", "--tasks", folder / "tasks", "--task", "sums", "--draws", 1, "--out", out)
    parts = tmp_path / "c.json.parts"
    parts.mkdir()
    (parts / "evaluation.json").write_text('{"sweep": {"seed": 5}}')
    line = refusal(capfd, *evaluate, "--shots", "0")
    assert line.startswith(f"--out {out}: {parts} holds points of an unfinished evaluation that differs: ")
    (parts / "evaluation.json").unlink()
    assert run_manyicl(capfd, *evaluate, "--shots", "0", "--queries", 2)[0] == 0
    assert not parts.exists()


@pytest.mark.slow
def test_a_plain_checkpoint_is_asked_in_the_template_of_a_recipe(folder, tmp_path, capfd):
    recipe = tmp_path / "r.toml"
    sections = f'[tasks]\nfolder = "{folder / "tasks"}"\n[model]\npath = "{folder / "model"}"\n[train]\nnum_steps = 1\n'
    recipe.write_text(sections)
    common = ("--tasks", folder / "tasks", "--task", "animals")
    (tmp_path / "in.txt").write_text("the red fox 7\n")
    verbs = {
        "eval": ("--shots", "2", "--draws", 1, "--queries", 4, "--out"),
        "curve": ("--episodes", 1, "--out"),
        "ask": (tmp_path / "in.txt", "--shots", "2", "--json"),
    }

    def nats(verb: str, *options: object) -> list[float]:
        path = tmp_path / f"{verb}.json"
        out = (path,) if verb != "ask" else ()
        code, printed, _ = run_manyicl(capfd, verb, folder / "model", *common, *verbs[verb], *out, *options)
        assert code == 0
        if verb == "ask":
            return [json.loads(printed)["nll"]]
        return [cell["nll"] for cell in json.loads(path.read_text())["tasks"][0]["curve"]]

    plain = {verb: nats(verb) for verb in verbs}
    assert {verb: nats(verb, "--recipe", recipe) for verb in verbs} == plain  # the recipe leaves the default
    recipe.write_text(sections + '[template]\ninput = "{input} ->\\n"\n')
    for verb in verbs:
        assert nats(verb, "--recipe", recipe)[0] != plain[verb][0]
    recipe.write_text(sections + '[template]\ninput = "no place"\n')
    for verb in verbs:
        assert f"{recipe}: template.input = 'no place'" in refusal(
            capfd, verb, folder / "model", *common, "--recipe", recipe, *([tmp_path / "in.txt"] * (verb == "ask"))
        )


@pytest.mark.slow
def test_a_cache_below_a_file_is_one_line(folder, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "file" / "cache"))
    for verb, more in (("eval", ()), ("curve", ()), ("check", ("--model", folder / "model"))):
        where = (folder / "tasks",) if verb == "check" else (folder / "model", "--tasks", folder / "tasks")
        line = refusal(capfd, verb, *where, *more)
        assert line.startswith(
            f"{tmp_path / 'file' / 'cache'}: tokenised tasks cannot be cached there (Not a directory); "
        )


@pytest.mark.parametrize("source", ["file", "-", "nothing"])
def test_ask_answers_every_line(folder, tmp_path, capfd, monkeypatch, source):
    lines = ["the red fox 7", "the blue owl 1003", "ünïcode"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    file = {"file": [tmp_path / "in.txt"], "-": ["-"], "nothing": []}[source]
    code, out, err = run_manyicl(
        capfd, "ask", folder / "model", "--tasks", folder / "tasks", "--task", "animals", *file
    )
    assert code == 0
    assert re.fullmatch(r"shots: \d+ of 40 train rows\n", err)
    assert len(out.splitlines()) == 3
    assert set(out.splitlines()) <= {"fox", "owl", "cat", "dog"}


@pytest.mark.slow
def test_ask_marks_and_counts_unsure_answers_and_leaves_none_out(folder, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("the red fox 7\nthe blue owl 1003\n")
    ask = ("ask", folder / "model", "--tasks", folder / "tasks", tmp_path / "in.txt", "--task")
    code, out, err = run_manyicl(capfd, *ask, "animals", "--min-confidence", "0.999")
    assert (code, len(out.splitlines())) == (0, 2)
    assert all(re.fullmatch(r"unsure \(0\.\d\d\): (fox|owl|cat|dog)", line) for line in out.splitlines())
    assert err.endswith("\n2 of 2 answers unsure (--min-confidence)\n")
    code, out, _ = run_manyicl(capfd, *ask, "animals", "--min-confidence", "0.2", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["unsure"] for answer in answers] == [answer["confidence"] < 0.2 for answer in answers]
    refused = refusal(capfd, *ask, "sums", "--min-confidence", "0.8")
    assert refused.startswith("--min-confidence 0.8: generated answers have no confidence; leave it out")


@pytest.mark.slow
def test_eval_says_whether_confidences_tell_which_answers_are_right(folder, tmp_path, capfd):
    result, printed = evaluate_tiny(folder, capfd, tmp_path / "r.json")
    by_task = {task["task"]: task["curve"] for task in result["tasks"]}
    confidence = by_task["animals"][1]["confidence"]
    assert confidence["num_answers"] == 12
    assert 0 <= confidence["low"] <= confidence["ece"] <= confidence["high"] <= 1
    assert confidence["coverage"][0] == {"threshold": 0.0, "coverage": 1.0, "score": by_task["animals"][1]["score"]}
    assert by_task["sums"][1]["confidence"] is None  # its answers are generated
    assert "does it know when it is right?" in printed
    assert "score in % against confidence in %" in printed
    again = Evaluation.load(tmp_path / "r.json")
    asked = [p for p in again.predictions if (p.task, p.asked) == ("animals", 2)]
    assert again.curves[0].points[1].confidence == measure_confidence(asked)


@pytest.mark.slow
def test_ask_names_options_without_effect(folder, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("7 + 2\n")
    ask = ("ask", folder / "model", "--tasks", folder / "tasks", tmp_path / "in.txt", "--task")
    _, _, err = run_manyicl(capfd, *ask, "sums", "--shots", 2, "--choose", "balanced", "--normalize", "tokens")
    assert err.splitlines()[1:3] == [
        "note: without effect: --choose balanced (there are no labels, so the shots are random ones)",
        "note: without effect: --normalize (answers are generated)",
    ]
    _, _, err = run_manyicl(capfd, *ask, "animals", "--shots", 2, "--choose", "balanced", "--stop", "x")
    assert err.splitlines()[1:2] == [
        "note: without effect: --stop (answers are chosen among the known ones, not generated)"
    ]
    refused = refusal(capfd, *ask, "sums", "--stop", "")
    assert refused == "--stop '': an empty text ends every answer at once; give the text that ends one"


def test_ask_shows_all_rows_of_a_file_that_names_no_splits(folder, tmp_path, capfd):
    """A third of a small file was set aside for tests that `ask` does not make."""
    (tmp_path / "tasks").mkdir()
    rows = "".join(f"the red fox {n},fox\nthe blue owl {n},owl\n" for n in range(6))
    (tmp_path / "tasks" / "beasts.csv").write_text("input,answer\n" + rows)
    (tmp_path / "in.txt").write_text("the red fox 7\n")
    ask = ("ask", folder / "model", "--tasks", tmp_path / "tasks", "--task", "beasts", tmp_path / "in.txt")
    code, _, err = run_manyicl(capfd, *ask)
    assert (code, err) == (0, "shots: 12 of 12 train rows\n")


def test_ask_says_how_many_shots_it_shows_before_the_model_answers(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("manyicl.inference.answer_questions", stop)
    (tmp_path / "in.txt").write_text("a fox\n")
    ask = ("ask", folder / "model", "--tasks", folder / "tasks", "--task", "animals", tmp_path / "in.txt")
    code, _, err = run_manyicl(capfd, *ask, "--shots", 5)
    assert (code, err) == (130, "shots: 5 of 40 train rows\nstopped\n")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["animals", "sums"])
@pytest.mark.parametrize("shots", [None, 0, 3])
def test_ask_tells_what_it_did_in_json(folder, tmp_path, capfd, task, shots):
    (tmp_path / "in.txt").write_text("a fox\n1 + 1\n")
    options = () if shots is None else ("--shots", shots)
    ask = (
        "ask",
        folder / "model",
        "--tasks",
        folder / "tasks",
        "--task",
        task,
        tmp_path / "in.txt",
        "--json",
        *options,
    )
    code, out, _ = run_manyicl(capfd, *ask)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer["input"] for answer in answers] == ["a fox", "1 + 1"]
    for answer in answers:
        assert set(answer) == {"input", "answer", "nll", "shots", "cut", "confidence", "unsure", "left_out"}
        assert answer["shots"] == shots if shots is not None else answer["shots"] > 10
        assert answer["nll"] is None or not answer["cut"]
    if task == "animals":
        assert all(answer["nll"] > 0 and not answer["cut"] for answer in answers)


@pytest.mark.slow
def test_shots_are_chosen_as_the_options_say(folder, tmp_path, capfd):
    options = ("--task", "animals", "--choose", "nearest", "--num-nearest", 1)
    result, printed = evaluate_tiny(folder, capfd, tmp_path / "r.json", *options)
    assert (result["choose"], result["num_nearest"]) == ("nearest", 1)
    assert "1 nearest shots of each query's own" in printed
    (tmp_path / "in.txt").write_text("a fox\n")
    command = ("ask", folder / "model", "--tasks", folder / "tasks", "--task", "animals", tmp_path / "in.txt")
    code, out, _ = run_manyicl(capfd, *command, "--shots", 2, "--choose", "nearest", "--json")
    assert (code, json.loads(out)["shots"]) == (0, 2)
    assert refusal(capfd, *command, "--num-nearest", 4).startswith("--num-nearest 4: does nothing with --choose random")


@pytest.mark.slow
def test_generated_answers_end_at_the_limit_that_is_set_and_are_counted(folder, tmp_path, capfd):
    out, options = tmp_path / "r.json", ("--task", "sums", "--max-new-tokens", 3)
    result, printed = evaluate_tiny(folder, capfd, out, *options)
    (task,) = result["tasks"]
    assert result["answering"]["max_new_tokens"] == 3
    assert sum(cell["num_cut"] for cell in task["curve"]) == 6 + 12  # of an untrained model, which ends no answer
    assert "18 generated answers reached the token limit before their end; --max-new-tokens raises it" in printed
    model, tasks = folder / "model", ("--tasks", folder / "tasks")
    again = ("eval", model, *tasks, "--draws", 2, "--queries", 6, "--shots", "0,2,99", "--task", "sums", "--out", out)
    assert refusal(capfd, *again).startswith(f"--out {out}: holds a finished result with other max_new_tokens;")
    (tmp_path / "in.txt").write_text("1 + 1\n2 + 2\n")
    code, _, err = run_manyicl(capfd, "ask", model, *tasks, *options, tmp_path / "in.txt")
    assert (code, "\n2 of 2 answers cut at the token limit (--max-new-tokens raises it)" in err) == (0, True)
    assert "must leave room for its input in 512 tokens" in refusal(capfd, *again[:4], "--max-new-tokens", 512)


def test_ask_takes_a_line_for_what_ends_with_a_line_break_alone(folder, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("a\u2028fox\x0c1\na fox 2", encoding="utf-8")
    ask = ("ask", folder / "model", "--tasks", folder / "tasks", "--task", "animals", tmp_path / "in.txt", "--json")
    _, out, _ = run_manyicl(capfd, *ask)
    assert [json.loads(line)["input"] for line in out.split("\n") if line] == ["a\u2028fox\x0c1", "a fox 2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c.json", "c.predictions.parquet"),
        ("c.v1.json", "c.v1.predictions.parquet"),
        ("c.v2", "c.v2.predictions.parquet"),
    ],
)
def test_the_predictions_lie_beside_their_curve_alone(folder, tmp_path, capfd, name, expected):
    result, _ = evaluate_tiny(folder, capfd, tmp_path / name, "--task", "animals", "--shots", "0", "--queries", "1")
    assert result["predictions"]["file"] == expected
    assert {path.name for path in tmp_path.iterdir()} == {name, expected}


# train, merge -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_is_told_in_a_table_or_json_and_exits_1_where_training_would_be_in_vain(tmp_path, capfd):
    write_setting(tmp_path)
    recipe = tmp_path / "recipe.toml"
    code, out, err = run_manyicl(capfd, "plan", recipe, "--device", "h100")
    assert (code, err) == (0, "")
    assert "Trained answers by the shots before them" in out
    assert "nothing stands in its way" in out
    code, out, _ = run_manyicl(capfd, "plan", recipe, "--json")
    assert (code, json.loads(out)["device"]) == (0, None)
    code, out, err = run_manyicl(capfd, "plan", recipe, "episodes.token_budget=600", "--json")
    assert (code, err) == (1, "")
    assert "knows 512 positions" in json.loads(out)["blockers"][0]
    assert refusal(capfd, "plan", recipe, "--device", "tpu").startswith("--device tpu: is not known")


@pytest.mark.slow
def test_export_writes_a_new_folder_and_says_how_to_read_it(tmp_path, capfd):
    write_setting(tmp_path)
    code, out, err = run_manyicl(capfd, "export", tmp_path / "recipe.toml", "--out", tmp_path / "rows")
    assert (code, err) == (0, "")
    assert f"read them: datasets.load_dataset('{tmp_path / 'rows'}')" in out
    assert "exists already" in refusal(capfd, "export", tmp_path / "recipe.toml", "--out", tmp_path / "rows")


@pytest.mark.slow
def test_out_of_memory_is_one_line_that_tells_where_and_how_to_go_on(tmp_path, capfd, monkeypatch):
    write_setting(tmp_path)
    recipe, run = tmp_path / "recipe.toml", tmp_path / "a run"
    plain, is_short = trainer.row_loss, {"training": True, "validation": False}

    def row_loss(model, batch):
        if is_short["training" if torch.is_grad_enabled() else "validation"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, batch)

    def losses(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def last_line(*arguments):
        code, _, err = run_manyicl(capfd, "train", *arguments)
        assert code == 2
        return err.splitlines()[-1]

    monkeypatch.setattr(trainer, "row_loss", row_loss)
    line = last_line(recipe, "--out", run)
    assert line.startswith("error: step 1: the GPU is out of memory, with rows of up to 320 tokens and 0 of 3 layers ")
    assert line.endswith(f"; resume with: manyicl train --resume '{run}' train.recompute=selective")
    is_short.update(training=False, validation=True)
    line = last_line("--resume", run)
    start = "error: step 3: the GPU is out of memory, with a validation row; start a new run with a lower "
    assert line.startswith(f"{start}episodes.token_budget, or ")
    write_setting(tmp_path, pack_tokens=320)  # which holds several episodes
    assert last_line(recipe, "--out", tmp_path / "packed").startswith(f"{start}train.pack_tokens, or ")
    monkeypatch.setattr(runs, "episode_losses", losses)
    line = last_line(recipe, "--out", tmp_path / "other")
    assert line.startswith(
        "error: the GPU is out of memory, measuring held-out losses; free it from other programs, or "
    )


@pytest.mark.slow
def test_a_task_of_one_train_row_is_not_trained_on_behind_shots_trial_43(tmp_path, capfd):
    config = write_setting(tmp_path)
    row = {"input": "the only one", "answer": "a", "split": "train"}
    (Path(config.tasks.folder) / "one.jsonl").write_text(json.dumps(row) + "\n")
    recipe, told = tmp_path / "recipe.toml", "task 'one': has one train row, and no other to stand before it; "
    assert refusal(capfd, "train", recipe, "--out", tmp_path / "run").startswith(told)
    assert not (tmp_path / "run").exists()
    code, printed, _ = run_manyicl(capfd, "plan", recipe)
    assert (code, f"in the way: {told}" in printed) == (1, True)
    assert told not in run_manyicl(capfd, "plan", recipe, "episodes.shots=0")[1]


@pytest.mark.slow
def test_a_recipe_is_trained_gone_on_with_asked_and_merged(tmp_path, capfd):
    config = write_setting(tmp_path, lora=True)
    recipe, out, tasks = tmp_path / "recipe.toml", tmp_path / "run", ("--tasks", config.tasks.folder)
    code, printed, err = run_manyicl(capfd, "train", recipe, "train.num_steps=2", "--out", out)
    assert code == 0
    assert re.search("train: 2/2,.* loss ", err)  # seconds per step stand between them if one takes long
    assert "Held-out loss per answer" in printed
    assert "\nmean of tasks  " in printed
    command = f"manyicl ask {out} --tasks {config.tasks.folder} --task animals"
    assert printed.endswith(f"model: {out / 'model'}\nask it: {command}\n")
    assert (
        refusal(capfd, "train", recipe, "--out", out)
        == f"--out {out}: is not empty; go on with --resume {out}, or name another"
    )
    assert refusal(capfd, "train", recipe, "--resume", out).startswith(
        f"--resume {out}: train.num_steps would be another than in its config.toml; leave it out to go on"
    )
    assert refusal(capfd, "train", "--resume", out, "seed=9", "train.num_steps=5").startswith(
        f"--resume {out}: seed, train.num_steps would be another"
    )
    code, again, _ = run_manyicl(capfd, "train", recipe, "train.num_steps=2", "--resume", out)
    assert (code, again) == (0, printed)
    code, again, err = run_manyicl(capfd, "train", "--resume", out)
    assert (code, again) == (0, printed)
    assert err.endswith(f"{out}: was finished before; nothing was left to train\n")
    for folder in ("model", "checkpoints"):
        shutil.rmtree(out / folder)
    code, again, err = run_manyicl(capfd, "train", "--resume", out)  # everything, as no checkpoint is left
    assert (code, again) == (0, printed)
    assert "was finished before" not in err
    resolved = (out / "config.toml").read_bytes()
    assert run_manyicl(capfd, "train", "--resume", out, "train.packs_per_batch=1")[:2] == (0, printed)
    assert (out / "config.toml").read_bytes() == resolved  # it says how the model was trained
    (tmp_path / "in.txt").write_text("animals the red fox 7\n")
    question = ("--task", "animals", tmp_path / "in.txt", "--precision", "fp32", "--json")
    code, asked, _ = run_manyicl(capfd, "ask", out, *tasks, *question)
    assert code == 0
    merged = tmp_path / "merged"
    assert run_manyicl(capfd, "merge", out, "--out", merged) == (
        0,
        f"wrote {merged}: a plain model in float32, as its base\n",
        "",
    )
    code, told, _ = run_manyicl(capfd, "ask", merged, *tasks, *question)
    first, second = json.loads(asked), json.loads(told)
    close = {key: pytest.approx(first[key], rel=1e-4) for key in ("nll", "confidence")}
    assert second == {**first, **close}


@pytest.mark.slow
def test_the_installed_command_keeps_errors_apart_and_exits_2(tmp_path):
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "manyicl", "eval", tmp_path / "no", "--tasks", tmp_path]
    (tmp_path / "a.csv").write_text("input,answer\nx,y\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    expected = (
        f"error: {tmp_path / 'no'}: no such folder; give a folder in Hugging Face layout, a run, or a name on the hub\n"
    )
    assert done.stderr == expected


@pytest.mark.slow
def test_the_world_is_written_once_and_its_seed_model_is_asked_by_name(tmp_path, capfd):
    folder = tmp_path / "world"
    code, out, _ = run_manyicl(capfd, "world", folder, "--tasks", 2, "--train", 24, "--test", 10)
    assert code == 0
    assert out.startswith(f"wrote 2 tasks to {folder}")
    assert sorted(path.name.partition("_")[0] for path in folder.glob("*.jsonl")) == ["tone", "topic"]
    code, out, _ = run_manyicl(
        capfd, "eval", "seed", "--tasks", folder, "--shots", "0,16", "--draws", 1, "--queries", 5
    )
    assert code == 0
    assert "topic_" in out
    code, _, err = run_manyicl(capfd, "world", folder)
    assert (code, err) == (2, f"error: {folder}: exists already; name a new folder\n")


# Field trials of models, paths and environments --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:BloomForCausalLM does not take its attention from outside")
def test_a_model_without_a_longest_sequence_is_asked_once_it_is_given_trial_59(folder, tmp_path, capfd):
    model = tmp_path / "model"
    train_tokenizer("bpe").save_pretrained(model)
    bloom = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    BloomForCausalLM(bloom).save_pretrained(model)
    asking = ("eval", model, "--tasks", folder / "tasks", "--task", "animals", "--shots", "0,2", "--draws", 1)
    told = "--max-tokens: a bloom model does not say how long a sequence may be; say it"
    assert refusal(capfd, *asking, "--queries", 3) == told
    code, printed, _ = run_manyicl(capfd, *asking, "--queries", 3, "--max-tokens", 300)
    assert (code, "animals" in printed) == (0, True)


@pytest.mark.slow
def test_paths_may_hold_spaces_accents_and_pictures_trial_78(tmp_path, capfd):
    """The command that `train` shows at its end can be pasted."""
    place = tmp_path / "My Büro – données" / "été \N{BICYCLE}"
    place.mkdir(parents=True)
    config = write_setting(place, num_steps=1)
    (place / "tasks").rename(place / "my tasks")
    recipe = (place / "recipe.toml").read_text().replace(f"{config.tasks.folder}", "./my tasks")
    (place / "my recipe.toml").write_text(recipe)
    code, printed, _ = run_manyicl(capfd, "train", place / "my recipe.toml", "--out", place / "run 1")
    assert code == 0
    shown = printed.splitlines()[-1]
    command = shlex.split(shown.removeprefix("ask it: "))
    assert command[:3] == ["manyicl", "ask", str(place / "run 1")]
    (place / "in é.txt").write_text("animals the red fox 7\n")
    code, printed, _ = run_manyicl(capfd, *command[1:], place / "in é.txt", "--json")
    assert (code, json.loads(printed)["input"]) == (0, "animals the red fox 7")
    code, _, _ = run_manyicl(
        *(capfd, "eval", place / "run 1", "--tasks", place / "my tasks", "--shots", 0, "--draws", 1, "--queries", 2),
        *("--out", place / "r é.json"),
    )
    assert (code, (place / "r é.json").is_file()) == (0, True)


@pytest.mark.slow
def test_warnings_as_errors_and_a_plain_terminal_change_nothing_trials_78_82(folder, tmp_path):
    """In a process of its own, because warnings are raised while libraries are imported, too."""
    asking = ["eval", folder / "model", "--tasks", folder / "tasks", "--task", "animals", "--shots", "0"]
    command = [sys.executable, "-W", "error", "-m", "manyicl", *asking, "--draws", "1", "--queries", "2"]
    (tmp_path / "my modules \N{BICYCLE}").mkdir()
    modules = os.pathsep.join([str(tmp_path / "my modules \N{BICYCLE}"), os.environ.get("PYTHONPATH", "")])
    plain = {"PYTHONWARNINGS": "error", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "PYTHONPATH": modules}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **plain})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{folder / 'model'}: score in % by number of shots, 95 % interval"
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_recipe_that_is_run_from_another_folder_says_where_it_looked_trial_89(tmp_path, capfd, monkeypatch):
    """A folder without a dot before it is taken from the folder that the command runs in."""
    config = write_setting(tmp_path / "p")
    (tmp_path / "p" / "plain.toml").write_text(
        (tmp_path / "p" / "recipe.toml").read_text().replace(config.tasks.folder, "tasks")
    )
    monkeypatch.chdir(tmp_path)
    told = refusal(capfd, "train", Path("p", "plain.toml"), "--out", tmp_path / "run")
    assert told == f"{tmp_path / 'tasks'}: no such folder; give a folder of tasks"
    monkeypatch.chdir(tmp_path / "p")
    printed = run_manyicl(capfd, "plan", "plain.toml")[1]
    assert "animals" in printed


@pytest.mark.slow
def test_a_task_that_is_new_to_the_model_is_marked_by_the_most_shots_of_any_other_trial_90(folder, tmp_path, capfd):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / MODEL_NOTE).write_text(ModelNote(trained_shots={"sums": 1, "others": 2}).model_dump_json())
    sizes = ("--draws", 1, "--queries", 3, "--shots", "0,1,2,4", "--task", "animals", "--out", tmp_path / "c.json")
    code, printed, _ = run_manyicl(capfd, "eval", model, "--tasks", folder / "tasks", *sizes)
    (task,) = json.loads((tmp_path / "c.json").read_text())["tasks"]
    assert [(point["shots"], point["extrapolated"]) for point in task["curve"]] == [
        (0, False),
        (1, False),
        (2, False),
        (4, True),
    ]
    assert (code, "* more shots than this task was trained with" in printed) == (0, True)


# Stopped by the user ----------------------------------------------------------------------------------------------


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_evaluation_says_how_to_go_on(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("manyicl.evaluation.evaluate", stop)
    command = ["eval", str(folder / "model"), "--tasks", str(folder / "tasks"), "--shots", "0"]
    code, _, err = run_manyicl(capfd, *command)
    assert (code, err) == (130, "stopped, nothing is kept\n")
    command += ["--out", str(tmp_path / "a b.json")]
    code, _, err = run_manyicl(capfd, *command)
    assert (code, err) == (130, f"stopped; resume with: manyicl {shlex.join(command)}\n")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (TerminatedError, 143)])
def test_a_verb_that_cannot_be_resumed_says_that_it_was_stopped(folder, capfd, monkeypatch, error, code):
    def stop_it(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("manyicl.verbs.check", stop_it)
    assert run_manyicl(capfd, "check", folder / "tasks") == (code, "", "stopped\n")
    monkeypatch.setattr("manyicl.evaluation.evaluate", stop_it)
    code_of_eval, _, err = run_manyicl(capfd, "eval", folder / "model", "--tasks", folder / "tasks", "--shots", "0")
    assert (code_of_eval, err) == (code, "stopped, nothing is kept\n")


def test_a_stopped_demo_says_how_to_go_on(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("manyicl.demo.run_demo", stop)
    options = ["--seed", "1", "--seeds", "2", "--quick"]
    code, _, err = run_manyicl(capfd, "demo", "--out", tmp_path, *options)
    assert (code, err) == (130, f"stopped; resume with: manyicl demo --out {tmp_path} {' '.join(options)}\n")
    code, _, err = run_manyicl(capfd, "demo", "--out", tmp_path / "no")
    assert (code, err) == (130, "stopped, nothing is kept\n")


def test_a_stopped_comparison_says_how_to_go_on(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("manyicl.comparison.run_comparison", stop)
    make_recipe(tmp_path, write_world(tmp_path))
    code, _, err = run_manyicl(capfd, "compare", tmp_path / "recipe.toml", "--out", tmp_path / "c", "--seed", "0")
    assert (code, err) == (130, f"stopped; resume with: manyicl compare --resume {tmp_path / 'c'} --seed 0\n")


def test_a_comparison_that_ended_before_its_recipe_was_written_is_called_again_not_resumed(
    tmp_path, capfd, monkeypatch
):
    """The line that said how to resume it was refused: no comparison was there."""
    make_recipe(tmp_path, write_world(tmp_path))
    command = ["compare", tmp_path / "recipe.toml", "--out", tmp_path / "c"]
    with monkeypatch.context() as patch:
        patch.setattr("manyicl.comparison.grid.dump_config", stop)
        assert run_manyicl(capfd, *command)[::2] == (130, "stopped, nothing is kept\n")
    (tmp_path / "c" / ".inputs.json.4711-0a1b2c3d.partial").touch()  # as after a kill
    monkeypatch.setattr("manyicl.comparison.run_comparison", stop)
    code, _, err = run_manyicl(capfd, *command)
    assert (code, err) == (130, f"stopped; resume with: manyicl compare --resume {tmp_path / 'c'}\n")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("held_out=: no task 'x'", "--held-out: no task 'x'"),
        ("shots=-1: shots count from 0", "--shots -1: shots count from 0"),
        ("train.seed=x: is no number", "train.seed=x: is no number"),
        ("template=3: task 'x' has one template", "--template 3: task 'x' has one template"),
        ("a.xlsx: has two sheets; name one as `config`", "a.xlsx: has two sheets; name one as --config"),
        ("columns={'inptu': 'x'}: maps an unknown name", "--column {'inptu': 'x'}: maps an unknown name"),
        ("runs/seed=1/curve.json: no such file", "runs/seed=1/curve.json: no such file"),
        ("seed=1/curve.json: no such file", "seed=1/curve.json: no such file"),
        ("no file seed=1/shots=4/curve.json", "no file seed=1/shots=4/curve.json"),
        ("shots=4,8: too many for seed=1/curve.json", "--shots 4,8: too many for seed=1/curve.json"),
        ("out=runs/seed=1: is not empty", "--out runs/seed=1: is not empty"),
        ("endpoint=http://a:80: cannot be reached", "--endpoint http://a:80: cannot be reached"),
    ],
)
def test_a_parameter_that_the_library_names_is_shown_as_the_option(message, shown):
    assert in_flags(message) == shown
