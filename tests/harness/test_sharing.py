"""Contexts that begin alike: every one is in one group, and each keeps an id after what is shared."""

from __future__ import annotations

import random

from manyicl.harness import SharedContexts, share_contexts


def test_contexts_that_share_most_of_their_ids_are_one_group_and_the_others_run_beside_each_other():
    shots = (1, 2, 3, 4, 5, 6)
    contexts = [(*shots, 7), (8, 9), (*shots, 9, 9), (*shots, 7), (8, 7, 6, 5)]
    assert share_contexts(contexts) == [
        SharedContexts(shots, ((*shots, 7), (*shots, 9, 9))),
        SharedContexts((), ((8, 7, 6, 5), (8, 9))),
    ]


def test_a_long_context_alone_is_encoded_before_its_options():
    long = tuple(range(300))
    assert share_contexts([long, (5,)]) == [SharedContexts(long[:-1], (long,)), SharedContexts((), ((5,),))]


def test_a_context_that_is_the_beginning_of_another_keeps_an_id_of_its_own():
    assert share_contexts([(1, 2, 3, 4), (1, 2, 3)]) == [SharedContexts((1, 2), ((1, 2, 3), (1, 2, 3, 4)))]


def test_no_context_is_lost_whatever_they_share():
    rng = random.Random(0)
    for _ in range(200):
        contexts = [tuple(rng.randrange(2) for _ in range(rng.randrange(1, 9))) for _ in range(12)]
        groups = share_contexts(contexts)
        assert sorted(c for group in groups for c in group.contexts) == sorted(set(contexts))
        for group in groups:
            assert all(c[: len(group.prefix)] == group.prefix and len(c) > len(group.prefix) for c in group.contexts)
