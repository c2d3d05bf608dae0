"""Rows are as full as planned; out of memory halves them and nothing is lost or done twice."""

from __future__ import annotations

import pytest
import torch

from manyicl.errors import UserError
from manyicl.inference.budget import row_budget, run_chunks, run_rows
from tests.conftest import tiny_model


def test_rows_are_filled_in_order_and_a_large_item_stands_alone():
    rows = []
    run_rows([0.5, 0.5, 0.25, 3.0, 0.75], fraction=lambda size: size, run=rows.append)
    assert rows == [[0.5, 0.5], [0.25], [3.0], [0.75]]


def test_out_of_memory_halves_the_row_and_goes_on():
    tried, done = [], []

    def run(row):
        tried.append(len(row))
        if len(row) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(row)

    run_rows(range(8), fraction=lambda _: 0.125, run=run)
    assert tried == [8, 4, 2, 2, 2, 2]
    assert done == list(range(8))


def test_one_query_that_is_too_much_is_one_line():
    def run(row):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of memory with one query at a time; shorten it"):
        run_rows([1, 2], fraction=lambda _: 0.5, run=run)
    with pytest.raises(UserError, match="out of memory at 0 tokens of shots; use fewer"):
        run_chunks(0, 100, most=64, run=lambda start, stop: run([]))


def test_chunks_cover_every_token_once_also_where_memory_runs_out():
    done = []

    def run(start, stop):
        if stop - start > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append((start, stop))

    run_chunks(0, 100, most=64, run=run)
    assert done == [(0, 32), (32, 64), (64, 96), (96, 100)]


def test_another_error_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        run_rows([1], fraction=lambda _: 1.0, run=lambda row: (_ for _ in ()).throw(RuntimeError("shape")))


@pytest.mark.slow
def test_a_large_vocabulary_makes_rows_of_many_logits_shorter():
    small, large = (row_budget(tiny_model("llama", vocab_size=size)) for size in (400, 200_000))
    assert small.fraction(num_tokens=100, num_logits=100) == pytest.approx(100 / small.row_tokens)
    assert large.fraction(num_tokens=100, num_logits=100) > 9 * small.fraction(num_tokens=100, num_logits=100)
    assert large.logit_bytes == 200_000 * 12
    assert large.key_bytes == 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
