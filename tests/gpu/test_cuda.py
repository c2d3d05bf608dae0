"""On a CUDA device: isolation, packed = unpacked, the engine behind a prefix, and whole runs. Skipped without one."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from manyicl.episodes.batch import pad_row
from manyicl.episodes.segments import bounds_of, make_segments
from manyicl.episodes.template import TemplateSettings
from manyicl.episodes.tokenizer import TaskTokenizer
from manyicl.errors import UserError
from manyicl.inference.answering.generation import generate_after
from manyicl.inference.budget import CONTEXT_BYTES, part_of_gpu, process_memory, usable_memory
from manyicl.inference.prefix import EMPTY_PREFIX, encode_prefix, score_choices
from manyicl.inference.sharing import sharing_fault
from manyicl.models.attention import partial
from manyicl.models.attention import segments as segment_kernels
from manyicl.models.attention.dispatch import segment_attention
from manyicl.models.attention.flash import flash_implementation, is_usable
from manyicl.models.attention.segments import attend_row_segments, kernel_order
from manyicl.models.compiled_pieces import fused_pieces
from manyicl.models.loss import answer_loss, row_loss, target_logits
from manyicl.training import trainer
from manyicl.training.memory.choice import choose_recompute, predict_memory
from manyicl.training.memory.footprint import Row, measure_footprint
from manyicl.training.recompute import tiles
from manyicl.training.recompute.layers import Recompute, prepared_layers
from manyicl.training.run import train
from manyicl.training.run_folder import RunFolder
from tests.conftest import COMMON, CONFIGS, tiny_model
from tests.models.test_attention_segments import attend_densely
from tests.parity.test_engine_parity import plain_nll
from tests.parity.test_loss_parity import EPISODE, TokenizedEpisode, loss_and_gradients, random_episode, row
from tests.support.answers import answer_nats
from tests.trajectory.setting import read_metrics, write_setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CLASSES = sorted(CONFIGS)
NEEDS_HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="no order of kernels before Hopper"
)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_perturbed_token_moves_no_logit_of_its_neighbours(name, dtype, training):
    model = tiny_model(name).to("cuda", dtype).train(training)
    episodes = [random_episode(EPISODE, seed=seed) for seed in (4, 5, 6)]
    middle = episodes[1]
    changed = TokenizedEpisode(ids=np.where(np.arange(len(middle.ids)) == 2, 7, middle.ids), spans=middle.spans)
    before, after = row(episodes).to("cuda"), row([episodes[0], changed, episodes[2]]).to("cuda")
    with torch.no_grad(), segment_attention(model):
        moved = (target_logits(model, before) - target_logits(model, after)).abs().amax(dim=-1) > 0
    segment = before.segment_ids_T[before.target_positions_N]
    assert [bool(moved[segment == s].any()) for s in range(3)] == [False, True, False]


@pytest.mark.parametrize("name", CLASSES)
def test_packed_equals_unpacked_and_the_cpu(name):
    model = tiny_model(name)
    episodes = [random_episode([(5, 2)] * k, seed=k) for k in (3, 1, 6)]
    losses = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        for label, rows in (("packed", [row(episodes)]), ("apart", [row([e]) for e in episodes])):
            with torch.no_grad(), segment_attention(model):
                batches = [r.to(device) for r in rows]
                losses[device, label] = sum(answer_loss(target_logits(model, b), b).loss.item() for b in batches)
    assert list(losses.values()) == pytest.approx([losses["cpu", "apart"]] * 4, rel=1e-4)


# (window, query heads, key heads, tokens of each segment)
SHAPES = [
    (None, 4, 4, (300,)),
    (None, 4, 2, (300,)),
    (None, 4, 2, (1, 130, 40, 129)),
    (7, 4, 2, (1, 130, 40, 129)),
    (128, 4, 1, (1, 130, 40, 129)),
    (50, 4, 2, (300,)),
]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("window", "heads", "groups", "lengths"), SHAPES)
def test_attention_of_segments_and_its_gradients_are_the_formulas(window, heads, groups, lengths, dtype, head_dim):
    torch.manual_seed(0)
    whole = [torch.randn(1, 300, n, head_dim).transpose(1, 2) for n in (heads, groups, groups)]
    grad = torch.randn(1, 300, heads, head_dim)
    plain = [x.to(dtype).float().requires_grad_() for x in whole]  # the same numbers
    expected = attend_densely(*plain, lengths=lengths, window=window, softcap=None)
    inputs = [x.to("cuda", dtype).detach().requires_grad_() for x in whole]
    segments = make_segments(lengths, bounds_S=torch.from_numpy(bounds_of(lengths)).cuda())
    with kernel_order():
        out = attend_row_segments(*inputs, segments=segments, dropout=0.0, scaling=0.3, window=window, softcap=None)
        ours = torch.autograd.grad(out, inputs, grad.to("cuda", dtype))
    assert out.dtype == dtype
    close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    assert torch.allclose(out.float().cpu(), expected, **close)
    for one, other in zip(ours, torch.autograd.grad(expected, plain, grad), strict=True):
        error = (one.float().cpu() - other).norm() / other.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.skipif(not is_usable(), reason="FlashAttention 3 is not installed, or the device is none of its own")
@pytest.mark.parametrize("lengths", [(4096,), (1000, 1, 2000, 1095)], ids=["filled", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_flash_attention_3_is_as_near_to_float32_as_torchs_own_kernels(head_dim, lengths):
    torch.manual_seed(0)
    whole = [torch.randn(1, 4096, n, head_dim, device="cuda").transpose(1, 2).bfloat16() for n in (8, 2, 2)]
    segments = make_segments(lengths, bounds_S=torch.from_numpy(bounds_of(lengths)).cuda())
    options = {"segments": segments, "dropout": 0.0, "scaling": None, "window": None, "softcap": None}
    found = []
    for dtype, drops in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        inputs = [x.to(dtype).requires_grad_() for x in whole]
        with kernel_order(row_tokens=4096, drops=drops):
            assert flash_implementation() == (None if drops else "FA3")
            out = attend_row_segments(*inputs, **options)
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out) + out.detach())
        found.append([x.float() for x in (out.detach(), *gradients)])
    assert flash_implementation() is None
    for exact, own, flash in zip(*found, strict=True):
        error, error_3 = ((x - exact).norm() / exact.norm() for x in (own, flash))
        assert error_3 < max(1.5 * error, 5e-3)
    assert any(not torch.equal(own, flash) for own, flash in zip(*found[1:], strict=True))  # it is another kernel


@NEEDS_HOPPER
def test_the_order_of_kernels_holds_from_the_first_attention_of_a_process_on():
    """torch's first choice sets its own order, cuDNN first on Hopper, over one that was asked for."""
    done = subprocess.run([sys.executable, "-c", FIRST_ATTENTION], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["FLASH_ATTENTION"] * 2


FIRST_ATTENTION = """
import torch
from torch.nn.attention import SDPBackend
from manyicl.models.attention import segments as segment_kernels
segment_kernels.flash_implementation = lambda: "another flash"
x = torch.ones(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
for _ in range(2):
    with segment_kernels.kernel_order():
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        print(SDPBackend(torch._C._get_sdp_priority_order()[0]).name)
"""


@NEEDS_HOPPER
def test_a_layer_compiled_for_one_kernel_runs_another_where_that_is_asked_for(monkeypatch):
    """torch's cache of compiled layers, on disk, does not tell them apart."""
    batch = pad_row(row([random_episode([(5, 2)] * 6, seed=1)]), multiple=64).to("cuda")
    model = tiny_model("llama").to("cuda", torch.bfloat16).train()
    for name, wanted in (("none", "cudnn"), ("another", "flash"), ("none", "cudnn")):
        monkeypatch.setattr(segment_kernels, "flash_implementation", lambda name=name: None if name == "none" else name)
        with (
            segment_attention(model),
            prepared_layers(model, Recompute(0), compiled=True),
            torch.profiler.profile(acc_events=True) as profile,
        ):
            row_loss(model, batch).loss.backward()
        ran = {event.key for event in profile.key_averages() if "_attention_backward" in event.key}
        assert all(wanted in key for key in ran), ran
        assert ran


def test_packed_rows_in_half_precision_take_the_varlen_kernel(monkeypatch):
    taken = []
    original = segment_kernels.varlen_attn
    monkeypatch.setattr(segment_kernels, "varlen_attn", lambda *a, **k: (taken.append(k), original(*a, **k))[1])
    model = tiny_model("mistral-sliding").to("cuda", torch.bfloat16)
    with torch.no_grad(), segment_attention(model):
        target_logits(model, row([random_episode([(5, 2)] * k, seed=k) for k in (3, 1, 6)]).to("cuda"))
    assert [options["window_size"] for options in taken] == [(15, 0)] * 3  # sliding_window 16: 15 keys to the left


@pytest.mark.parametrize("name", CLASSES)
def test_packed_equals_unpacked_in_bf16_with_gradients(name):
    model = tiny_model(name).to("cuda", torch.bfloat16)
    episodes = [random_episode([(5, 2)] * k, seed=k) for k in (3, 1, 6)]
    found = []
    for rows in ([row(episodes)], [row([e]) for e in episodes], [pad_row(row(episodes), multiple=128)]):
        loss, gradients = loss_and_gradients(model, [r.to("cuda") for r in rows])
        found.append((loss, torch.cat([g.float().flatten() for g in gradients.values()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-2)
        assert (gradient - found[0][1]).norm() / found[0][1].norm() < 0.05


@pytest.mark.parametrize("name", CLASSES)
def test_scores_behind_a_prefix_equal_the_cpus_plain_forward(name):
    model = tiny_model(name)
    rng = np.random.default_rng(0)
    before = rng.integers(3, 390, 40).astype(np.int32)
    pairs = [(rng.integers(3, 390, 6).astype(np.int32), rng.integers(3, 390, 3).tolist()) for _ in range(4)]
    expected = [plain_nll(model, [*before, *ids, *answer], num_answer=3) for ids, answer in pairs]
    model.to("cuda")
    nll = answer_nats(model, encode_prefix(model, before), pairs)
    assert nll == pytest.approx(expected, abs=1e-3)


OPTIONS = [[7, 8, 9], [7, 8], [7, 11, 12, 2], [13], [7, 8]]  # share beginnings, begin one another, repeat


def random_ids(num: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 390, num).astype(np.int32)


@pytest.mark.parametrize("num_prefix", [0, 5, 60])
@pytest.mark.parametrize("name", CLASSES)
def test_choices_behind_a_prefix_equal_the_cpus(name, num_prefix):
    model = tiny_model(name)
    before, queries = random_ids(num_prefix, seed=0), [random_ids(n, seed=n) for n in (1, 6, 6, 24)]
    expected = score_choices(model, encode_prefix(model, before), queries, [OPTIONS] * 4)
    model.to("cuda")
    assert sharing_fault(model) == ""
    prefix = encode_prefix(model, before[: num_prefix // 2])
    nats = score_choices(model, encode_prefix(model, before[num_prefix // 2 :], after=prefix), queries, [OPTIONS] * 4)
    assert np.array(nats) == pytest.approx(np.array(expected), abs=1e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_bf16_behind_a_prefix_is_near_fp32_on_the_cpu(name):
    model = tiny_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the same weights in both
    before, queries = random_ids(60, seed=0), [random_ids(n, seed=n) for n in (1, 6, 6, 24)]
    expected = score_choices(model, encode_prefix(model, before), queries, [OPTIONS] * 4)
    model.to("cuda", torch.bfloat16)
    assert sharing_fault(model) == ""
    nats = score_choices(model, encode_prefix(model, before), queries, [OPTIONS] * 4)
    assert np.array(nats) == pytest.approx(np.array(expected), rel=0.1, abs=0.1)


@pytest.mark.parametrize("threshold", [0, 1 << 62], ids=["cudnn", "flash"])
@pytest.mark.parametrize("num_keys", [1000, 3000])
def test_each_kernel_gives_the_formulas_output_and_log_sum_exp(threshold, num_keys, monkeypatch):
    if threshold == 0 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN's kernel is taken from Hopper on")
    monkeypatch.setattr(partial, "PLAN_SCORES", threshold)
    torch.manual_seed(0)
    buffers = torch.randn(2, 1, 2, 4096, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (x[:, :, :num_keys] for x in buffers)  # views of longer buffers, as a prefix has them
    query = torch.randn(1, 2, 1500, 64, device="cuda", dtype=torch.bfloat16)
    out, lse = partial.attend_part(query, key, value, scaling=0.1)
    wanted, sums = partial.attend_explicit(
        query.float(), key.float(), value.float(), scaling=0.1, bias=None, softcap=None
    )
    assert not partial._without_plan
    assert (out.shape, lse.shape) == (wanted.shape, sums.shape)
    assert torch.allclose(out.float(), wanted, atol=1e-2)
    assert torch.allclose(lse.float(), sums, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "llama"])
def test_lora_unmerged_and_merged_score_alike(name, dtype):
    torch.manual_seed(1)
    adapted = get_peft_model(
        tiny_model(name), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    adapted.to("cuda", dtype)
    before, asked = random_ids(40, seed=0), [(random_ids(6, seed=n), [3, 4 + n]) for n in range(3)]
    unmerged = answer_nats(adapted, encode_prefix(adapted, before), asked)
    merged = adapted.merge_and_unload()
    nll = answer_nats(merged, encode_prefix(merged, before), asked)
    assert nll == pytest.approx(unmerged, **({"abs": 1e-2} if dtype == torch.float32 else {"rel": 0.15, "abs": 0.2}))


@pytest.mark.parametrize("name", CLASSES)
def test_generation_behind_a_prefix_equals_the_cpus(name, tokenizers):
    model, tokenizer = tiny_model(name, seed=3), TaskTokenizer(tokenizers["bpe"], TemplateSettings())
    queries = [random_ids(n, seed=n) for n in (2, 7, 7, 20)]
    answers = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        for length in (0, 30):
            prefix = encode_prefix(model, random_ids(length, seed=0)) if length else EMPTY_PREFIX
            answers[device, length] = generate_after(model, tokenizer, prefix, queries, max_new_tokens=10)
    assert answers["cuda", 0] == answers["cpu", 0]
    assert answers["cuda", 30] == answers["cpu", 30]


def test_a_real_lack_of_memory_halves_rows_and_changes_no_score():
    model = tiny_model("llama", vocab_size=50_000).to("cuda")
    prefix = encode_prefix(model, random_ids(30, seed=0))
    queries = [random_ids(4, seed=n) for n in range(400)]
    options = [[[7, 8, 9], [10, 11]]] * len(queries)
    expected = score_choices(model, prefix, queries, options)
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 200 * 2**20) / total)
    try:
        assert free > 2**30  # what the plan believes
        nats = score_choices(model, prefix, queries, options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.array(nats) == pytest.approx(np.array(expected), abs=1e-3)


@pytest.mark.parametrize(("packs", "checkpointed"), [(8, "selective"), (2, "none"), (2, "full")])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_and_is_the_same_by_other_micro_batches(tmp_path, lora, precision, packs, checkpointed):
    """In fp32 rounding explains 1e-4 of a loss: noise of 1e-5 of the largest gradient moves the fourth by 5e-5."""
    courses = []
    for num, recomputed in ((8, "none"), (packs, checkpointed)):
        config = write_setting(tmp_path, lora=lora, packs_per_batch=num, num_steps=4, recompute=recomputed)
        config = config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})
        out = tmp_path / f"rows-{len(courses)}"
        train(config, out=out)
        courses.append([(r["loss"], r["grad_norm"]) for r in read_metrics(out) if "loss" in r])
    (losses, norms), (expected, expected_norms) = (zip(*course, strict=True) for course in courses)
    assert losses[-1] < losses[0]
    assert list(losses) == pytest.approx(list(expected), rel=1e-3 if precision == "fp32" else 5e-2)
    if precision == "fp32":
        assert list(norms) == pytest.approx(list(expected_norms), rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # what is counted are warnings
def test_a_step_waits_for_the_gpu_once(tmp_path, monkeypatch):
    """Count the synchronisations of each optimizer step between its first micro-batch and the next step's."""
    config = write_setting(tmp_path, num_steps=6, packs_per_batch=2, log_every_steps=6, checkpoint_every_steps=6)
    where: list[list[str]] = []
    original = trainer.AnswerTrainer.training_step

    def counted(self, *args, **options):
        if not where or self.state.global_step >= len(where):
            where.append([])
        return original(self, *args, **options)

    def note(message, category, filename, lineno, *_):
        if where and "synchronizing CUDA operation" in str(message):
            where[-1].append(f"{filename}:{lineno}")

    monkeypatch.setattr(trainer.AnswerTrainer, "training_step", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", note)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(config, out=tmp_path / "run")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(where) == 6
    # The first step makes the optimizer's state, and the last one logs, validates and saves.
    assert all(len(places) <= 1 for places in where[1:-1]), where[1:-1]


@pytest.mark.parametrize("checkpointed", [Recompute(0), Recompute(2), Recompute(3, keep_attention=False)], ids=str)
def test_compiled_layers_give_the_gradients_of_plain_ones(checkpointed):
    found = []
    for compiled in (False, True):
        model = tiny_model("llama").to("cuda", torch.bfloat16).train()
        for episodes in (
            [random_episode([(5, 2)] * 6, seed=1)],
            [random_episode([(5, 2)] * k, seed=k) for k in (1, 2, 3)],
        ):
            batch = pad_row(row(episodes), multiple=64).to("cuda")
            with segment_attention(model), prepared_layers(model, checkpointed, compiled=compiled):
                row_loss(model, batch).loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.05


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_wait_in_the_hosts_memory_and_change_no_gradient(compiled):
    """Rows of other lengths, one right after the other: a copy that came too late would show."""
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 6})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    batches = [
        pad_row(row([random_episode(EPISODE, seed=s) for s in range(n)]), multiple=64).to("cuda") for n in (8, 2, 5, 8)
    ]
    found = []
    for offload in (False, True):
        model.zero_grad()
        recompute = Recompute(6, keep_attention=False, offload=offload)
        with segment_attention(model), prepared_layers(model, recompute, compiled=compiled):
            for batch in batches:
                row_loss(model, batch).loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_feed_forward_parts_in_tiles_change_no_gradient(compiled, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_TOKENS", 16)
    model = tiny_model("llama").to("cuda", torch.bfloat16).train()
    batch = pad_row(row([random_episode(EPISODE, seed=s) for s in (1, 2, 3)]), multiple=64).to("cuda")
    found = []
    for in_tiles in (False, True):
        model.zero_grad()
        recompute = Recompute(3, keep_attention=False, offload=in_tiles, tiles=in_tiles)
        with segment_attention(model), prepared_layers(model, recompute, compiled=compiled):
            row_loss(model, batch).loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.02


def test_automatic_recomputation_follows_the_free_memory(monkeypatch):
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    model.config.max_position_embeddings = 1 << 20
    row = Row(1 << 16, 64, "bf16")
    footprint = measure_footprint(model.config, row)
    peaks = [predict_memory(footprint, Recompute(n)).total_bytes for n in range(4)]
    total = torch.cuda.mem_get_info()[1]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)  # what earlier tests have left is free as well
    chosen = []
    for usable in (2 * peaks[0], int(peaks[2] / 0.92) + (1 << 20), 0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=usable: (free, total))
        with nullcontext() if usable else pytest.warns(UserWarning, match="a step is predicted to take"):
            chosen.append(choose_recompute(model, "auto", row=row))
    assert chosen[0] == Recompute(0)
    assert 0 < chosen[1].num_layers <= 2
    assert chosen[2] == Recompute(3, keep_attention=False, offload=True, tiles=True)


def test_a_small_model_joins_all_packs_of_a_step_and_its_course_is_that_of_one_by_one(tmp_path):
    losses = []
    for number in ("auto", 1):
        config = write_setting(tmp_path, packs_per_batch=number, num_steps=4)
        run = train(config, out=tmp_path / f"packs-{number}")
        losses.append([record["loss"] for record in read_metrics(run.folder) if "loss" in record])
        state = RunFolder(run.folder).read_state()
        assert state.packs_per_batch == (8 if number == "auto" else 1)
    assert RunFolder(tmp_path / "packs-auto").read_state().packs_reason == "all that a step has for a rank"
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_that_is_out_of_memory_goes_on_with_the_setting_that_it_names(tmp_path):
    write_setting(tmp_path, pack_tokens=8192, packs_per_step=1, packs_per_batch=1, num_steps=2, recompute="none")
    about = LlamaConfig.from_pretrained(
        tmp_path / "start", hidden_size=512, intermediate_size=2048, num_hidden_layers=4, head_dim=64
    )
    LlamaForCausalLM(about).save_pretrained(tmp_path / "start")
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"

    def limit_memory(num_bytes):
        gc.collect()  # what the failed run held
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + num_bytes) / total))

    try:
        limit_memory(1.5e9)  # weights and optimizer take 0.3 GB, the layers' activations 1.6
        with pytest.raises(UserError, match=r"of memory.* 0 of 4 layers recomputed; train\.recompute=selective"):
            train(recipe, out=run)
        limit_memory(1.5e9)
        going_on = RunFolder(run).read_config(overrides=["train.recompute=selective"])
        assert train(going_on, out=run, resume=True).held_out
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-sliding", "qwen3"])
def test_compiled_pieces_give_the_likelihoods_of_the_model_as_it_is(name, dtype):
    model = tiny_model(name).to("cuda", dtype)
    before, queries = random_ids(60, seed=0), [random_ids(n, seed=n) for n in (1, 6, 6, 24)]
    found = []
    for context in (nullcontext(), fused_pieces(model)):
        with context:
            nats = score_choices(model, encode_prefix(model, before), queries, [OPTIONS] * 4)
        found.append(np.array(nats))
    close = {"abs": 1e-3} if dtype == torch.float32 else {"rel": 0.1, "abs": 0.1}
    assert found[1] == pytest.approx(found[0], **close)


def test_a_process_with_a_part_of_the_gpu_cannot_take_more():
    gc.collect()
    torch.cuda.empty_cache()
    device, total = torch.device("cuda"), torch.cuda.mem_get_info()[1]
    with part_of_gpu(8):
        mine = process_memory(device)
        assert mine == pytest.approx(total / 8 - CONTEXT_BYTES, rel=0.01)
        held = torch.empty(int(0.9 * (mine - torch.cuda.memory_allocated())), dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.2 * mine), dtype=torch.uint8, device=device)
        assert usable_memory(device) < 0.2 * mine
    del held
    torch.cuda.empty_cache()
    assert process_memory(device) > mine
