"""Rows are as full as planned; out of memory halves them and nothing is lost or done twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from manyicl.errors import UserError
from manyicl.inference.budget import (
    CONTEXT_BYTES,
    part_of_gpu,
    process_memory,
    row_budget,
    run_chunks,
    run_rows,
    sharing_gpu,
    usable_memory,
)
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpu_that_others_have_filled_halves_the_row_whoever_finds_it_full(error):
    """Only torch's own allocator has a class for it; what CUDA and cuBLAS said ended the process in a traceback."""
    done = []

    def run(row):
        if len(row) > 1:
            raise error
        done.extend(row)

    run_rows(range(2), fraction=lambda _: 0.5, run=run)
    assert done == [0, 1]


def test_one_query_that_is_too_much_is_one_line():
    def run(row):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of memory with one query at a time; free it from other programs, shorten"):
        run_rows([1, 2], fraction=lambda _: 0.5, run=run)
    with pytest.raises(UserError, match="out of memory at 0 tokens of shots; free it from other programs"):
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


@pytest.fixture
def full_gpu(monkeypatch):
    """A GPU with 1,000 bytes free, and 200 that this process holds and does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)


@pytest.mark.usefixtures("full_gpu")
def test_processes_on_one_gpu_count_on_their_share_of_it():
    """Each took half of what was free, so that a dozen of them ran out of memory."""
    device, at_work = torch.device("cuda"), 1
    with sharing_gpu(lambda: 1 / at_work):
        assert usable_memory(device) == 1200
        at_work = 12  # others have begun
        assert usable_memory(device) == 100
    assert usable_memory(device) == 1200


@pytest.mark.usefixtures("full_gpu")
def test_a_process_with_a_part_of_the_gpu_counts_on_no_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.1)
    assert process_memory(torch.device("cuda")) == 800  # of 8,000, though 1,500 are free or its own
    assert usable_memory(torch.device("cuda")) == 500  # it has 300 of them in use


@pytest.mark.parametrize(("num_processes", "fraction"), [(1, 0.984375), (16, 0.046875)])
def test_equal_parts_leave_room_for_cuda_itself(num_processes, fraction, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 64 * CONTEXT_BYTES))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.5)
    with part_of_gpu(num_processes):
        assert taken == [fraction]  # 1 / 16 - 1 / 64
    assert taken == [fraction, 0.5]  # as it was before
    with part_of_gpu(None):
        assert taken == [fraction, 0.5]


def test_more_processes_than_a_gpu_has_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 16 << 30))
    told = r"^30 processes on a GPU of 16 GiB: CUDA alone takes 0.68 GiB for each; start fewer$"
    with pytest.raises(UserError, match=told), part_of_gpu(30):
        pass


@pytest.mark.usefixtures("full_gpu")
def test_a_row_takes_half_of_what_may_be_counted_on():
    with FakeTensorMode():  # tensors of a GPU that need none
        model = tiny_model("llama")
        model.lm_head.weight = model.model.embed_tokens.weight = nn.Parameter(torch.empty(400, 32, device="cuda"))
        assert row_budget(model).row_bytes == 600
        with sharing_gpu(lambda: 0.25):
            assert row_budget(model).row_bytes == 150
            assert row_budget(model, row_tokens=7).row_tokens == 7
