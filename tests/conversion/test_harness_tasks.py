"""Task files of lm-evaluation-harness: rows with their templates filled in, and functions refused by name."""

from __future__ import annotations

import json

import pytest

from manyicl.conversion import import_tasks
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.inference.model import load_for_inference
from manyicl.tasks import load_tasks

ROWS = [
    {"text": "It rains", "label": 1, "topic": "weather", "names": ["wet"]},
    {"text": "It shines", "label": 0, "topic": "sun", "names": ["dry", "warm"]},
]
DATA = """\
task: sky
dataset_path: json
dataset_kwargs:
  data_files:
    train: rows.jsonl
    test: rows_test.jsonl
training_split: train
test_split: test
"""


def write_task(folder, rest):
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (folder / "rows_test.jsonl").write_text(json.dumps({**ROWS[0], "text": "It pours"}))
    (folder / "sky.yaml").write_text(DATA + rest)
    return folder / "sky.yaml"


def written(folder):
    return [json.loads(line) for line in (folder / "sky.jsonl").read_text().splitlines()]


def test_multiple_choice_becomes_rows_with_options(tmp_path):
    path = write_task(
        tmp_path,
        'output_type: multiple_choice\ndescription: "Wet or dry?\\n\\n"\n'
        'doc_to_text: "{{topic|upper}}: {{text}}\\nAnswer:"\ndoc_to_target: label\ndoc_to_choice: ["dry", "wet"]\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\nnum_fewshot: 2\n",
    )
    (imported,) = import_tasks(path, tmp_path / "out").tasks
    assert written(tmp_path / "out") == [
        {"input": "WEATHER: It rains\nAnswer:", "answer": "wet", "options": ["dry", "wet"], "split": "train"},
        {"input": "SUN: It shines\nAnswer:", "answer": "dry", "options": ["dry", "wet"], "split": "train"},
        {"input": "WEATHER: It pours\nAnswer:", "answer": "wet", "options": ["dry", "wet"], "split": "test"},
    ]
    assert (imported.task.metric, imported.task.instruction) == ("accuracy", "Wet or dry?")
    assert imported.notes == ("of sky.yaml not converted: num_fewshot, metric acc_norm",)


@pytest.mark.parametrize(
    ("rest", "first"),
    [
        ("doc_to_text: text\ndoc_to_target: topic\n", {"input": "It rains", "answer": "weather"}),
        ("doc_to_text: text\ndoc_to_target: names\n", {"input": "It rains", "answer": "wet"}),
        (
            "doc_to_text: \"{{text|regex_replace('It ', '')}}\"\ndoc_to_target: \"{{label + 1}}\"\n",
            {"input": "rains", "answer": "2"},
        ),
        (
            'doc_to_text: text\ndoc_to_target: "{{topic}}"\ndoc_to_choice: "{{[topic, names[0]]}}"\n',
            {"input": "It rains", "answer": "weather", "options": ["weather", "wet"]},
        ),
        (
            "doc_to_text: text\ndoc_to_target: label\ndoc_to_choice: {a: dry, b: wet}\n",
            {"input": "It rains", "answer": "wet", "options": ["dry", "wet"]},
        ),
    ],
)
def test_a_template_is_a_column_or_a_text(rest, first, tmp_path):
    import_tasks(write_task(tmp_path, rest), tmp_path / "out")
    assert written(tmp_path / "out")[0] == first | {"split": "train"}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            "doc_to_text: !function utils.ask\ndoc_to_target: label\n",
            "doc_to_text is the Python function utils.ask",
        ),
        (
            "process_docs: !function utils.tidy\n",
            "process_docs is the Python function utils.tidy",
        ),
        (
            "metric_list:\n  - metric: !function utils.score\n",
            "metric_list is the Python function utils.score, which cannot be converted",
        ),
        ("doc_to_text: text\n", "has no doc_to_target"),
        (
            "doc_to_text: text\ndoc_to_target: '{{nothing}}'\n",
            "doc_to_target cannot be filled in for rows.jsonl, row 1",
        ),
        (
            "doc_to_text: '{% for %}'\ndoc_to_target: label\n",
            "doc_to_text cannot be filled in for rows.jsonl",
        ),
        ("doc_to_text: '{{text.__class__.__mro__}}'\ndoc_to_target: label\n", "doc_to_text cannot be filled in"),
        (
            "doc_to_text: text\ndoc_to_target: label\ndoc_to_choice: topic\n",
            "doc_to_choice is 'weather' in rows.jsonl",
        ),
        ("validation_split: dev\ndoc_to_text: text\ndoc_to_target: label\n", "have no split 'dev'"),
        (
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n",
            "measures how likely whole texts are .output_type loglikelihood_rolling., and has no answers to",
        ),
        ("task: [a, b]\n", "is a group of tasks; import its tasks one by one"),
        ("doc_to_text: [\n", "is not valid YAML"),
        ("made: 2024-02-30\n", "is not valid YAML .day is out of range for month.; correct it"),
        ("include: sky.yaml\n", "includes itself"),
        (
            "dataset_kwargs: [1]\ndoc_to_text: text\ndoc_to_target: label\n",
            "dataset_kwargs is .1.; write keys and values",
        ),
        ("doc_to_text: '{{ 1 / 0 }}'\ndoc_to_target: label\n", "cannot be filled in .* .division by zero"),
        (
            "doc_to_text: '{% for i in range(999999) %}x{% endfor %}'\ndoc_to_target: label\n",
            "cannot be filled in .* .Range too big",
        ),
        (
            'doc_to_text: \'{{ text|regex_replace("[", "") }}\'\ndoc_to_target: label\n',
            "cannot be filled in .* .unterminated character set",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(rest, message, tmp_path):
    path = write_task(tmp_path, rest)
    with pytest.raises(UserError, match=rf"sky\.yaml: .*{message}"):
        import_tasks(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_converted_in_part_is_noted_and_a_row_that_cannot_be_written_is_left_out(tmp_path):
    rest = "description: 'On {{topic}}'\nmetric_list: acc\ndoc_to_text: text\ndoc_to_target: '[{[]: 1}]'\n"
    path = write_task(tmp_path, rest)
    (tmp_path / "rows.jsonl").write_text('{"text": "half \\ud800"}\n{"text": "whole"}\n')
    (imported,) = import_tasks(path, tmp_path / "out").tasks
    assert imported.notes == ("of sky.yaml not converted: description",)
    assert imported.left_out == {"broken Unicode": 1}
    assert written(tmp_path / "out")[0] == {"input": "whole", "answer": "[{[]: 1}]", "split": "train"}


def test_a_key_that_is_not_read_is_named_also_a_misspelt_one(tmp_path):
    rest = "doc_to_text: text\ndoc_to_target: topic\ndoc_to_chioce: [a, b]\nnum_fewshot: 5\nmetadata: {version: 1}\n"
    (imported,) = import_tasks(write_task(tmp_path, rest), tmp_path / "out").tasks
    assert imported.notes == ("of sky.yaml not converted: doc_to_chioce, num_fewshot",)


def test_what_a_task_file_includes_is_read_first(tmp_path):
    path = write_task(tmp_path, "include: base.yaml\ndoc_to_target: topic\n")
    (tmp_path / "base.yaml").write_text("doc_to_text: text\ndoc_to_target: label\n")
    import_tasks(path, tmp_path / "out")
    assert written(tmp_path / "out")[1] == {"input": "It shines", "answer": "sun", "split": "train"}


@pytest.mark.real_model
@pytest.mark.slow
def test_a_real_base_is_asked_the_converted_rows(tmp_path, smollm2):
    words = {"sun": ("It shines", "Bright and hot"), "rain": ("It pours", "Wet streets")}
    rows = [{"text": text, "label": n} for n, texts in enumerate(words.values()) for text in texts]
    rest = "doc_to_text: 'Sky: {{text}}'\ndoc_to_target: label\ndoc_to_choice: [sun, rain]\n"
    path = write_task(tmp_path, rest)
    for split in ("rows", "rows_test"):
        text = "".join(json.dumps({**row, "text": f"{row['text']} ({split})"}) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    import_tasks(path, tmp_path / "out", family="classification")
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=256)
    [curve] = evaluate(model, load_tasks(tmp_path / "out"), shots=[2], draws=1, queries=4).curves
    assert curve.num_queries == 4
    assert all(set(one.choice_nll) == {"sun", "rain"} for one in curve.predictions)
    assert curve.points[0].chance_score == 0.5
