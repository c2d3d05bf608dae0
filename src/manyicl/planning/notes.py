"""Which settings of a recipe hardly go together: sentences that stop nothing, each with its fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from manyicl.training import RunConfig, TrainSettings

# Episodes a step below which most steps have one task.
FEW_EPISODES = 2


def note_settings(config: RunConfig, model_config: PretrainedConfig, episodes: Sequence[int]) -> Iterable[str]:
    """Yield which settings hardly go together.

    model_config: says how many features a layer has.
    episodes: how many each task has in the run.
    """
    train, lora = config.train, config.model.lora
    num_features = getattr(model_config.get_text_config(), "hidden_size", None)
    if warmup := note_warmup(train):
        yield warmup
    if len(episodes) > 1 and sum(episodes) < FEW_EPISODES * train.num_steps:
        a_step = f"{sum(episodes) / train.num_steps:.1f} episodes"
        yield (
            f"train.packs_per_step = {train.packs_per_step:,}: a step has {a_step}, so most have one task; 4 or more"
            " would mix tasks and take no more memory"
        )
    if lora is not None and num_features is not None and lora.rank >= num_features:
        yield (
            f"model.lora.rank = {lora.rank:,}: the model's layers have {num_features:,} features, so its adapters are"
            " larger than what they adapt; 8 to 64 is usual"
        )


def note_warmup(train: TrainSettings) -> str:
    """Return that a warm-up is longer than its run; "" if it is not."""
    if train.warmup_steps < train.num_steps:
        return ""
    return (
        f"train.warmup_steps = {train.warmup_steps:,}: the learning rate is still rising when the run ends, at step"
        f" {train.num_steps:,}"
    )
