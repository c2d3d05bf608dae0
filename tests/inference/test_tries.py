"""Answers as a token trie: what is shared stands once, last tokens are no nodes, and sums go along each option."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.inference.tries import build_trie


def test_shared_beginnings_stand_once_and_last_tokens_are_no_nodes():
    # Two labels that share 5 6 and differ in what follows, and one that shares nothing; 9 ends each.
    trie = build_trie([[5, 6, 7, 9], [5, 6, 9], [8, 9]])
    assert trie.tokens_N.tolist() == [5, 6, 7, 8]
    assert trie.parents_N.tolist() == [-1, 0, 1, -1]
    assert trie.depths_N.tolist() == [1, 2, 3, 1]
    edges = list(zip(trie.edge_parents_E.tolist(), trie.edge_tokens_E.tolist(), strict=True))
    assert edges == [(-1, 5), (0, 6), (1, 7), (2, 9), (1, 9), (-1, 8), (3, 9)]
    assert trie.sum_paths(np.array([1.0, 2, 4, 8, 16, 32, 64])).tolist() == [15, 19, 96]
    assert trie.ancestors().astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert not trie.is_chain
    assert [(nodes.tolist(), num_own) for nodes, num_own in trie.runs()] == [([0, 1, 2], 3), ([3], 1)]


def test_one_option_is_a_chain_and_one_token_needs_no_node():
    assert build_trie([[4, 5, 6]]).is_chain
    assert build_trie([[4, 5, 6]]).tokens_N.tolist() == [4, 5]
    trie = build_trie([[4], [5], [4]])
    assert (trie.tokens_N.tolist(), trie.edge_tokens_E.tolist()) == ([], [4, 5])
    assert trie.is_chain
    assert trie.sum_paths(np.array([0.5, 0.25])).tolist() == [0.5, 0.25, 0.5]
    assert trie.sum_paths(np.array([[0.5, 0.25], [2.0, 4.0]])).tolist() == [[0.5, 0.25, 0.5], [2.0, 4.0, 2.0]]


def test_a_node_that_does_not_follow_the_one_before_it_begins_a_run_after_those_above_it():
    trie = build_trie([[5, 6, 9], [5, 7, 8, 9]])  # nodes 5, 6, 7 and 8; 7 follows 5
    assert [(nodes.tolist(), num_own) for nodes, num_own in trie.runs()] == [([0, 1], 2), ([0, 2, 3], 2)]
    assert [(nodes.tolist(), num_own) for nodes, num_own in build_trie([[4], [5]]).runs()] == [([], 0)]


def test_an_option_that_begins_another_ends_inside_it():
    trie = build_trie([[1, 2], [1, 2, 3]])
    assert trie.tokens_N.tolist() == [1, 2]
    assert trie.sum_paths(np.array([1.0, 2.0, 4.0])).tolist() == [3, 7]


@pytest.mark.parametrize("options", [[], [[]], [[1], []]])
def test_nothing_to_choose_is_an_error(options):
    with pytest.raises(ValueError, match="at least one"):
        build_trie(options)


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=8))
def test_every_option_can_be_read_off_its_way_through_the_trie(options):
    trie = build_trie(options)
    for number, option in enumerate(options):
        edges = trie.path_edges[trie.path_starts[number] : trie.path_starts[number + 1]]
        assert trie.edge_tokens_E[edges].tolist() == option
        # The parent of each next edge is the node of the edge before: same token, same depth, on the same way.
        for depth, edge in enumerate(edges.tolist()[1:], start=1):
            parent = int(trie.edge_parents_E[edge])
            way = trie.tokens_N[trie.ancestors()[parent]].tolist()
            assert way == option[:depth]
            assert trie.depths_N[parent] == depth
    beginnings = {tuple(option[:n]) for option in options for n in range(1, len(option))}
    assert len(trie.tokens_N) == len(beginnings)
