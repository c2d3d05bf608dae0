"""What `accelerate launch` may have set up, and what of it would go wrong here."""

from __future__ import annotations

from collections.abc import Mapping

from manyicl.errors import UserError


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` may have set up that would go wrong here without a word, or late.

    environment: the process's variables, in which accelerate tells its settings.

    Raises:
        UserError: naming the setting of accelerate's config file, and the fix.
    """

    def is_on(name: str) -> bool:
        return environment.get(name, "false").lower() == "true"

    if is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for kind, what in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
            size = int(environment.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE") or 1)
            if size > 1:
                raise UserError(
                    f"parallelism_config_{kind}_size = {size}: {what} parallelism is not supported, a pack goes whole"
                    " through a rank; set it to 1, and shard weights with recipes/accelerate/fsdp2.yaml instead"
                )
    if is_on("ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_version = 1: is not supported; use recipes/accelerate/fsdp2.yaml, or set it to 2")
        if is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise UserError(
                "fsdp_cpu_ram_efficient_loading = true: only one rank would have the weights; use"
                " recipes/accelerate/fsdp2.yaml, or set it to false"
            )
        kind = environment.get("FSDP_STATE_DICT_TYPE", "")
        if kind != "FULL_STATE_DICT":
            raise UserError(
                f"fsdp_state_dict_type = {kind or 'unset'}: checkpoints would hold no model that can be loaded; use"
                " recipes/accelerate/fsdp2.yaml, or set it to FULL_STATE_DICT"
            )


def launch_warning(environment: Mapping[str, str]) -> str:
    """Return what a user must know of a launch that is let through; "" where there is nothing."""
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return ""
    return (
        "warning: under FSDP2 a LoRA run on two GPUs was not the run of one from its second step on"
        " (docs/distributed.md); take recipes/accelerate/ddp.yaml where the model fits a GPU"
    )
