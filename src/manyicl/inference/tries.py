"""Known answers as a token trie: common beginnings are computed once, and last tokens never go through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class AnswerTrie:
    """The options of one query. Shapes: N nodes, E edges, O options.

    A node is a beginning of some option that another token follows; the root, the query's last token, is none of them.
    tokens_N, parents_N (-1: the root), depths_N (1: next to the root): parents stand before their children.
    edge_parents_E, edge_tokens_E: every (beginning, next token) whose probability is needed.
    path_edges, path_starts: the edges of option o are path_edges[path_starts[o]:path_starts[o + 1]].
    """

    tokens_N: NDArray[np.int32]
    parents_N: NDArray[np.int64]
    depths_N: NDArray[np.int64]
    edge_parents_E: NDArray[np.int64]
    edge_tokens_E: NDArray[np.int64]
    path_edges: NDArray[np.int64]
    path_starts: NDArray[np.int64]

    @property
    def is_chain(self) -> bool:
        """Whether each node follows the one before it, as in a single option."""
        return bool((self.parents_N == np.arange(-1, len(self.parents_N) - 1)).all())

    def ancestors(self) -> NDArray[np.bool_]:
        """Return (N, N): whether the second node is the first one or an ancestor of it."""
        above = np.eye(len(self.tokens_N), dtype=bool)
        for node, parent in enumerate(self.parents_N.tolist()):
            if parent >= 0:
                above[node] |= above[parent]
        return above

    def runs(self) -> list[tuple[NDArray[np.int64], int]]:
        """Return the nodes run by run: (nodes above the run and its own, from the root on; how many are its own).

        A node that does not follow the one before it begins a run. The first run follows the root, and may be empty.
        """
        parents = self.parents_N.tolist()
        starts = [node for node, parent in enumerate(parents) if parent != node - 1]
        runs = []
        for start, stop in pairwise([0, *starts, len(parents)]):
            above, node = [], parents[start] if start else -1
            while node >= 0:
                above.append(node)
                node = parents[node]
            runs.append((np.array([*above[::-1], *range(start, stop)], dtype=np.int64), stop - start))
        return runs

    def sum_paths(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums of `values` (..., E) along each option, (..., O)."""
        return np.add.reduceat(values[..., self.path_edges], self.path_starts[:-1], axis=-1)

    def all_on_paths(self, flags_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return whether `flags_E` is true for every edge of each option, (O,)."""
        return np.logical_and.reduceat(flags_E[self.path_edges], self.path_starts[:-1])


def build_trie(options: Sequence[Sequence[int]]) -> AnswerTrie:
    """Return the trie of token ids; options may repeat, and begin one another.

    Raises:
        ValueError: no options, or one without tokens.
    """
    if not options or not all(len(option) for option in options):
        raise ValueError("a query needs at least one option, and every option at least one token")
    edges: dict[tuple[int, int], int] = {}  # (edge before, -1 at the root; token) -> edge
    paths = []
    for option in options:
        path, edge = [], -1
        for token in option:
            edge = edges.setdefault((edge, int(token)), len(edges))
            path.append(edge)
        paths.append(path)
    # An edge that another one follows is a node.
    inner = sorted({before for before, _ in edges} - {-1})
    node_of = {edge: node for node, edge in enumerate(inner)} | {-1: -1}
    keys = list(edges)
    depths: list[int] = []
    for edge in inner:
        parent = node_of[keys[edge][0]]
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return AnswerTrie(
        tokens_N=np.array([keys[edge][1] for edge in inner], dtype=np.int32),
        parents_N=np.array([node_of[keys[edge][0]] for edge in inner], dtype=np.int64),
        depths_N=np.array(depths, dtype=np.int64),
        edge_parents_E=np.array([node_of[before] for before, _ in keys], dtype=np.int64),
        edge_tokens_E=np.array([token for _, token in keys], dtype=np.int64),
        path_edges=np.concatenate([np.array(path, dtype=np.int64) for path in paths]),
        path_starts=np.concatenate([[0], np.cumsum([len(path) for path in paths])]).astype(np.int64),
    )
