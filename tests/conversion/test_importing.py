"""`manyicl import`: each well-known format becomes the rows that a person would write, none unaccounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyicl.conversion import ImportedTask, import_tasks
from manyicl.errors import UserError
from manyicl.evaluation.loop import evaluate
from manyicl.inference.model import load_for_inference
from manyicl.tasks import load_tasks

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rain",
            "paragraphs": [
                {
                    "context": "Rain is water. It falls.",
                    "qas": [
                        {"id": "1", "question": "What is rain?", "answers": [{"text": "water"}, {"text": "Water"}]},
                        {"id": "2", "question": "What does it do?", "answers": [{"text": "falls"}]},
                        {"id": "3", "question": "Why?", "answers": []},
                    ],
                }
            ],
        }
    ],
}
MMLU = [
    {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
    {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3},
    {"question": "0 + 1?", "choices": ["1", "2", "3", "4"], "answer": 0},
]
ARC = [
    {"id": "a", "question": "What melts?", "choices": {"text": ["ice", "air"], "label": ["A", "B"]}, "answerKey": "A"},
    {"id": "b", "question": "What burns?", "choices": {"text": ["ice", "oil"], "label": ["1", "2"]}, "answerKey": "2"},
]
# As its authors distribute it, with the choices inside the question.
ARC_OWN = [
    {"id": n, "question": {"stem": stem, "choices": [{"text": t, "label": k} for t, k in choices]}, "answerKey": key}
    for n, stem, choices, key in (
        ("a", "What melts?", [("ice", "A"), ("air", "B")], "A"),
        ("b", "What burns?", [("ice", "1"), ("oil", "2")], "2"),
    )
]
ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
]
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    },
    {"messages": [{"role": "user", "content": "Bye"}]},
    {"messages": [{"role": "assistant", "content": "Hi?"}, {"role": "user", "content": "No"}]},
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {
        "conversations": [
            {"from": "human", "value": "Hi!"},
            {"from": "gpt", "value": "Hm"},
            {"from": "human", "value": "?"},
        ]
    },
]
PROMPTED = [
    {
        "inputs": [3, 4],
        "inputs_pretokenized": "Is it good? Great film.",
        "targets": [5],
        "targets_pretokenized": "\nyes",
        "answer_choices": ["no", "yes"],
    },
    {
        "inputs": [3],
        "inputs_pretokenized": "Is it good? Dull film.",
        "targets": [6],
        "targets_pretokenized": "\nno",
        "answer_choices": ["no", "yes"],
    },
]


def written(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def adds_up(imported: ImportedTask) -> bool:
    return imported.num_read == imported.num_written + sum(imported.left_out.values())


@pytest.mark.parametrize(
    ("rows", "expected", "left_out"),
    [
        (
            SQUAD,
            [
                {"input": "Rain is water. It falls.\nWhat is rain?", "answer": ["water", "Water"]},
                {"input": "Rain is water. It falls.\nWhat does it do?", "answer": "falls"},
            ],
            {"empty answer": 1},
        ),
        (
            MMLU,
            [
                {"input": "1 + 1?", "answer": "2", "options": ["1", "2", "3", "4"]},
                {"input": "2 + 2?", "answer": "4", "options": ["1", "2", "3", "4"]},
                {"input": "0 + 1?", "answer": "1", "options": ["1", "2", "3", "4"]},
            ],
            {},
        ),
        (
            ARC,
            [
                {"input": "What melts?", "answer": "ice", "options": ["ice", "air"]},
                {"input": "What burns?", "answer": "oil", "options": ["ice", "oil"]},
            ],
            {},
        ),
        (
            ARC_OWN,
            [
                {"input": "What melts?", "answer": "ice", "options": ["ice", "air"]},
                {"input": "What burns?", "answer": "oil", "options": ["ice", "oil"]},
            ],
            {},
        ),
        (ALPACA, [{"input": "Add.\n1 and 2", "answer": "3"}, {"input": "Say hello.", "answer": "Hello!"}], {}),
        (
            CHAT,
            [{"input": "Hi", "answer": "Hello"}],
            {"chat that does not end with a question and its answer": 1, "no input column": 1},
        ),
        (
            SHAREGPT,
            [{"input": "Hi", "answer": "Hello"}],
            {"chat that does not end with a question and its answer": 1},
        ),
        (
            PROMPTED,
            [
                {"input": "Is it good? Great film.", "answer": "yes", "options": ["no", "yes"]},
                {"input": "Is it good? Dull film.", "answer": "no", "options": ["no", "yes"]},
            ],
            {},
        ),
    ],
    ids=["squad", "mmlu", "arc", "arc of its authors", "alpaca", "chat", "sharegpt", "promptsource"],
)
def test_a_known_format_is_written_as_input_and_answer(rows, expected, left_out, tmp_path):
    source = tmp_path / "desk.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    (imported,) = import_tasks(source, tmp_path / "out").tasks
    assert written(tmp_path / "out", "desk") == expected
    assert imported.left_out == left_out
    assert adds_up(imported)
    (task,) = load_tasks(tmp_path / "out")
    assert task == imported.task
    about = json.loads((tmp_path / "out" / "desk.task.json").read_text())
    assert about["imported_from"]["source"] == "desk.json"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_mmlus_own_files_which_have_no_header_are_read_whole(end, tmp_path):
    (tmp_path / "mmlu").mkdir()
    for split, rows in (("dev", ["1 + 1?,1,2,3,4,B"]), ("test", ['"0, and 1?",1,2,3,4,A', "2 + 2?,1,2,3,4,D"])):
        content = "".join(row + end for row in rows)
        (tmp_path / "mmlu" / f"algebra_{split}.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (imported,) = import_tasks(tmp_path / "mmlu", tmp_path / "out").tasks
    options = ["1", "2", "3", "4"]
    assert written(tmp_path / "out", "algebra") == [
        {"input": "1 + 1?", "answer": "2", "options": options, "split": "train"},
        {"input": "0, and 1?", "answer": "1", "options": options, "split": "test"},
        {"input": "2 + 2?", "answer": "4", "options": options, "split": "test"},
    ]
    assert any("have no header" in note for note in imported.notes)
    # A file of six columns with a header is read by it.
    (tmp_path / "six.csv").write_text("id,topic,a,b,input,answer\n1,x,p,q,one?,B\n2,y,p,q,two?,A\n")
    assert [row["input"] for row in _rows_of(tmp_path / "six.csv", tmp_path / "six")] == ["one?", "two?"]


def test_each_subject_of_mmlus_own_folders_is_a_task_whose_shots_are_those_of_dev(tmp_path):
    for split in ("dev", "val", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject in ("algebra", "world_religions"):
            (tmp_path / "data" / split / f"{subject}_{split}.csv").write_text(f"{subject} in {split}?,p,q,r,s,C\n")
    imported = import_tasks(tmp_path / "data", tmp_path / "out").tasks
    assert [one.task.name for one in imported] == ["algebra", "world_religions"]
    assert {row["split"]: row["input"] for row in written(tmp_path / "out", "world_religions")} == {
        "train": "world_religions in dev?",
        "validation": "world_religions in val?",
        "test": "world_religions in test?",
    }


def test_a_row_late_in_mmlus_own_file_that_is_not_utf8_is_named(tmp_path):
    rows = [f"What is the half of {2 * n}?,{n},1,2,3,A\n".encode() for n in range(1000)]
    (tmp_path / "halves.csv").write_bytes(b"".join(rows) + b"caf\xe9?,1,2,3,4,A\n")
    with pytest.raises(UserError, match=r"halves\.csv, row 1,001: byte [\d,]+ of the file is not UTF-8; save it"):
        import_tasks(tmp_path / "halves.csv")


def _rows_of(source: Path, out: Path) -> list[dict]:
    import_tasks(source, out)
    return written(out, source.stem)


def test_class_numbers_in_parquet_become_names_and_unlabelled_rows_are_left_out(tmp_path):
    """As the datasets library writes them: the names are in the schema, and -1 means that the label is not public."""
    features = {"text": {"_type": "Value"}, "label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for split, labels in (("train", [1, 0]), ("validation", [0, 1]), ("test", [-1, -1])):
        table = pa.table({"text": [f"{split} one", f"{split} two"], "label": labels})
        folder = tmp_path / "films" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}-00000-of-00001.parquet")
    (imported,) = import_tasks(tmp_path / "films", tmp_path / "out", splits={"test": "validation"}).tasks
    assert written(tmp_path / "out", "films") == [
        {"input": "train one", "answer": "good", "split": "train"},
        {"input": "train two", "answer": "bad", "split": "train"},
        {"input": "validation one", "answer": "bad", "split": "test"},
        {"input": "validation two", "answer": "good", "split": "test"},
    ]
    assert imported.left_out == {"split 'test' has no place here": 2}
    assert adds_up(imported)
    (unmoved,) = import_tasks(tmp_path / "films").tasks
    assert unmoved.left_out == {"empty answer": 2}
    assert [len(unmoved.task.train), len(unmoved.task.validation), len(unmoved.task.test)] == [2, 2, 0]


def test_a_folder_of_the_hub_is_read_as_its_readme_says(tmp_path):
    folder = tmp_path / "mail"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/a*.jsonl\n"
        "  - split: test\n    path: en/held.jsonl\n  - split: unsupervised\n    path: en/more.jsonl\n"
        "- config_name: de\n  data_files: de.jsonl\n"
        "dataset_info:\n- config_name: en\n  features:\n  - name: text\n    dtype: string\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': ham\n          '1': spam\n---\n# Mail\n",
        encoding="utf-8",
    )
    (folder / "en" / "a1.jsonl").write_text('{"text": "Hello", "label": 0}\n{"text": "Win!", "label": 1}\n')
    (folder / "en" / "held.jsonl").write_text('{"text": "Cheap", "label": 1}\n{"text": "?", "label": 7}\n')
    (folder / "en" / "more.jsonl").write_text('{"text": "Who knows", "label": -1}\n')
    with pytest.raises(UserError, match=r"mail: has the configs en, de; name one as `config`$"):
        import_tasks(folder)
    (imported,) = import_tasks(folder, tmp_path / "out", config="en").tasks
    assert written(tmp_path / "out", "mail_en") == [
        {"input": "Hello", "answer": "ham", "split": "train"},
        {"input": "Win!", "answer": "spam", "split": "train"},
        {"input": "Cheap", "answer": "spam", "split": "test"},
    ]
    assert imported.left_out == {"split 'unsupervised' has no place here": 1, "no class": 1}
    assert adds_up(imported)


def test_old_metadata_name_classes_too(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "dataset_infos.json").write_text(
        json.dumps({"default": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}})
    )
    (tmp_path / "old" / "train.csv").write_text("text,label\nIs it?,1\nWas it?,0\n")
    import_tasks(tmp_path / "old", tmp_path / "out")
    assert written(tmp_path / "out", "old") == [
        {"input": "Is it?", "answer": "yes"},
        {"input": "Was it?", "answer": "no"},
    ]


def test_columns_that_nobody_can_guess_are_given(tmp_path):
    (tmp_path / "odd.csv").write_text("frage,vorher,reply\nWho?,Ann ran.,Ann\n,,\nWhen?,Bo sat.,\n")
    told = "'frage', 'vorher', 'reply'; say which they are with `columns`, such as input=frage and answer=reply$"
    with pytest.raises(UserError, match=r"odd\.csv: input and answer are not recognised among its columns " + told):
        import_tasks(tmp_path / "odd.csv")
    (tmp_path / "wide.csv").write_text("Ticket Subject,Kind\nIt leaks.,repair\n")
    # As a shell takes it.
    with pytest.raises(UserError, match=r"`columns`, such as 'input=Ticket Subject' and answer=Kind$"):
        import_tasks(tmp_path / "wide.csv")
    columns = {"input": ["vorher", "frage"], "answer": "reply"}
    (imported,) = import_tasks(tmp_path / "odd.csv", tmp_path / "out", columns=columns, name="who").tasks
    assert written(tmp_path / "out", "who") == [{"input": "Ann ran.\nWho?", "answer": "Ann"}]
    assert imported.task.name == "who"
    assert imported.left_out == {"empty answer": 1, "blank row": 1}
    assert "odd.csv, row 3: answer '' is empty" in imported.examples["empty answer"]


def test_a_task_json_beside_the_source_is_kept(tmp_path):
    (tmp_path / "who.jsonl").write_text('{"q": "Who?", "a": "Ann"}\n{"q": "Whom?", "a": "Bo"}\n')
    settings = {
        "columns": {"input": "q", "answer": "a"},
        "family": "qa",
        "metric": "token_f1",
        "instruction": "Answer.",
    }
    (tmp_path / "who.task.json").write_text(json.dumps(settings))
    (imported,) = import_tasks(tmp_path / "who.jsonl", tmp_path / "out", rows="parquet").tasks
    (task,) = load_tasks(tmp_path / "out")
    assert (task.metric, task.instruction) == ("token_f1", "Answer.")
    assert pq.read_table(tmp_path / "out" / "who.parquet").to_pylist() == [
        {"input": "Who?", "answer": "Ann"},
        {"input": "Whom?", "answer": "Bo"},
    ]
    assert imported.files == ("who.parquet", "who.task.json")


def test_a_folder_with_several_tasks_gives_one_each(tmp_path):
    source = tmp_path / "all"
    source.mkdir()
    (source / "one.jsonl").write_text(json.dumps(ALPACA[0]))
    (source / "two.json").write_text(json.dumps(MMLU))
    assert [t.task.name for t in import_tasks(source, tmp_path / "out").tasks] == ["one", "two"]
    assert [task.name for task in load_tasks(tmp_path / "out")] == ["one", "two"]
    with pytest.raises(UserError, match="holds 2 tasks; leave the name out"):
        import_tasks(source, name="x")


def test_nothing_is_overwritten_and_nothing_stays_of_an_import_that_fails(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input": "a", "answer": ""}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl: no row is left; empty answer 1 \("):
        import_tasks(tmp_path / "bad.jsonl", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out: exists already; name a new folder"):
        import_tasks(tmp_path / "bad.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file or folder"):
        import_tasks(tmp_path / "nowhere.csv")
    (tmp_path / "broken.jsonl").write_text('{"input": "a", "answer": "b"}\n{"input": \n')
    assert import_tasks(tmp_path / "broken.jsonl").tasks[0].left_out == {"invalid JSON": 1}


def test_splits_must_be_ours_and_theirs(tmp_path):
    (tmp_path / "t").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "t" / f"{split}.csv").write_text(f"input,answer\n{split},x\n")
    with pytest.raises(UserError, match=r"split exam=dev: 'exam' is not a split"):
        import_tasks(tmp_path / "t", splits={"exam": "dev"})
    with pytest.raises(UserError, match=r"split test=eval: t has no split 'eval'; known: train, validation"):
        import_tasks(tmp_path / "t", splits={"test": "eval"})
    with pytest.raises(UserError, match=r"split test=dev: train has no split 'dev'; it names no splits$"):
        import_tasks(tmp_path / "t" / "train.csv", splits={"test": "dev"}, name="train")


def test_a_family_decides_the_metric(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "One and one.\n#### 2"}, {"question": "2 + 2?", "answer": "Two.\n#### 4"}]
    (tmp_path / "gsm8k.json").write_text(json.dumps(rows))
    (imported,) = import_tasks(tmp_path / "gsm8k.json", tmp_path / "out", family="math").tasks
    assert (imported.task.family, imported.task.metric) == ("math", "math_exact_match")
    about = json.loads((tmp_path / "out" / "gsm8k.task.json").read_text())
    assert (about["family"], about["metric"]) == ("math", "math_exact_match")


def test_labels_are_read_alike_or_left_out_as_check_reads_them(tmp_path):
    numbers = [{"input": f"row {n}", "answer": "01"[n % 2], "split": "train"} for n in range(20)]
    numbers += [{"input": "asked", "answer": "1.0", "split": "test"}]
    source = tmp_path / "flags.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in numbers))
    (flags,) = import_tasks(source).tasks
    assert (flags.task.labels, flags.task.test[0].answer) == (("0", "1"), "1")
    assert "labels that are the same number are read alike: '1.0' as '1' (1)" in flags.notes
    (results,) = import_tasks(source, family="math").tasks
    assert results.task.test[0].answer == "1.0"
    words = [{**row, "answer": {"0": "No", "1": "Yes", "1.0": "yes"}[row["answer"]]} for row in numbers]
    source.write_text("".join(json.dumps(row) + "\n" for row in words))
    (left,) = import_tasks(source).tasks
    assert left.left_out == {"label written otherwise than in train": 1}
    (example,) = left.examples.values()
    assert example.endswith('list both as "labels" in a flags.task.json beside it if they are two')


@pytest.mark.real_model
def test_a_real_base_reads_each_rows_own_instruction(tmp_path, smollm2):
    """Rows of alpaca's: one input, two instructions. Without them both queries would be the same prompt."""
    pairs = [("red", "fox"), ("blue", "bird"), ("green", "frog"), ("white", "horse"), ("black", "cat")]
    rows = [
        {"instruction": how, "input": f"a {colour} {animal}", "output": output, "split": split}
        for colour, animal in pairs
        for how, output in (("Which animal?", animal), ("Which colour?", colour))
        for split in ["test" if colour == "black" else "train"]
    ]
    source = tmp_path / "words.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    (imported,) = import_tasks(source, tmp_path / "out", family="qa").tasks
    assert [one.input for one in imported.task.test] == ["Which animal?\na black cat", "Which colour?\na black cat"]
    model = load_for_inference(str(smollm2), precision="fp32", max_tokens=400)
    answers = evaluate(model, [imported.task], shots=(6,), draws=1).predictions
    assert {answer.answer: answer.prediction for answer in answers} == {"cat": "cat", "black": "black"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"columns": {"inptu": "text"}},
            "columns={'inptu': 'text'}: maps an unknown name 'inptu'; did you mean 'input'?",
        ),
        ({"name": "a/b"}, "name=a/b: is not a name: a text on one line, without slashes"),
        ({"family": "clasification"}, "family=clasification: is unknown; did you mean 'classification'?"),
        ({"answer_index": 2}, "answer_index=2: is not 0 or 1: the number of the first option"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nIs it?,yes\n")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        import_tasks(tmp_path / "t.csv", **arguments)


@pytest.mark.parametrize("name", ["gone.yml", "gone.xlsm", "gone.YAML", "gone.csv"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match=rf"^{name}: no such file or folder$"):
        import_tasks(name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("made: 2024-02-30", "its metadata are not valid YAML .day is out of range for month.; correct them"),
        ("configs: [{data_files: [{path: ''}]}]", "no file matches ''"),
        ("configs: [{data_files: /data/t.csv}]", "no file matches '/data/t.csv'"),
    ],
)
def test_a_readme_with_a_mistake_is_one_line(metadata, message, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(UserError, match=rf"README\.md: .*{message}$"):
        import_tasks(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        "configs: 5",
        "dataset_info: {features: [{name: label, dtype: {class_label: [no, yes]}}]}",
        "dataset_info: {features: [{name: label, dtype: {class_label: {names: {no: 0}}}}]}",
    ],
)
def test_a_readme_in_another_form_says_nothing(metadata, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    (tmp_path / "t.csv").write_text("input,label\nIs it?,1\n")
    assert import_tasks(tmp_path).tasks[0].num_written == 1


@pytest.mark.parametrize("rows", ["jsonl", "parquet"])
def test_embeddings_that_the_sources_task_json_names_are_kept(rows, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"input": "Is it?", "answer": "yes", "like": [0.1, -2]}\n')
    (tmp_path / "t.task.json").write_text('{"columns": {"embedding": "like"}}')
    import_tasks(tmp_path / "t.jsonl", tmp_path / "out", rows=rows)
    (before,), (after,) = load_tasks(tmp_path), load_tasks(tmp_path / "out")
    assert [one.embedding for one in after.train + after.test] == [one.embedding for one in before.train + before.test]


def test_a_wrong_column_or_index_is_not_looked_for_in_a_file_that_is_not_there(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nIs it?,yes\n")
    with pytest.raises(
        UserError, match=r"""no 'nope' column \(it has 'text', 'label'\); correct "columns" in the arguments \(`col"""
    ):
        import_tasks(tmp_path / "t.csv", columns={"input": "nope"})
    with pytest.raises(UserError, match=r"""no row has options, but "answer_index" is set; correct the arguments"""):
        import_tasks(tmp_path / "t.csv", answer_index=0)


def test_a_mapping_that_is_none_is_one_line(tmp_path):
    (tmp_path / "t.csv").write_text("input,answer\nIs it?,yes\n")
    with pytest.raises(UserError, match=r"^columns=\['input'\]: maps nothing; give a mapping, such as {'input': 'text"):
        import_tasks(tmp_path / "t.csv", columns=["input"])
    with pytest.raises(UserError, match=r"^splits=test: maps nothing; give a mapping, such as {'test': 'validation'}$"):
        import_tasks(tmp_path / "t.csv", splits="test")


def test_an_old_workbook_is_told_what_makes_it_readable(tmp_path):
    (tmp_path / "old.xls").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1"))
    with pytest.raises(UserError, match=r"old\.xls: cannot read '\.xls' files; known: .* \(save it as CSV UTF-8\)$"):
        import_tasks(tmp_path / "old.xls")
