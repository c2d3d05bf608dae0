"""What it would cost to score a task's labels through a vLLM, beside generating them there and scoring them here.

    pip install ".[endpoint]"
    python benchmarks/endpoint_scoring.py MODEL TASKS --task agnews --url http://127.0.0.1:8000 [--name tiny]
                                          [--shots 16] [--queries 12] [--repeats 2] [--skip 0]

The server serves MODEL in float32 (docs/service.md says how). All sides get the same ids, at most 8 requests at once:

- here: the engine of this process, shots encoded once;
- generated: what `manyicl eval --endpoint` does, greedy, as many tokens as the longest label has;
- scored: the trie of the labels' tokens, walked from its root. A request generates along a branch, with vLLM's
  `logprob_token_ids` for the tokens that may follow and `allowed_token_ids` to keep it in the trie; where it leaves the
  likeliest branch, the others are asked next. All nats are exact. With --skip, branches that together hold less than
  this part of the probability found so far are not asked;
- scored by nodes: as scored, with one generated token per request.

Each side of a repeat has the server's cache to itself (`cache_salt`), which holds the shots only after its first query.
"""

from __future__ import annotations

import argparse
import statistics
import time
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from manyicl.evaluation.sweep import Sweep, TaskSweep
from manyicl.inference import InferenceModel, choose_engine, load_for_inference, tokenize_for
from manyicl.tasks import load_tasks

Beginning = tuple[int, ...]  # tokens from the root of the trie
MOST_IDS = 128  # of vLLM's logprob_token_ids
AT_ONCE = 8
COUNTERS = ("prefix_cache_queries_total", "prefix_cache_hits_total")


class Trie:
    """The labels' tokens: what may follow each beginning."""

    def __init__(self, options: Sequence[Sequence[int]]) -> None:
        self.options = [tuple(option) for option in options]
        self.after: dict[Beginning, list[int]] = {}
        for option in self.options:
            for depth, token in enumerate(option):
                after = self.after.setdefault(option[:depth], [])
                if token not in after:
                    after.append(token)

    def depth_below(self, node: Beginning) -> int:
        """Return how many tokens the longest branch after `node` has."""
        return max((1 + self.depth_below((*node, token)) for token in self.after.get(node, ())), default=0)

    def tokens_below(self, node: Beginning) -> list[int]:
        """Return the tokens after `node`, level by level, as many whole levels as a request may name."""
        found: list[int] = []
        level = [node]
        while level:
            more = [(*one, token) for one in level for token in self.after.get(one, ())]
            tokens = list(dict.fromkeys([*found, *(path[-1] for path in more)]))
            if len(tokens) > MOST_IDS:
                return found
            found, level = tokens, more
        return found


class Server:
    """A vLLM, and how many requests it got."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.num_requests, self.salt = url, name, 0, ""
        self.client = httpx2.Client(timeout=600)

    def complete(self, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        """Return the first choice of a completion."""
        self.num_requests += 1
        body = {"model": self.name, "prompt": list(prompt), "temperature": 0.0, "cache_salt": self.salt, **fields}
        reply = self.client.post(f"{self.url}/v1/completions", json=body)
        if reply.status_code != 200:
            raise SystemExit(f"{self.url}: {reply.text}")
        choice: dict[str, Any] = reply.json()["choices"][0]
        return choice

    def counts(self) -> dict[str, float]:
        """Return prompt tokens that were looked up in the cache, and those found."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {name: sum(float(x.split()[-1]) for x in lines if x.startswith(f"vllm:{name}{{")) for name in COUNTERS}


def walk(server: Server, trie: Trie, prompt: Sequence[int], node: Beginning, *, chain: bool) -> dict[Beginning, float]:
    """Return the log-probability of every token after `node`, and after the beginnings that one request comes by."""
    if len(trie.after[node]) > MOST_IDS:
        raise SystemExit(f"{len(trie.after[node])} tokens may follow {node}, and vLLM names {MOST_IDS} at most")
    ids = trie.tokens_below(node) if chain else trie.after[node]
    choice = server.complete(
        [*prompt, *node],
        max_tokens=trie.depth_below(node) if chain else 1,
        logprobs=1,
        logprob_token_ids=ids,
        allowed_token_ids=ids,
        return_tokens_as_token_ids=True,
        ignore_eos=True,
    )
    found: dict[Beginning, float] = {}
    given = choice["logprobs"]
    for token, top in zip(given["tokens"], given["top_logprobs"], strict=True):
        logprobs = {int(name.partition(":")[2]): value for name, value in top.items()}
        if node not in trie.after or not logprobs.keys() >= set(trie.after[node]):
            break
        found |= {(*node, after): logprobs[after] for after in trie.after[node]}
        node = (*node, int(token.partition(":")[2]))
    return found


def score(
    server: Server, trie: Trie, prompt: Sequence[int], *, pool: ThreadPoolExecutor, chain: bool, skip: float
) -> NDArray[np.float64]:
    """Return the nats (O,) of the options; of one that is skipped, infinity."""
    logprobs: dict[Beginning, float] = {}

    def mass(path: Beginning) -> float:
        steps = [logprobs.get(path[: n + 1], -np.inf) for n in range(len(path))]
        return float(np.exp(sum(steps)))

    while True:
        reached = [()] if not logprobs else [path for path in logprobs if path in trie.after]
        open_ = [node for node in reached if (*node, trie.after[node][0]) not in logprobs]
        certain = sum(mass(option) for option in trie.options)
        open_.sort(key=mass)
        left_out = np.searchsorted(np.cumsum([mass(node) for node in open_]), skip * certain, side="right")
        asked = open_[int(left_out) if skip else 0 :]
        if not asked:
            break
        for found in pool.map(lambda node: walk(server, trie, prompt, node, chain=chain), asked):
            logprobs |= found
    return np.array([-np.log(max(mass(option), 1e-300)) for option in trie.options])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks")
    parser.add_argument("--task", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", default="tiny")
    parser.add_argument("--sides", default="here,generated,scored")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--skip", type=float, default=0.0)
    given = parser.parse_args()
    model = load_for_inference(given.model, precision="fp32", max_tokens=given.max_tokens)
    task = load_tasks(given.tasks, names=[given.task])[0]
    settings = Sweep((given.shots,), 1, given.queries, max_tokens=given.max_tokens)
    sweep = TaskSweep(tokenize_for(task, model), tokenizer=model.tokenizer, sweep=settings)
    measure(Server(given.url, given.name), model, sweep, given)


def measure(server: Server, model: InferenceModel, sweep: TaskSweep, given: argparse.Namespace) -> None:
    """Answer the queries by each side in turn, `repeats` times, and print seconds per query."""
    pairs = sweep.written[sweep.candidates[sweep.queries.tolist()[0]]]
    trie, longest = Trie([ids for _, ids in pairs]), max(len(ids) for _, ids in pairs)
    shots = np.concatenate([sweep.tokenized.head_ids, sweep.prefix_ids(0, start=0, stop=given.shots)]).astype(np.int32)
    queries = list(sweep.asked_ids(0, given.shots).values())
    prompts = [[*shots.tolist(), *query.tolist()] for query in queries]
    print(f"{sweep.task.name}: {len(pairs)} labels, {len(trie.after)} nodes, {len(shots)} tokens of shots")

    def here() -> list[NDArray[np.float64]]:
        with choose_engine(model) as engine:
            return engine.score(engine.encode(shots), queries, [trie.options] * len(queries))

    def generated() -> list[str]:
        stop = [model.tokenizer.end_text]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            first = [server.complete(prompts[0], max_tokens=longest, stop=stop)]
            others = pool.map(lambda prompt: server.complete(prompt, max_tokens=longest, stop=stop), prompts[1:])
            return [str(choice["text"]).strip() for choice in [*first, *others]]

    def scored(*, chain: bool = True) -> list[NDArray[np.float64]]:
        def one(prompt: Sequence[int]) -> NDArray[np.float64]:
            return score(server, trie, prompt, pool=inner, chain=chain, skip=given.skip)

        with ThreadPoolExecutor(AT_ONCE) as inner, ThreadPoolExecutor(AT_ONCE) as outer:
            return [one(prompts[0]), *outer.map(one, prompts[1:])]

    sides: dict[str, Callable[[], Any]] = {
        "here": here,
        "generated": generated,
        "scored": scored,
        "scored by nodes": lambda: scored(chain=False),
    }
    took: dict[str, list[float]] = {}
    last: dict[str, Any] = {}
    for _ in range(given.repeats):
        for side in given.sides.split(","):
            server.salt, server.num_requests, before = uuid.uuid4().hex, 0, server.counts()
            began = time.monotonic()
            last[side] = sides[side]()
            took.setdefault(side, []).append(time.monotonic() - began)
            after = server.counts()
            looked_up, hits = (after[name] - before[name] for name in COUNTERS)
            print(
                f"{side}: {took[side][-1] / len(queries):.2f} s a query, {server.num_requests / len(queries):.1f}"
                f" requests, {(looked_up - hits) / len(queries):.0f} prompt tokens not from the cache",
                flush=True,
            )
    for side, seconds in took.items():
        each = [one / len(queries) for one in seconds]
        print(f"{side}: median {statistics.median(each):.2f} s a query [{min(each):.2f}, {max(each):.2f}]")
    compare(last, [text for text, _ in pairs])


def compare(last: dict[str, Any], labels: Sequence[str]) -> None:
    """Print how far the last answers of the sides lie apart."""
    if "here" not in last:
        return
    chosen = [labels[int(nats.argmin())] for nats in last["here"]]
    if "generated" in last:
        same = sum(one == other for one, other in zip(chosen, last["generated"], strict=True))
        none = sum(text not in labels for text in last["generated"])
        print(f"generated: {same} of {len(chosen)} as here, {none} none of the labels")
    for side in ("scored", "scored by nodes"):
        if side in last:
            both = list(zip(last[side], last["here"], strict=True))
            same = sum(int(one.argmin() == other.argmin()) for one, other in both)
            apart = max(float(np.abs(one - other)[one < 600].max()) for one, other in both)
            parts = max(float(np.abs(share(one) - share(other)).max()) for one, other in both)
            print(f"{side}: {same} of {len(chosen)} as here; apart {apart:.1e} nats, probabilities {parts:.1e}")


def share(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of each option among all."""
    weights = np.exp(nats.min() - nats)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


if __name__ == "__main__":
    main()
