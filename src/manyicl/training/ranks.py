"""Several processes: launches that would go wrong, packs joined and handed out, and what the ranks agree on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

from manyicl.episodes import PackDataset
from manyicl.errors import UserError
from manyicl.models import ModelShape, count_flops, inner_model, load_config
from manyicl.training.memory.choice import GpuShare, PacksChoice, free_memory, resolve_packs
from manyicl.training.memory.optimizers import OPTIMIZERS, Optim
from manyicl.training.preparation import Prepared, count_step_flops, find_shape, largest_row
from manyicl.training.recipe import TrainSettings
from manyicl.training.recompute.layers import Recompute

# Why so many packs are joined where the recipe fixes their number.
FIXED = "as train.packs_per_batch says"


def uses_fsdp(environment: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` shards this process's model."""
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_launch(environment: Mapping[str, str], *, optim: Optim) -> None:
    """Refuse what `accelerate launch` may have set up that would go wrong here without a word, or late.

    environment: the process's variables, in which accelerate tells its settings. optim: the recipe's optimizer.

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
    if uses_fsdp(environment):
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
        if OPTIMIZERS[optim].needs_bitsandbytes:
            raise UserError(
                f"train.optim = '{optim}': bitsandbytes cannot shard its states as FSDP2 shards the weights; set it to"
                " 'adamw_torch_fused' or 'adafactor'"
            )


def end_prefetch_at_first_unit(model: nn.Module) -> None:
    """Stop FSDP2 from prefetching another unit during the first unit's backward pass.

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


def refuse_data_parallel(num_gpus: int, *, num_ranks: int, command: Iterable[str]) -> None:
    """Refuse to start on several GPUs without a launcher: nn.DataParallel would split a one-row batch.

    Raises:
        UserError: with the command to use instead.
    """
    if num_gpus > 1 and num_ranks == 1:
        raise UserError(
            f"{num_gpus} GPUs and one process: start it as"
            f" `accelerate launch --num_processes {num_gpus} -m {shlex.join(command)}`,"
            " or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def find_unshared(train: TrainSettings, *, num_ranks: int) -> str:
    """Return why the packs of a step cannot be shared by so many ranks, with the fix; '' if they can."""
    together = 1 if train.packs_per_batch == "auto" else train.packs_per_batch
    if train.packs_per_step % (together * num_ranks) == 0:
        return ""
    joined = f" with train.packs_per_batch = {together}" if together > 1 else ""
    return (
        f"train.packs_per_step = {train.packs_per_step}: cannot be shared by {num_ranks} ranks{joined}; make it a"
        f" multiple of {together * num_ranks}"
    )


def balance_steps(packs: PackDataset, *, shape: ModelShape | None, num_ranks: int, packs_per_batch: int) -> list[int]:
    """Return the order in which packs are handed out, so that no rank waits long for another.

    The step's packs, divisors and so its gradient stay what they are. shape: None if it is not known; then the cost of
    a pack is taken to be the sum of the squares of its episodes' lengths.
    """
    lengths = [[episode.num_tokens for episode in pack.episodes] for pack in packs.packs]
    if shape is None:
        costs = [sum(n * n for n in row) for row in lengths]
    else:
        costs = [count_flops(shape, row, num_targets=0) for row in lengths]
    return [
        start + place
        for start in range(0, len(costs), packs.packs_per_step)
        for place in balance_packs(
            costs[start : start + packs.packs_per_step], num_ranks=num_ranks, packs_per_batch=packs_per_batch
        )
    ]


def balance_packs(costs: Sequence[float], *, num_ranks: int, packs_per_batch: int) -> list[int]:
    """Return the order in which the packs of one optimizer step are handed out, so that all ranks have alike to do.

    Batches go to the ranks in turn, so places m * num_ranks * packs_per_batch + r * packs_per_batch + i are those of
    rank r. The dearest pack goes to the rank that has least so far (longest processing time first), each rank having as
    many packs as the others. A single rank keeps the plan's order.

    >>> balance_packs([1, 9, 8, 2], num_ranks=2, packs_per_batch=1)  # rank 0: 9 and 1, rank 1: 8 and 2
    [1, 2, 0, 3]
    """
    if num_ranks == 1:
        return list(range(len(costs)))
    size = len(costs) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    spent = [0.0] * num_ranks
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < size), key=lambda r: (spent[r], r))
        ranks[rank].append(pack)
        spent[rank] += costs[pack]
    return [
        pack
        for start in range(0, size, packs_per_batch)
        for packs in ranks
        for pack in packs[start : start + packs_per_batch]
    ]


def agree_on(chosen: Recompute, *, accelerator: Accelerator) -> Recompute:
    """Return what saves most memory of what the ranks chose, whose free memory may differ."""
    savings = [chosen.num_layers, not chosen.keep_attention, chosen.offload, chosen.tiles]
    most = accelerator.gather(torch.tensor([savings], device=accelerator.device)).amax(dim=0).tolist()
    return Recompute(most[0], keep_attention=not most[1], offload=bool(most[2]), tiles=bool(most[3]))


def share_packs(
    prepared: Prepared, *, device: torch.device, fault: str, known: PacksChoice | None, gpu_share: GpuShare
) -> PacksChoice:
    """Return how many packs go through a rank at once, the same on all ranks.

    fault: why episodes go through the model one at a time, if they do. known: what the run that is resumed has joined,
    which it goes on with, if so many still share out among the ranks.
    """
    config, num_ranks = prepared.config, PartialState().num_processes
    if config.train.packs_per_batch != "auto":
        return PacksChoice(config.train.packs_per_batch, FIXED)
    if known is not None and config.train.packs_per_step % (known.number * num_ranks) == 0:
        return known
    mine = _choose_packs(prepared, device=device, fault=fault, gpu_share=gpu_share)
    # Ranks may differ in their free memory, and in what the trial of their model found.
    least: PacksChoice = min(gather_object([mine]), key=lambda choice: choice.number)
    return least


def _choose_packs(prepared: Prepared, *, device: torch.device, fault: str, gpu_share: GpuShare) -> PacksChoice:
    """Return how many packs would go through this rank at once, if it were for it alone to say."""
    if fault:
        return PacksChoice(1, "each episode goes through the model alone")
    config, num_ranks = prepared.config, PartialState().num_processes
    packs, shape = prepared.packs, find_shape(config)
    return resolve_packs(
        config,
        model_config=load_config(config.model),
        pack_flops=sum(count_step_flops(packs, shape)) / len(packs) if shape is not None else None,
        row_of=lambda resolved: largest_row(packs, config=resolved),
        free_bytes=free_memory(device) if device.type == "cuda" else None,
        num_ranks=num_ranks,
        num_shards=num_ranks if uses_fsdp(os.environ) else 1,
        gpu_share=gpu_share,
    )
