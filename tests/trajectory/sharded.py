"""One of two processes: a model sharded by FSDP2 on a CPU mesh has the loss and gradients of the whole one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loading import load_model
from manyicl.models.loss import answer_loss, target_logits
from manyicl.models.structure import decoder_layers
from manyicl.training.preparation import prepare_run
from manyicl.training.recipe import RunConfig, load_recipe
from manyicl.training.recompute import tiles
from manyicl.training.recompute.layers import Recompute, prepared_layers
from tests.trajectory.setting import end_process


def gradients_of(model, batch, *, recompute, scale=1.0):
    """Return the row's loss and the whole gradients of what is trained, by name."""
    model.train()
    with segment_attention(model), prepared_layers(model, recompute, compiled=False):
        loss = answer_loss(target_logits(model, batch), batch).loss * scale
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()
    }


def build(config):
    torch.manual_seed(0)
    model = load_model(config.model, trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide lora_A's gradient
                parameter.normal_(0, 0.1)
    return model


def main() -> None:
    torch.set_num_threads(1)
    config: RunConfig = load_recipe(Path(sys.argv[1]))
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    prepared = prepare_run(config)
    packs, divisors = prepared.packs.packs[:4], prepared.packs.divisors[0]
    maker = prepared.packs.maker
    batch = maker.make_batch(packs, divisors=divisors)
    whole_loss, expected = gradients_of(build(config), batch, recompute=Recompute(0))
    num_layers = len(decoder_layers(build(config)))
    tiles.TILE_TOKENS = 16
    whole = Recompute(num_layers, keep_attention=False)
    for recompute in (Recompute(0), whole, replace(whole, offload=True), replace(whole, offload=True, tiles=True)):
        model = build(config)
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert any(p.to_local().numel() < p.numel() for p in model.parameters())
        # Gradients are averaged over ranks, so each one's share counts as often as there are ranks.
        mine = maker.make_batch(packs[rank::ranks], divisors=divisors)
        loss, grads = gradients_of(model, mine, recompute=recompute, scale=float(ranks))
        total = torch.tensor(loss / ranks)
        dist.all_reduce(total)
        torch.testing.assert_close(float(total), whole_loss, rtol=1e-5, atol=0)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert float(expected[name].norm()) > 0, name
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    if rank == 0:
        print(f"{len(expected)} gradients of {sum(g.numel() for g in expected.values())} weights agree", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    end_process()


if __name__ == "__main__":
    main()
