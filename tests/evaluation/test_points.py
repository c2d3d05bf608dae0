"""Predictions that come back as they were written."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyicl.evaluation.points import PREDICTION_SCHEMA, Prediction, predictions_bytes, read_predictions


def test_predictions_come_back_to_the_bit(tmp_path):
    rows = [
        Prediction("t", 0, 4, "q0", "owl", "owl", 1.0, 0.1 + 0.2, choice_nll={"owl": 0.1 + 0.2, "a fox": 1e-300}),
        Prediction("t", 1, 4, "q1", "", "néé\n", 0.0, 1 / 3, cut=True, other_scores={"token_f1": 1 / 3}),
    ]
    path = tmp_path / "p.parquet"
    path.write_bytes(predictions_bytes(rows))
    assert read_predictions(path) == rows
    assert list(read_predictions(path)[0].choice_nll) == ["owl", "a fox"]
    assert pq.read_table(path).schema.equals(PREDICTION_SCHEMA)
    assert predictions_bytes(rows) == path.read_bytes()


def test_a_file_of_an_earlier_version_has_no_other_scores(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [Prediction("t", 0, 4, "q0", "owl", "owl", 1.0, 0.5, other_scores={"token_f1": 1.0})]
    path.write_bytes(predictions_bytes(rows))
    pq.write_table(pq.read_table(path).drop_columns(["other_scores"]), path)
    assert read_predictions(path) == [Prediction("t", 0, 4, "q0", "owl", "owl", 1.0, 0.5)]


def test_half_a_file_is_no_file(tmp_path):
    path = tmp_path / "p.parquet"
    whole = predictions_bytes([Prediction("t", 0, 4, "q0", "owl", "owl", 1.0, 0.5)])
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(pa.ArrowException):
        read_predictions(path)
