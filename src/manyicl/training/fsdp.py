"""What `accelerate launch` may have set up, and what of it would go wrong here: refused, or put right."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule

from manyicl.errors import UserError
from manyicl.models import inner_model


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


def end_prefetch_at_first_unit(model: nn.Module) -> None:
    """Let the first of FSDP2's units that has a backward pass have no other one gathered ahead in it.

    Each unit has the one gathered that ran before it in the forward pass, whose turn in the backward pass comes next.
    Before the first come frozen weights (below an adapter) or the last unit of a validation row, whose turn never
    comes. Nobody then waits for that gather as long as its memory is in use (torch 2.11 to 2.13 wait on one stream
    only), and the next micro-batch reads weights that are half overwritten. A model without units is left as it is.

    model: as accelerate has prepared it.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    for unit in model.modules():
        if unit is model or not isinstance(unit, FSDPModule):
            continue
        # An embedding tied to the head is one unit with it, whose backward pass comes first of all.
        is_tied = head is not None and getattr(unit, "weight", None) is head.weight
        if not is_tied and any(p.requires_grad for p in unit.parameters()):
            unit.set_modules_to_backward_prefetch([unit])  # it is gathered already
            return
