"""Rows of queries: where each run of tokens finds its keys, and that runs see what the mask shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyicl.inference.prefix import encode_prefix, score_choices
from manyicl.inference.query_rows import Query, find_runs
from manyicl.inference.tries import build_trie
from tests.conftest import tiny_model
from tests.support.runs import OPTIONS, attend_padded, attend_run_by_run, lay_out


def test_two_options_make_two_runs_of_each_query():
    """Row: 2 tokens and the nodes 7 and 9, then 3 tokens and the nodes; the node 9 does not follow the node 7."""
    runs = lay_out([2, 3], [[7, 8], [9, 8]]).runs()
    assert runs.query_bounds_R.tolist() == [0, 3, 4, 8, 9]
    assert runs.key_bounds_R.tolist() == [0, 3, 6, 10, 14]
    assert runs.key_places_K.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 4, 5, 6, 8]
    assert (runs.most_queries, runs.most_keys) == (4, 4)


def test_queries_with_other_options_have_runs_of_their_own():
    """Row: 1 token and the node 7; 2 tokens alone; 1 token and the nodes 7, 9 and 11, of which the last follows 9."""
    one, many = build_trie([[7, 8]]), build_trie([[7, 8], [9, 11, 8]])
    queries = [Query(np.full(length, 5, np.int32), trie) for length, trie in ((1, one), (2, None), (1, many))]
    runs = find_runs(queries, device=torch.device("cpu"))
    assert runs.query_bounds_R.tolist() == [0, 2, 4, 6, 8]
    assert runs.key_bounds_R.tolist() == [0, 2, 4, 6, 9]
    assert runs.key_places_K.tolist() == [0, 1, 2, 3, 4, 5, 4, 6, 7]
    assert (runs.most_queries, runs.most_keys) == (2, 3)


@pytest.mark.parametrize("options", [None, [[7, 8, 9]]])
def test_queries_without_branches_have_the_rows_own_tokens_as_keys(options):
    runs = lay_out([2, 3], options).runs()
    assert runs.query_bounds_R.tolist() == ([0, 2, 5] if options is None else [0, 4, 9])
    assert runs.key_bounds_R is runs.query_bounds_R
    assert runs.key_places_K is None


def test_nothing_is_cut_into_runs_where_nothing_is_padded_or_masked():
    assert lay_out([3, 3], None).runs is None


def test_many_options_after_a_long_query_are_masked_instead():
    options = [[first, 2] for first in range(10, 30)]  # 20 nodes, each with 100 keys of the query and itself
    assert lay_out([100], options).runs() is None
    assert lay_out([100], options[:2]).runs() is not None


ROWS = [((1, 6, 2), None), ((1, 6, 2), [[7, 8, 9]]), ((1, 6, 2), OPTIONS), ((4,), OPTIONS), ((2, 2), OPTIONS)]


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("lengths", "options"), ROWS, ids=["alone", "chain", "tree", "one query", "one length"])
def test_runs_see_what_the_mask_shows(lengths, options, window):
    layout = lay_out(lengths, options)
    num_tokens = int(layout.runs().query_bounds_R[-1])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, num_tokens, 8) for heads in (4, 2, 2))
    out, lse = attend_run_by_run(query, key, value, runs=layout.runs(), window=window)
    wanted, sums = attend_padded(query, key, value, layout=layout, window=window)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert torch.allclose(lse, sums, atol=1e-5)


@pytest.mark.parametrize("options", [[[7, 2], [9, 2]], OPTIONS], ids=["two", "tree"])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "qwen3", "gemma3"])
def test_a_model_scores_by_runs_as_it_does_by_the_mask(name, options, monkeypatch):
    """On a CPU by the formula in place of varlen attention; queries and options are longer than the windows of 16."""
    model, rng = tiny_model(name), np.random.default_rng(0)
    before, *queries = (rng.integers(3, 390, n).astype(np.int32) for n in (40, 1, 6, 24))
    expected = np.array(score_choices(model, encode_prefix(model, before), queries, [options] * 3))
    taken = []
    monkeypatch.setattr("manyicl.models.attention.dispatch.takes_flash", lambda *_, softcap: softcap is None)
    monkeypatch.setattr(
        "manyicl.models.attention.dispatch.attend_runs",
        lambda *row, **how: (taken.append(how["window"]), attend_run_by_run(*row, **how))[1],
    )
    nats = np.array(score_choices(model, encode_prefix(model, before), queries, [options] * 3))
    assert nats == pytest.approx(expected, abs=1e-4)
    assert len(taken) == 3  # once in each layer
    assert (16 in taken) == (name in ("mistral-sliding", "gemma3"))
