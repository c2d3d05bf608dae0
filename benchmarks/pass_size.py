"""How large may a pass of the service be: inputs per second of a big request, and the wait of a question behind it.

    OMP_NUM_THREADS=1 python benchmarks/pass_size.py [MODEL] [--sizes auto,512,1024,2048,8192] [--rounds 3]
                                                     [--inputs 12] [--tokens 300] [--kind choices|texts]
                                                     [--rows 12]

One process with one model. Each round opens a service for each size (`max_batch_tokens`; auto is the default), sends it
one request with many inputs, and while its first pass is at work a question to another task, which has the next turn.
--kind choices: inputs of about --tokens tokens each, whose labels are scored; texts: short ones, whose answers are
generated until they have --tokens tokens. The task of the request has --rows rows, of which as many are shown as fit;
that of the question has few. Both are encoded before.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from manyicl.inference import AnswerSettings, InferenceModel, load_for_inference
from manyicl.service import ServiceSettings, open_service

SENTENCE = "The bill for the front wheel is higher than you told me on the phone."
LABELS = ("repair", "sale")


def write_rows(number: int, *, is_open: bool) -> list[dict[str, str]]:
    """Return so many rows, whose answers are labels or, if `is_open`, all different."""
    answers = [f"answer {place}" if is_open else LABELS[place % 2] for place in range(number)]
    return [{"input": f"Question {place}", "answer": answer} for place, answer in enumerate(answers)]


def write_inputs(model: InferenceModel, *, number: int, num_tokens: int) -> list[str]:
    """Return texts of about so many tokens, no two alike."""
    each = len(model.tokenizer.tokenizer(SENTENCE, verbose=False)["input_ids"])
    return [f"{place} {' '.join([SENTENCE] * max(1, num_tokens // each))}" for place in range(number)]


def measure(model: InferenceModel, size: int | None, args: argparse.Namespace) -> tuple[float, float, int]:
    """Return the seconds of the request and of the question that came behind it, and the number of the former's passes.

    size: `max_batch_tokens`; None: the default.
    """
    settings = ServiceSettings(measure=False) if size is None else ServiceSettings(measure=False, max_batch_tokens=size)
    is_open = args.kind == "texts"
    how = AnswerSettings(max_new_tokens=args.tokens, temperature=2.0) if is_open else None
    inputs = write_inputs(model, number=args.inputs, num_tokens=0 if is_open else args.tokens)
    with open_service(model, settings=settings) as service:
        rows = write_rows(args.rows, is_open=is_open)
        big = service.add_task(rows, name="big", settings={"family": "qa"} if is_open else None)
        small = service.add_task(write_rows(12, is_open=False), name="small")
        for task in (big, small):
            task.predict("Question 12")
        before = service.stats().num_passes
        began = time.perf_counter()
        ticket = big.submit(inputs, answering=how)
        time.sleep(0.05)  # the worker is idle: it has begun by now
        asked = time.perf_counter()
        small.predict("Question 13")
        wait = time.perf_counter() - asked
        ticket.future.result()
        seconds = time.perf_counter() - began
        return seconds, wait, service.stats().num_passes - before - 1


def main() -> None:
    """Run the rounds and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-many")
    parser.add_argument("--sizes", default="auto,512,1024,2048,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--kind", choices=("choices", "texts"), default="choices")
    args = parser.parse_args()
    model = load_for_inference(args.model)
    sizes = args.sizes.split(",")
    rates: dict[str, list[float]] = {size: [] for size in sizes}
    waits: dict[str, list[float]] = {size: [] for size in sizes}
    for round_ in range(args.rounds):
        for size in sizes[round_ % len(sizes) :] + sizes[: round_ % len(sizes)]:
            seconds, wait, passes = measure(model, None if size == "auto" else int(size), args)
            rates[size].append(args.inputs / seconds)
            waits[size].append(wait)
            print(f"round {round_ + 1}, {size}: {passes} passes, {seconds:.1f} s, wait {wait:.1f} s", flush=True)
    for size in sizes:
        print(
            f"{size}: {median(rates[size]):.2f} inputs a second [{min(rates[size]):.2f}, {max(rates[size]):.2f}],"
            f" wait {median(waits[size]):.1f} s [{min(waits[size]):.1f}, {max(waits[size]):.1f}]"
        )


if __name__ == "__main__":
    main()
