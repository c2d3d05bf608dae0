"""Full fine-tuning of a 135M-parameter model: tokens per second by the number of episodes in a row.

    python benchmarks/packed_rows.py [--tokens 4096] [--repeats 12] [--json OUT]

The shape is SmolLM2-135M's with float32 weights; products are in bfloat16 by autocast on a device that multiplies it in
hardware. A step is forward and backward of one row by `manyicl.models.row_loss`. Rows of 1, 8 and 100 episodes take
turns; the share is each row's tokens per second over those of the row with one episode, with the spread over the turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from measuring import SHAPES, make_episodes, make_model, make_row, spread, time_in_turn

from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import row_loss

EPISODES = (1, 8, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SHAPES[options.shape]()
    model = make_model(config, device=device, dtype=torch.float32)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step(episodes: int) -> None:
        with segment_attention(model, row_tokens=options.tokens):
            with autocast:
                loss = row_loss(model, rows[episodes]).loss
            loss.backward()
        model.zero_grad(set_to_none=True)

    rows = {
        number: make_row(
            make_episodes(
                options.tokens,
                episode_tokens=-(-options.tokens // number),
                target_share=0.1,
                vocab_size=config.vocab_size,
            )
        ).to(device)
        for number in EPISODES
    }
    sides = {str(number): lambda number=number: step(number) for number in EPISODES}
    seconds = time_in_turn(sides, repeats=options.repeats, device=device, warmups=3)
    result = {}
    for name, times in seconds.items():
        shares = [whole / time for whole, time in zip(seconds["1"], times, strict=True)]
        result[name] = {"tokens_per_s": spread([options.tokens / time for time in times]), "share": spread(shares)}
        rate, share = result[name]["tokens_per_s"], result[name]["share"]
        print(
            f"{name:>4} episodes: {rate['median']:,.0f} tokens/s [{rate['min']:,.0f}, {rate['max']:,.0f}],"
            f" {share['median']:.2f} [{share['min']:.2f}, {share['max']:.2f}] of the filled row's",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", **result})
        )


if __name__ == "__main__":
    main()
