"""The service under load, beside the same model behind `transformers serve` and behind a plain server.

    pip install ".[serve,dev]"
    python benchmarks/serve_load.py --model MODEL [--shot-tokens 2048] [--clients 1,8,64] [--rounds 3] [--seconds 30]
                                    [--sides ours,transformers,transformers-batching,plain] [--peer-seconds 120]
                                    [--requests 10000] [--uploads 3] [--threads 2] [--data FILE.csv] [--out result.json]
                                    [--shape mistral-7b] [--precision fp32]
    python benchmarks/serve_load.py --join one.json two.json ...

Everything listens on this computer alone, in processes that this one starts and ends. All sides get the same model, the
same shots in the same order, and the same inputs as the same text: ours as the input of a task whose shots are fixed by
a seed, the others as a whole prompt. Ours scores the labels of the task; the others generate as many tokens as the
longest label has, greedily, which is what a plain client would ask for. `plain` is `model.generate` in a server that
answers one request after the other. `transformers-batching` is `transformers serve --continuous-batching`.

A level is a number of clients in a closed loop: each sends its next input once it has its answer, and none is sent
twice. It lasts --seconds, for the others --peer-seconds; those that are under way at its end are not counted, and the
row says how many they were. One request before it is not timed; a server that clients have left goes on with what
they asked, and answers it after that. If fewer than two per client were answered, p99 is a lower bound, marked with
>=. Rounds alternate: each round runs each side, which has a new server per round, at each level. The ratio of
throughput is that of the medians, with the least and the most of the rounds. The clients run on the same cores and
take their part of all sides.

The load runs on a server that does not measure tasks, since a measurement would run beside the first level. Ours
also, on a server that does: the time from an upload of 1,000 rows until the first answer and until the whole curve,
each in a new task, with the longest answer to requests that come every 5 s meanwhile. And the memory of the first
server over --requests requests of as many clients as the largest level has, as its resident size after each
twentieth.

All sides use the GPU if there is one, and compute in what `manyicl serve` would choose, or in --precision. --shape
serves random weights of that shape with the tokenizer of --model: how fast it answers does not depend on what it
says.

A run of one level and one round takes a few minutes; --join puts the results of several runs together. --out is written
after each level and each twentieth of the requests, so that a run that is ended leaves what it has. --rounds 0 runs no
level. An adapter, such as smollm2-many, is for our side alone (--sides ours).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from manyicl.client import Client
from manyicl.tasks.task import Example, load_tasks

SIDES = ("ours", "transformers", "transformers-batching", "plain")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
NUM_ROWS = 1000
START_S = 300.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What every side is given."""

    model: str
    rows: Sequence[Example]
    """The library: NUM_ROWS rows."""
    inputs: Sequence[str]
    """Other inputs; each is sent once, then they repeat with a number, so that no side sees one twice."""
    num_shots: int
    threads: int
    folder: Path
    precision: str
    """bf16 or fp32."""


@dataclass(frozen=True, slots=True)
class Level:
    """A side at a number of clients in one round."""

    side: str
    clients: int
    answered: int
    under_way: int
    """Requests that were not answered when the time was over."""
    seconds: float
    p50_s: float
    p99_s: float
    is_bound: bool
    """Whether p99 is a lower bound: too few requests were answered."""

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return self.answered / self.seconds


def environment(setting: Setting) -> dict[str, str]:
    """Return the environment of a server: as many threads as it may use, and no network."""
    threads = str(setting.threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Sequence[str], url: str, path: str, setting: Setting) -> Iterator[int]:
    """Run a server until the block ends; give it the process id once `path` answers."""
    log = setting.folder / f"{Path(command[-1]).name}-{time.monotonic_ns()}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment(setting))
        try:
            wait_until_up(process, f"{url}{path}", log)
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"a server ended at its start: {log.read_text(errors='replace')[-2000:]}")
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {START_S:g} s")


# The sides: each gives a function that sends one input ----------------------------------------------------------------

Send = Callable[[httpx2.AsyncClient, str], Any]


@contextmanager
def ours(setting: Setting, *, measures: bool = False) -> Iterator[tuple[str, int]]:
    """Run `manyicl serve`; give its URL and process id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "manyicl", "serve", setting.model, "--port", str(port), "--log-json"]
    command += ["--data", str(setting.folder / f"data-{port}"), "--measure" if measures else "--no-measure"]
    command += ["--precision", setting.precision]
    with running(command, url, "/readyz", setting) as pid:
        yield url, pid


def shots_of(setting: Setting) -> dict[str, Any]:
    return {"policy": "random", "count": setting.num_shots, "seed": 0}


def our_sender(setting: Setting, url: str) -> Send:
    async def send(client: httpx2.AsyncClient, text: str) -> None:
        reply = await client.post(f"{url}/v1/tasks/load/predict", json={"input": text, "shots": shots_of(setting)})
        reply.raise_for_status()

    return send


def prompt_sender(model: str, url: str, write: Callable[[str], str], *, max_tokens: int) -> Send:
    async def send(client: httpx2.AsyncClient, text: str) -> None:
        body = {"model": model, "prompt": write(text), "max_tokens": max_tokens, "temperature": 0}
        reply = await client.post(f"{url}/v1/completions", json=body)
        reply.raise_for_status()
        reply.json()["choices"][0]["text"]

    return send


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def transformers_server(setting: Setting, *, batching: bool) -> Iterator[str]:
    port = free_port()
    path = resolve_model(setting.model)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", path, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", DTYPES[setting.precision]]
    if batching:  # by default its cache takes nine tenths of all memory, but our server runs beside it
        command += ["--continuous-batching", "--cb-max-memory-percent", "0.4" if has_gpu() else "0.1"]
    with running(command, f"http://127.0.0.1:{port}", "/health", setting):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def plain_server(setting: Setting) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, __file__, "--model", setting.model, "--plain-port", str(port)]
    command += ["--precision", setting.precision]
    with running(command, f"http://127.0.0.1:{port}", "/health", setting):
        yield f"http://127.0.0.1:{port}"


def run_plain_server(model: str, port: int, *, precision: str) -> None:
    """Serve `model.generate`, one request after the other."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    device = "cuda" if has_gpu() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, DTYPES[precision])).to(device).eval()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            ids = tokenizer(body["prompt"], return_tensors="pt").to(device)
            with torch.inference_mode():
                full = network.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)
            text = tokenizer.decode(full[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            self.answer({"choices": [{"text": text}]})

        def answer(self, content: Mapping[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Handler)
    server.request_queue_size = 256
    server.socket.listen(256)
    server.serve_forever()


def write_shape(shape: str, tokenizer: Any, folder: Path) -> str:
    """Write random weights of a shape, with a tokenizer, to a folder that plain Hugging Face code loads; return it."""
    import torch
    from measuring import SHAPES, make_model

    config = SHAPES[shape]()
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_model(config, device=device, dtype=torch.bfloat16).save_pretrained(folder / shape)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the servers are other processes, and need the memory
    tokenizer.save_pretrained(folder / shape)
    return str(folder / shape)


def resolve_model(model: str) -> str:
    """Return a folder that plain Hugging Face code loads."""
    from manyicl.models.places import SEED_MODEL

    return str(SEED_MODEL) if model == "seed" else model


# A level -------------------------------------------------------------------------------------------------------------


async def warm_up(send: Send, texts: Iterator[str]) -> None:
    async with httpx2.AsyncClient(timeout=httpx2.Timeout(None)) as client:
        await send(client, next(texts))


async def measure(side: str, send: Send, texts: Iterator[str], *, clients: int, seconds: float) -> Level:
    """Run a closed loop of clients for so long."""
    took: list[float] = []
    under_way = 0

    async def loop(client: httpx2.AsyncClient, until: float) -> None:
        nonlocal under_way
        while time.monotonic() < until:
            began = time.monotonic()
            under_way += 1
            await send(client, next(texts))
            under_way -= 1
            if time.monotonic() <= until:
                took.append(time.monotonic() - began)

    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(timeout=httpx2.Timeout(None), limits=limits) as client:
        started = time.monotonic()
        tasks = [asyncio.create_task(loop(client, started + seconds)) for _ in range(clients)]
        done, left = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()  # a failed request ends the benchmark
        lasted = time.monotonic() - started
        unfinished = under_way
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    return summarize(side, took, clients=clients, under_way=unfinished, seconds=lasted)


def summarize(side: str, took: Sequence[float], *, clients: int, under_way: int, seconds: float) -> Level:
    """Return a level's numbers. A request under way has lasted as long as the level, at the most: p99 is a bound."""
    is_bound = len(took) < max(2 * clients, 2)
    ordered = sorted(took) or [seconds]
    p99 = seconds if is_bound and under_way else ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Level(side, clients, len(took), under_way, seconds, statistics.median(ordered), p99, is_bound)


def number_texts(inputs: Sequence[str]) -> Iterator[str]:
    """Yield inputs for ever, none twice."""
    for turn in itertools.count():
        for text in inputs:
            yield text if turn == 0 else f"{text} ({turn})"


# Ours alone ----------------------------------------------------------------------------------------------------------


def time_upload(setting: Setting, url: str, *, number: int) -> dict[str, float]:
    """Return the seconds from an upload to the first answer and to the whole curve, of a new task.

    meanwhile_s: the longest answer to a request while the curve was made.
    """
    path = setting.folder / f"upload{number}.csv"
    write_rows(path, setting.rows)
    with Client(url) as client:
        began = time.monotonic()
        task = client.add_task(path)
        uploaded = time.monotonic() - began
        [reply] = task.predict(setting.inputs[number % len(setting.inputs)])
        answered, took = time.monotonic() - began, [0.0]
        for text in number_texts(setting.inputs):
            if (curve := task.curve(wait_s=5)).state not in ("waiting", "running"):
                break
            asked = time.monotonic()
            task.predict(text)
            took.append(time.monotonic() - asked)
        whole = time.monotonic() - began
        task.remove()
    if curve.state != "done":
        raise SystemExit(f"the curve was not measured: {curve.state}")
    return {
        "rows": len(setting.rows),
        "shots": len(reply.shots),
        "uploaded_s": round(uploaded, 2),
        "first_answer_s": round(answered, 2),
        "curve_s": round(whole, 2),
        "meanwhile_s": round(max(took), 2),
        "curve": [[point.shots, point.score, point.low, point.high, point.num_scored] for point in curve.curve],
    }


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "answer"])
        writer.writerows([row.input, row.answer] for row in rows)


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def measure_memory(
    send: Send, pid: int, texts: Iterator[str], *, requests: int, clients: int
) -> AsyncIterator[dict[str, float]]:
    """Yield the server's memory before and after each twentieth of so many requests."""
    yield {"requests": 0, "resident_mb": round(resident_mb(pid), 1)}
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(timeout=httpx2.Timeout(None), limits=limits) as client:
        for part in range(1, 21):
            left = itertools.islice(texts, requests // 20)

            async def loop(left: Iterator[str] = left) -> None:
                for text in left:
                    await send(client, text)

            await asyncio.gather(*(loop() for _ in range(clients)))
            yield {"requests": part * (requests // 20), "resident_mb": round(resident_mb(pid), 1)}


# All of it -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path | None, folder: Path) -> tuple[list[Example], list[str]]:
    """Return NUM_ROWS rows for the library and other inputs: of a file, or of a generated task."""
    from manyicl import verbs

    if path is None:
        verbs.write_world(folder / "world", num_tasks=1, num_train=NUM_ROWS + 400, num_test=1, seed=0)
        source = folder / "world"
    else:
        source = folder / "rows"
        source.mkdir()
        (source / path.name).symlink_to(path.resolve())
    task = load_tasks(source)[0]
    rows = [*task.train, *task.validation, *task.test]
    if len(rows) < 2 * 8 or not task.labels:
        raise SystemExit("a file needs a few dozen rows and fixed labels")
    num_rows = min(NUM_ROWS, len(rows) * 3 // 4)
    return rows[:num_rows], [row.input for row in rows[num_rows:]]


def write_example(text: str, answer: str = "") -> str:
    """Return an example as the default template writes it; without an answer, the end of a prompt."""
    return f"Input: {text}\nAnswer:\n" + (f"{answer}\n\n" if answer else "")


def choose_num_shots(tokenizer: Any, rows: Sequence[Example], *, tokens: int) -> int:
    """Return about how many shots have so many tokens."""
    some = rows[:100]
    each = len(tokenizer("".join(write_example(row.input, row.answer) for row in some))["input_ids"]) / len(some)
    return max(1, min(len(rows), round(tokens / each)))


def shown_prompt(setting: Setting, url: str) -> tuple[str, int]:
    """Return the text of the shots that our side shows, and the number of tokens of a whole prompt by its count."""
    with Client(url) as client:
        task = client.add_task([{"input": row.input, "answer": row.answer} for row in setting.rows], name="load")
        body = {"input": setting.inputs[0], "shots": shots_of(setting)}
        reply = client.request("POST", "/v1/tasks/load/predict", json=body)["replies"][0]
        rows = {example.id: example for example in task.examples()}
        instruction = task.info.instruction
    shots = [write_example(rows[i].input, rows[i].answer) for i in reply["shots"]]
    return (f"{instruction}\n\n" if instruction else "") + "".join(shots), int(reply["num_prompt_tokens"])


def describe(levels: Sequence[Level], sides: Sequence[str]) -> list[str]:
    """Return a line per side and number of clients: medians over the rounds, and our throughput against the side's."""
    lines = []
    for clients in sorted({level.clients for level in levels}):
        own = [level.throughput for level in levels if (level.side, level.clients) == ("ours", clients)]
        for side in sides:
            found = [level for level in levels if (level.side, level.clients) == (side, clients)]
            if not found:
                continue
            speed = [level.throughput for level in found]
            line = (
                f"{clients:3} clients  {side:22} {statistics.median(speed):8.3f} requests/s ({min(speed):.3f} to"
                f" {max(speed):.3f}), p50 {statistics.median(level.p50_s for level in found):.3f} s, p99"
                f" {'>= ' if any(level.is_bound for level in found) else ''}"
                f"{statistics.median(level.p99_s for level in found):.3f} s,"
                f" {sum(level.answered for level in found)} answered"
            )
            if side != "ours" and own:
                pairs = [a / b for a, b in zip(own, speed, strict=False) if b]  # a run that was ended has fewer
                line += f"; ours {tell_ratio(own, speed, pairs)}"
            lines.append(line)
    return lines


def tell_ratio(own: Sequence[float], other: Sequence[float], pairs: Sequence[float]) -> str:
    if not pairs or not statistics.median(other):
        return "answers, the other did not finish one request in its time"
    return f"{statistics.median(own) / statistics.median(other):.1f} times ({min(pairs):.1f} to {max(pairs):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="seed, a folder or, for our side alone, an adapter")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="results of --out to put together")
    parser.add_argument("--data", type=Path, help="a file of labelled rows; default: a generated task")
    parser.add_argument("--shape", help="random weights of this shape, such as mistral-7b, with --model's tokenizer")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--shot-tokens", type=int, default=2048)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--peer-seconds", type=float, default=120)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--requests", type=int, default=10_000, help="of the memory test; 0: none")
    parser.add_argument("--uploads", type=int, default=3, help="timed uploads; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain-port", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # the servers end with it
    if chosen.plain_port:
        run_plain_server(chosen.model, chosen.plain_port, precision=chosen.precision)
        return
    if chosen.join:
        result = join([json.loads(path.read_text()) for path in chosen.join])
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(chosen, Path(folder))
    print("\n".join(result["lines"]))
    keep(chosen, result)


def keep(chosen: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write what there is by now, if it is to be kept."""
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


def run(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all levels, the uploads and the memory test; return what was measured."""
    from manyicl.models import ModelSettings, load_tokenizer, resolve_precision

    tokenizer = load_tokenizer(ModelSettings(path=chosen.model))
    rows, inputs = read_rows(chosen.data, folder)
    num_shots = choose_num_shots(tokenizer, rows, tokens=chosen.shot_tokens)
    model = write_shape(chosen.shape, tokenizer, folder) if chosen.shape else chosen.model
    precision = resolve_precision(chosen.precision)
    setting = Setting(model, rows, inputs, num_shots, chosen.threads, folder, precision)
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows)
    result: dict[str, Any] = {"model": chosen.shape or chosen.model, "num_shots": num_shots, "rows": len(rows)}
    result |= {"precision": precision}
    result |= {"uploads": [], "levels": [], "memory": []}
    if chosen.uploads:
        with ours(setting, measures=True) as (url, _):
            for number in range(chosen.uploads):
                result["uploads"].append(time_upload(setting, url, number=number))
                print(f"upload: {result['uploads'][-1]}", flush=True)
    if chosen.rounds or chosen.requests:
        with ours(setting) as (url, pid):
            shots, result["prompt_tokens"] = shown_prompt(setting, url)
            print(
                f"{num_shots} shots, prompts of about {result['prompt_tokens']} tokens, answers of at most {longest}",
                flush=True,
            )
            texts, send = number_texts(inputs), our_sender(setting, url)
            for level in run_levels(chosen, setting, send, texts, shots=shots, longest=longest):
                result["levels"].append(asdict(level))
                print(f"level: {result['levels'][-1]}", flush=True)
                keep(chosen, result)
            if chosen.requests:
                asyncio.run(follow_memory(chosen, result, send, pid, texts))
    return result | {"lines": tell(result)}


async def follow_memory(
    chosen: argparse.Namespace, result: dict[str, Any], send: Send, pid: int, texts: Iterator[str]
) -> None:
    """Run the memory test; keep each number as it comes."""
    clients = max(map(int, chosen.clients.split(",")))
    async for row in measure_memory(send, pid, texts, requests=chosen.requests, clients=clients):
        result["memory"].append(row)
        print(f"memory: {row}", flush=True)
        keep(chosen, result)


def run_levels(
    chosen: argparse.Namespace, setting: Setting, send_ours: Send, texts: Iterator[str], *, shots: str, longest: int
) -> Iterator[Level]:
    """Run each side at each number of clients in each round."""

    @contextmanager
    def sender(side: str) -> Iterator[Send]:
        if side == "ours":
            yield send_ours
            return
        is_plain, batching = side == "plain", side.endswith("batching")
        model = resolve_model(setting.model)
        with plain_server(setting) if is_plain else transformers_server(setting, batching=batching) as its_url:
            yield prompt_sender(model, its_url, lambda text: shots + write_example(text), max_tokens=longest)

    for _, side in itertools.product(range(chosen.rounds), chosen.sides.split(",")):
        seconds = chosen.seconds if side == "ours" else chosen.peer_seconds
        with sender(side) as send:
            for clients in sorted(map(int, chosen.clients.split(","))):
                asyncio.run(warm_up(send, texts))
                yield asyncio.run(measure(side, send, texts, clients=clients, seconds=seconds))


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of several runs as those of one."""
    joined = dict(results[0])
    for key in ("uploads", "levels", "memory"):
        joined[key] = [row for result in results for row in result[key]]
    return joined | {"lines": tell(joined)}


def tell(result: Mapping[str, Any]) -> list[str]:
    """Return what was measured, line by line."""
    levels = [Level(**level) for level in result["levels"]]
    lines = describe(levels, list(dict.fromkeys(level.side for level in levels)))
    lines += [f"upload: {row}" for row in result["uploads"]]
    return lines + [f"memory: {row}" for row in result["memory"]]


if __name__ == "__main__":
    main()
