"""The walk along a trie of labels at a server: exact, with one request per label at most, and what may be skipped."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from benchmarks.endpoint_scoring import Server, Trie, score

LABELS = [(1, 2, 9), (1, 3, 9), (4, 9), (5, 6, 7, 9)]
# Beginning of an answer -> probability of each token after it; other tokens have the rest.
NEXT = {
    (): {1: 0.5, 4: 0.25, 5: 0.001},
    (1,): {2: 0.5, 3: 0.25},
    (1, 2): {9: 0.5},
    (1, 3): {9: 0.5},
    (4,): {9: 0.5},
    (5,): {6: 0.5},
    (5, 6): {7: 0.5},
    (5, 6, 7): {9: 0.5},
}
PROMPT = (100, 101)


class Known(Server):
    """Answers as vLLM does, by the table."""

    def __init__(self) -> None:
        super().__init__("http://localhost:1", "tiny")

    def complete(self, prompt, **fields):
        self.num_requests += 1
        node, tokens, tops = tuple(prompt[len(PROMPT) :]), [], []
        for _ in range(fields["max_tokens"]):
            after = NEXT.get(node, {})
            best = max(fields["allowed_token_ids"], key=lambda token: after.get(token, 0.0))
            tokens.append(f"token_id:{best}")
            given = {token: math.log(after.get(token, 1e-9)) for token in fields["logprob_token_ids"]}
            tops.append({f"token_id:{token}": value for token, value in given.items()})
            node = (*node, best)
        return {"logprobs": {"tokens": tokens, "top_logprobs": tops}}


def test_every_label_gets_its_nats_by_one_request_each():
    server = Known()
    with ThreadPoolExecutor(2) as pool:
        nats = score(server, Trie(LABELS), PROMPT, pool=pool, chain=True, skip=0)
    assert [round(math.exp(-one), 9) for one in nats] == [0.125, 0.0625, 0.125, 0.000125]
    assert server.num_requests == 4


def test_by_nodes_there_is_a_request_for_each_beginning():
    server = Known()
    with ThreadPoolExecutor(2) as pool:
        nats = score(server, Trie(LABELS), PROMPT, pool=pool, chain=False, skip=0)
    assert [round(math.exp(-one), 9) for one in nats] == [0.125, 0.0625, 0.125, 0.000125]
    assert server.num_requests == len(NEXT) == 8


def test_a_branch_that_cannot_matter_is_not_asked():
    server = Known()
    with ThreadPoolExecutor(2) as pool:
        nats = score(server, Trie(LABELS), PROMPT, pool=pool, chain=True, skip=0.01)
    assert [round(math.exp(-one), 9) for one in nats] == [0.125, 0.0625, 0.125, 0]
    assert server.num_requests == 3


def test_a_request_names_only_as_many_tokens_as_the_server_takes():
    trie = Trie([(first, second) for first in range(20) for second in range(100, 120)])
    assert trie.tokens_below(()) == [*range(20), *range(100, 120)]
    wide = Trie([(first, 200 + first) for first in range(100)])
    assert wide.tokens_below(()) == list(range(100))
