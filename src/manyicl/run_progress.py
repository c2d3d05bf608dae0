"""The Trainer's steps on a progress bar, with the last loss and rate beside it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from manyicl.progress import Bar


class BarCallback(TrainerCallback):
    """Moves a bar with the Trainer's steps and shows the last loss and rate beside it."""

    def __init__(self, bar: Bar, what: str) -> None:
        self.bar, self.what, self.note = bar, what, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Move the bar, but for the last step, whose loss comes behind it."""
        if state.global_step < self.bar.total:
            self.bar.update(self.what, state.global_step, note=self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show the last step with its own loss."""
        self.bar.update(self.what, state.global_step, note=self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Remember what to show."""
        if logs and "tokens_per_s" in logs:
            self.note = (
                f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:,.0f} tokens/s, {logs['answers_per_s']:,.0f} answers/s"
            )
            if "mfu" in logs:
                self.note += f", MFU {100 * logs['mfu']:.0f} %"
