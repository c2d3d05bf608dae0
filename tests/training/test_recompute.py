"""Layers in training: which are recomputed, what they keep, and that none of it changes a gradient."""

from __future__ import annotations

import gc
import shutil
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from manyicl.episodes.batch import pad_row
from manyicl.errors import UserError
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.loss import row_loss
from manyicl.models.structure import decoder_layers
from manyicl.training.memory.storage_meter import meter_step
from manyicl.training.recompute import host_store, tiles
from manyicl.training.recompute import layers as recompute
from manyicl.training.recompute.host_store import HostStore
from manyicl.training.recompute.layers import (
    Recompute,
    cast_bytes,
    measure_kept,
    prepared_layers,
    spread,
    unwidened_inputs,
)
from tests.conftest import CONFIGS, assert_same_gradients, tiny_model
from tests.parity.test_loss_parity import EPISODE, random_episode, row


def gradients_with(model, checkpointed: Recompute, *, compiled: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Return all gradients of a row, and how often each layer ran forward."""
    model.train().zero_grad()
    runs = [0] * len(decoder_layers(model))
    inside = [layer.self_attn for layer in decoder_layers(model)]
    handles = [
        part.register_forward_pre_hook(lambda *_, n=n: runs.__setitem__(n, runs[n] + 1))
        for n, part in enumerate(inside)
    ]
    with segment_attention(model), prepared_layers(model, checkpointed, compiled=compiled):
        row_loss(model, row([random_episode(EPISODE, seed=s) for s in (1, 2)])).loss.backward()
    for handle in handles:
        handle.remove()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), runs


@pytest.mark.slow
@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_recomputed_layers_run_twice_and_change_no_gradient(name, keep_attention):
    model = tiny_model(name)
    plain, once = gradients_with(model, Recompute(0))
    some, twice = gradients_with(model, Recompute(1, keep_attention))
    assert (once, twice) == ([1, 1, 1], [1, 2, 1])
    assert_same_gradients(some, plain)
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma", "gemma2", "qwen3"])
def test_inputs_that_wait_in_the_hosts_memory_change_no_gradient(name):
    model = tiny_model(name)
    plain, _ = gradients_with(model, Recompute(0))
    some, twice = gradients_with(model, Recompute(3, keep_attention=False, offload=True))
    assert twice == [2, 2, 2]
    assert_same_gradients(some, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma", "qwen3"])
def test_feed_forward_parts_in_tiles_change_no_gradient(name, compiled, monkeypatch):
    """A row of 76 tokens in tiles of 16, each of which runs forward twice as a recomputed layer does, not thrice."""
    monkeypatch.setattr(tiles, "TILE_TOKENS", 16)
    model, rows = tiny_model(name), []
    plain, _ = gradients_with(model, Recompute(0))
    gate = decoder_layers(model)[1].mlp.gate_proj
    handle = gate.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    some, twice = gradients_with(model, Recompute(3, keep_attention=False, tiles=True), compiled=compiled)
    handle.remove()
    assert twice == [2, 2, 2]
    assert_same_gradients(some, plain)
    if not compiled:  # no hook is called there more than once
        assert rows == [16, 16, 16, 16, 12] * 2


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_tiles_drop_the_same_features_forward_and_backward(autocast, monkeypatch):
    """Beside tiles that autograd runs by itself, which draw the same random numbers in the same order."""
    monkeypatch.setattr(tiles, "TILE_TOKENS", 16)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config).train()

    def gradients(recompute):
        model.zero_grad()
        torch.manual_seed(1)
        with segment_attention(model), prepared_layers(model, recompute, compiled=False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = row_loss(model, row([random_episode(EPISODE, seed=s) for s in (1, 2)])).loss
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    in_tiles = gradients(Recompute(3, keep_attention=False, tiles=True))
    for layer in decoder_layers(model):
        forward = layer.mlp.forward
        monkeypatch.setattr(
            layer.mlp, "forward", lambda x, run=forward: torch.cat([run(tile) for tile in x.split(16, dim=1)], dim=1)
        )
    plain = gradients(Recompute(0))
    if autocast:  # products of other shapes are rounded otherwise
        assert (in_tiles - plain).norm() < 0.01 * plain.norm()
    else:
        assert_same_gradients(in_tiles, plain)


def test_a_graph_that_is_kept_goes_backward_twice_through_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 16)
    model = tiny_model("llama").train()
    with segment_attention(model), prepared_layers(model, Recompute(3, False, tiles=True), compiled=False):
        loss = row_loss(model, row([random_episode(EPISODE, seed=1)])).loss
        found = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=keep) for keep in (True, False)]
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_a_layer_that_does_more_with_its_feed_forward_part_is_not_run_in_tiles():
    fault = tiles.tiles_fault(decoder_layers(tiny_model("gemma2")))
    assert fault.startswith("Gemma2DecoderLayer is not known to add")
    assert tiles.tiles_fault(decoder_layers(tiny_model("llama"))) == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_inputs_of_compiled_layers_wait_in_the_hosts_memory_too(monkeypatch):
    sent, send = [], HostStore._send
    monkeypatch.setattr(HostStore, "_send", lambda store, number, x: (sent.append(number), send(store, number, x)))
    model = tiny_model("llama")
    plain, _ = gradients_with(model, Recompute(0))
    some, _ = gradients_with(model, Recompute(2, keep_attention=False, offload=True), compiled=True)
    assert sent == [0, 2]
    assert_same_gradients(some, plain)


def test_rows_of_other_lengths_share_the_hosts_memory_and_one_that_came_to_no_end_leaves_nothing():
    model = tiny_model("llama").train()
    short, long = (row([random_episode(EPISODE, seed=s) for s in range(n)]) for n in (1, 3))
    found = {}
    for offload in (False, True):
        model.zero_grad()
        with (
            segment_attention(model),
            prepared_layers(model, Recompute(3, keep_attention=False, offload=offload), compiled=False),
        ):
            for batch in (long, short, long):
                row_loss(model, batch).loss.backward()
            row_loss(model, short)  # goes forward only
            row_loss(model, long).loss.backward()
        found[offload] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(found[True], found[False])


def test_only_two_inputs_are_on_the_device_at_once():
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 8
    model, batch = LlamaForCausalLM(config).train(), row([random_episode(EPISODE, seed=1)])
    peaks = {}
    for offload in (False, True):
        with (
            segment_attention(model),
            prepared_layers(model, Recompute(8, keep_attention=False, offload=offload), compiled=False),
        ):
            peaks[offload] = meter_step(model, batch, autocast=False)
    one_input = batch.num_tokens * model.config.hidden_size * 4
    # Six of eight inputs are away; here the host's memory, which holds all eight, is counted as well.
    assert [b - a for a, b in zip(peaks[False], peaks[True], strict=True)] == [2 * one_input, 2 * one_input]


def test_inputs_that_the_host_cannot_hold_are_refused_before_it_ends_the_process(monkeypatch):
    hidden = torch.zeros(1, 300, 1, requires_grad=True)
    store = HostStore(torch.device("cpu"), layers=[0, 1, 2])
    for free, told in (
        (3 * 2048, ""),
        (3 * 2048 - 1, r"^train\.recompute: the inputs of 3 layers need 0\.0 GiB of the"),
    ):
        monkeypatch.setattr(host_store, "free_host_memory", lambda free=free: free)
        store.buffers.clear()
        with pytest.raises(UserError, match=told) if told else nullcontext(), store.keeping(0, hidden):
            (hidden * hidden).sum()  # 1,200 bytes, of which torch would pin 2,048
        assert len(store.buffers) == (0 if told else 1)


class LateStore(HostStore):
    """Copies as late as a stream of copies may: in order, when the computation waits for one of them.

    What has been given up by then is other memory by now: not a number.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.waiting, self.num_done = [], 0

    def _copy(self, source, target):
        to_host = any(target.data_ptr() == buffer.data_ptr() for buffer in self.buffers.values())
        self.waiting.append((weakref.ref(source) if to_host else lambda: source, target))
        return self.num_done + len(self.waiting)

    def _wait(self, copied):
        while self.num_done < copied:
            source, target = self.waiting.pop(0)
            target.copy_(torch.tensor(torch.nan) if source() is None else source())
            self.num_done += 1


def test_no_input_is_used_or_given_up_before_its_copy_has_ended(monkeypatch):
    """What a GPU's streams may do is played through: all copies at once in the tests above, all late here."""
    monkeypatch.setattr(recompute, "HostStore", LateStore)
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 6
    model = LlamaForCausalLM(config).train()
    rows = [row([random_episode(EPISODE, seed=s) for s in range(n)]) for n in (3, 1, 2)]
    found = []
    for offload in (False, True):
        model.zero_grad()
        with (
            segment_attention(model),
            prepared_layers(model, Recompute(5, keep_attention=False, offload=offload), compiled=False),
        ):
            for batch in rows:
                row_loss(model, batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
@pytest.mark.parametrize(("name", "num_segments"), [("llama", 2), ("gemma2", 1), ("mistral-sliding", 2)])
def test_layers_whose_attention_is_not_compiled_are_compiled_around_it_also_where_recomputed(name, num_segments):
    model = tiny_model(name).train()
    batch = row([random_episode(EPISODE, seed=s) for s in range(num_segments)])
    gradients, frames = [], []
    settings = (Recompute(0), Recompute(0), Recompute(3), Recompute(3, keep_attention=False))
    for checkpointed, compiled in zip(settings, (False, True, True, True), strict=True):
        counted = CompileCounterWithBackend("aot_eager")
        model.zero_grad()
        prepared = prepared_layers(model, checkpointed, compiled=compiled, backend=counted)
        with segment_attention(model), prepared:
            row_loss(model, batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        frames.append(counted.frame_count)
    assert frames[0] == 0
    assert frames[1] == frames[2] == frames[3] > 0
    for compiled_gradients in gradients[1:]:
        assert_same_gradients(compiled_gradients, gradients[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_compiled_layers_do_not_attend_again_either():
    counts = {"forward": 0, "backward": 0}

    def compiler(side):
        def count(module, inputs):
            del inputs
            names = [str(node.target) for node in module.graph.nodes]
            counts[side] += sum("attention" in name and "backward" not in name for name in names)
            return make_boxed_func(module.forward)

        return count

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = tiny_model("llama").train()
    with segment_attention(model), prepared_layers(model, Recompute(3), compiled=True, backend=backend):
        row_loss(model, row([random_episode(EPISODE, seed=1)])).loss.backward()
    assert counts == {"forward": 1, "backward": 0}  # one graph of each serves the three layers


@pytest.mark.slow
def test_what_is_dropped_in_attention_and_in_adapters_is_dropped_again_when_recomputed(monkeypatch):
    # A CUDA kernel draws what it drops: kept, it would not draw again, and an adapter behind it would draw otherwise.
    monkeypatch.setattr(recompute, "_attention_kept", lambda: pytest.fail("attention was kept"))
    gradients = []
    for checkpointed in (0, 3):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.3)
        model = tiny_model("llama")
        for layer in decoder_layers(model):
            layer.self_attn.attention_dropout = 0.3
        model.config.attention_dropout = 0.3
        adapted = get_peft_model(model, config).train()
        torch.manual_seed(2)
        with segment_attention(adapted), prepared_layers(adapted, Recompute(checkpointed), compiled=False):
            row_loss(adapted, row([random_episode(EPISODE, seed=1)])).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None]))
    assert_same_gradients(*gradients)


def test_a_block_leaves_the_forward_that_a_layer_had_before():
    model = tiny_model("llama")
    with prepared_layers(model, Recompute(1), compiled=False):
        own = [vars(layer).get("forward") for layer in decoder_layers(model)]
        measure_kept(model)
        assert [vars(layer).get("forward") for layer in decoder_layers(model)] == own
        assert [forward is not None for forward in own] == [False, True, False]


class _Attentions(TorchDispatchMode):
    """Counts the attention kernels that run forward."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_segments", [1, 2])
@pytest.mark.parametrize(("keep_attention", "times"), [(True, 1), (False, 2)])
def test_recomputed_layers_attend_again_only_if_they_are_recomputed_in_full(num_segments, keep_attention, times):
    model = tiny_model("llama").train()
    batch = row([random_episode(EPISODE, seed=s) for s in range(num_segments)])
    prepared = prepared_layers(model, Recompute(3, keep_attention), compiled=False)
    with segment_attention(model), prepared, _Attentions() as counted:
        row_loss(model, batch).loss.backward()
    assert counted.count == 3 * num_segments * times


def test_autocast_copies_the_matrices_of_layers():
    model = tiny_model("llama")
    # Three layers of square, narrow and wide matrices; norms are not cast.
    assert cast_bytes(model) == 3 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert cast_bytes(model.to(torch.bfloat16)) == 0


def test_places_are_evenly_spread():
    assert sorted(spread(32, among=32)) == list(range(32))
    assert sorted(spread(1, among=32)) == [16]
    assert sorted(spread(8, among=32)) == [2, 6, 10, 14, 18, 22, 26, 30]


def test_activations_are_what_one_layer_keeps_for_a_token():
    model = tiny_model("llama")
    layer_bytes = measure_kept(model)
    # Counted by hand, in floats a token: two norms keep their input, its scale and their output (32 + 1 + 32 each);
    # attention its rotated queries (32), keys (16), values (16), output (32) and a sum
    # for each of 4 heads; the feed-forward its gate, activation, up (64 each) and their product (64).
    by_hand = 4 * (2 * (32 + 1 + 32) + 32 + 16 + 16 + 32 + 4 + 4 * 64)
    assert by_hand * 0.7 < layer_bytes < by_hand * 1.3
    assert not model.training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_each_of_many_runs_in_one_process_is_compiled(monkeypatch):
    counted = CompileCounterWithBackend("eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, **{**options, "backend": counted}))
    monkeypatch.setattr(recompute, "MOST_VARIANTS", 2)
    model = tiny_model("llama").train()
    for number in range(4):
        batch = pad_row(row([random_episode(EPISODE, seed=1)]), multiple=64 + 8 * number)
        with segment_attention(model), prepared_layers(model, Recompute(0), compiled=True):
            row_loss(model, batch).loss.backward()
        assert counted.frame_count == number + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_compiled_layers_keep_less():
    torch._dynamo.reset()
    model = tiny_model("llama")
    plain, compiled = (measure_kept(model, compiled=c) for c in (False, True))
    assert 0.5 * plain < compiled < 0.95 * plain
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
def test_what_compiled_layers_keep_is_what_inductor_keeps(monkeypatch):
    model = tiny_model("llama")
    measured = measure_kept(model, compiled=True)
    monkeypatch.setattr(recompute, "PARTITION_ONLY", "inductor")
    assert measure_kept(model, compiled=True) == measured


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own looking
@pytest.mark.parametrize("num_checkpointed", [0, 2])
def test_compiled_layers_are_compiled_once_for_all_rows_of_a_length(num_checkpointed, monkeypatch):
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, **{**options, "backend": counted}))
    model = tiny_model("llama").train()
    frames, gradients = [], {False: [], True: []}
    for compiled in (False, True):
        with segment_attention(model), prepared_layers(model, Recompute(num_checkpointed), compiled=compiled):
            for lengths in ([(5, 2)] * 6, [(5, 2)] * 5, [(4, 3)] * 6):  # filled rows of 43, 36 and 43 tokens, of 48
                model.zero_grad()
                row_loss(model, pad_row(row([random_episode(lengths, seed=1)]), multiple=48)).loss.backward()
                gradients[compiled].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
                frames += [counted.frame_count] if compiled else []
    for plain, compiled in zip(*gradients.values(), strict=True):
        assert_same_gradients(compiled, plain)
    # One for all layers and rows; and one for all that are recomputed, beside the one that is not.
    assert frames == ([2, 2, 2] if num_checkpointed else [1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [0, 3])
def test_under_autocast_adapters_keep_no_copy_of_what_they_read_and_gradients_stay(checkpointed):
    gradients, kept = [], []
    for unwidened in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model("llama").to(torch.bfloat16), config).train()
        sizes: dict[int, int] = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            segment_attention(model),
            prepared_layers(model, Recompute(checkpointed), compiled=False),
            unwidened_inputs(model, autocast=unwidened),
        ):
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16),
            ):
                loss = row_loss(model, row([random_episode(EPISODE, seed=1)])).loss
            loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert {grad.dtype for grad in grads} == {torch.float32}
        gradients.append(torch.cat(grads))
        kept.append(sum(sizes.values()))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()
    assert kept[1] < kept[0] or checkpointed


@pytest.mark.slow
def test_measuring_activations_leaves_no_tensor_behind():
    model = tiny_model("llama")
    measure_kept(model)
    gc.collect()
    gc.freeze()  # what is there by now is not looked at
    measure_kept(model)
    gc.collect()
    assert [type(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)] == []
