"""Train: a thin subclass of transformers.Trainer that knows packs, answer targets and whole checkpoints.

The objective's divisors come with each batch, counted over the whole optimizer step, so neither gradient accumulation
nor the number of ranks changes the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from manyicl.episodes import Batch, BatchMaker, Pack, PackDataset
from manyicl.errors import NonFiniteError, OutOfMemoryError, UserError, is_out_of_memory
from manyicl.files import sync_tree
from manyicl.models import (
    AnswerLoss,
    check_compiler,
    decoder_layers,
    device_of,
    isolation_fault,
    row_attention,
    row_loss,
)
from manyicl.training.graph import GraphedPass, choose_graph, find_obstacle
from manyicl.training.memory.choice import choose_recompute
from manyicl.training.memory.footprint import Row
from manyicl.training.metrics import MetricsLog, StepSums, bucket_name, measure_ceiling
from manyicl.training.preparation import share_rows
from manyicl.training.ranks import agree_on, end_prefetch_at_first_unit
from manyicl.training.recipe import RunConfig
from manyicl.training.recompute.layers import AttentionChoice, Recompute, prepared_layers, unwidened_inputs
from manyicl.training.recompute.tiles import tiles_help
from manyicl.training.run_folder import TRAINER_STATE, Checkpoints


class AnswerTrainer(Trainer):
    """transformers.Trainer on packs.

    recipe: the run's. packs: as the ranks are served them. row: the largest.
    step_flops: model FLOPs of each optimizer step; empty if they are not known.

    Raises:
        NonFiniteError: a non-finite gradient norm, before the update it would have spoilt.
        UserError: a transformers that is too old.
    """

    def __init__(
        self,
        model: Any,
        *,
        args: TrainingArguments,
        recipe: RunConfig,
        packs: PackDataset,
        row: Row,
        validation: tuple[BatchMaker, Sequence[Pack]],
        metrics: MetricsLog,
        callbacks: list[TrainerCallback],
        step_flops: Sequence[int] = (),
    ) -> None:
        # eval_dataset only tells the Trainer that there is one; `evaluate` below reads `validation`.
        super().__init__(
            model=model,
            args=args,
            train_dataset=packs,
            eval_dataset=validation[1] or None,
            data_collator=packs.collate,  # type: ignore[arg-type]
            callbacks=[PrefetchCallback(), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # the bar shows what it would print
        # The weights of a batch hold every divisor, so the Trainer must not divide again; earlier ones do, unasked.
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise UserError(f"transformers {transformers.__version__}: divides gradients once more; install 5.23")
        self.loss_is_scaled_for_ga = True
        self.recipe = recipe
        self.row = row
        self.packs = packs
        self.step_flops = step_flops
        self.validation = validation
        self.metrics_log = metrics
        self.step_sums = StepSums(args.device)
        self.suspects: list[tuple[tuple[int, ...], Tensor]] = []
        self.interval: list[NDArray[np.float64]] = []
        self.interval_started = time.perf_counter()
        self.validating = False
        self.recompute, self.attention = Recompute(0), AttentionChoice(is_kept=True)
        self.ceiling = measure_ceiling(args.device) if step_flops else None
        self.graph: GraphedPass | None = None
        self.graph_reason = ""

    def train_packs(self, checkpoint: Path | None) -> None:
        """Run the training loop to its end, from the start or from `checkpoint`.

        Raises:
            UserError: more layers to recompute than there are, or no compiler; as `OutOfMemoryError` a GPU whose memory
                is not enough.
        """
        if self.recipe.train.compile:
            check_compiler()
        try:
            self._train_prepared(checkpoint)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # A notebook keeps its last error, and by it all that the pass had made, whose room the next run needs.
            # Before torch 2.13 also the hooks of a recomputed layer that was cut short are alive, and act in that run.
            clear_frames(error.__traceback__)
            raise _tell_out_of_memory(self) from error
        finally:
            # It keeps a pass's memory, which what comes next may need, and this trainer, which keeps it in turn.
            self.graph = None

    def _train_prepared(self, checkpoint: Path | None) -> None:
        """Choose what is recomputed, and train with attention and layers put in place."""
        config, autocast = self.recipe, bool(self.args.bf16)
        model: Any = self.model
        text, longest = _text_of(self.packs), config.episodes.token_budget
        fault = isolation_fault(model, text, longest=longest)
        if config.model.quantize and self.is_fsdp_enabled:
            raise UserError("model.quantize: packed weights are not sharded; launch without FSDP, or leave it out")
        _refuse_if_alone(fault, compiled=config.train.compile, sharded=self.is_fsdp_enabled)
        chosen = choose_recompute(
            model,
            config.train.recompute,
            row=self.row,
            lora=config.model.lora,
            trust_remote_code=config.model.trust_remote_code,
            num_shards=self.accelerator.num_processes if self.is_fsdp_enabled else 1,
        )
        self.recompute = agree_on(chosen, accelerator=self.accelerator)
        self._choose_graph(fault)
        with (
            row_attention(model, text, longest=longest, row_tokens=config.row_tokens),
            prepared_layers(model, self.recompute, compiled=config.train.compile) as self.attention,
            unwidened_inputs(model, autocast=autocast),
        ):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Take the packs in the order of the plan."""
        return SequentialSampler(train_dataset if train_dataset is not None else self.packs)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the row's share of the step's loss, times the ranks over which gradients are averaged."""
        del return_outputs, num_items_in_batch
        scored = row_loss(model, inputs)
        self._note_row(inputs, scored)
        loss: Tensor = scored.loss * self.accelerator.num_processes
        return loss

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run a row forward and backward, by a CUDA graph if one was chosen."""
        if self.graph is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[arg-type]
        if not model.training:
            model.train()
        scored = self.graph(inputs)
        self._note_row(inputs, scored)
        return scored.loss

    def _note_row(self, batch: Batch, scored: AnswerLoss) -> None:
        self.step_sums.add(batch, scored)
        self.suspects.append((batch.episodes, scored.nll_A))

    def _run_row(self, batch: Batch) -> AnswerLoss:
        """Run a row forward and backward, as the Trainer does in a step."""
        with self.compute_loss_context_manager():
            scored = row_loss(self.model_wrapped, batch)
        self.accelerator.backward(scored.loss)
        return replace(scored, loss=scored.loss.detach())

    def _choose_graph(self, fault: str) -> None:
        """Decide whether rows run as a CUDA graph, and why. fault: why episodes go through the model alone, or ''.

        Raises:
            UserError: the recipe asks for one, and there can be none.
        """
        model: Any = self.model
        obstacle = find_obstacle(
            model,
            fault=fault,
            is_wrapped=self.accelerator.distributed_type is not DistributedType.NO,
            recompute=self.recompute,
            is_half=bool(self.args.bf16),
            quantize=self.recipe.model.quantize,
        )
        rows = len(self.packs) / self.recipe.train.packs_at_once
        pass_flops = sum(self.step_flops) / rows if self.step_flops else None
        is_chosen, self.graph_reason = choose_graph(
            self.recipe.train.cuda_graph, obstacle=obstacle, pass_flops=pass_flops
        )
        if is_chosen:
            planned = self.packs.count_rows(packs_per_row=self.recipe.train.packs_at_once)
            self.graph = GraphedPass(self._run_row, model.parameters(), num_tokens=self.row.num_tokens, rows=planned)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> None:
        """Count nothing: the Trainer would count the tokens of `labels`, and our divisors come with the batch."""
        del batch_samples, device

    def floating_point_ops(self, inputs: Batch) -> int:  # type: ignore[override]
        """Return transformers' own estimate, 6 * weights * tokens."""
        return int(super().floating_point_ops({"input_ids": inputs.input_ids_1T}))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Read the step's sums and its gradient norm, the one synchronisation of a step, and stop where not finite."""
        trainer: Any = super()
        norm = torch.as_tensor(trainer._get_grad_norm(model, grad_norm=grad_norm), device=self.args.device)
        if isinstance(norm, DTensor):  # FSDP2's, of which each rank has its part
            norm = norm.full_tensor()
        sums = self.accelerator.reduce(self.step_sums.sums, reduction="sum")
        values = torch.cat([norm.double().reshape(1), sums]).cpu().numpy()
        if not np.isfinite(values[:2]).all():
            self._stop_non_finite(norm=float(values[0]), loss=float(values[1]))
        self.interval.append(values)
        self.step_sums.sums.zero_()
        self.suspects.clear()
        return float(values[0])

    def _stop_non_finite(self, *, norm: float, loss: float) -> None:
        step = self.state.global_step + 1
        bad = [e for episodes, nll_A in self.suspects if not bool(torch.isfinite(nll_A).all()) for e in episodes]
        every = [e for episodes, _ in self.suspects for e in episodes]
        where = f"episodes {bad} have a non-finite loss" if bad else f"the gradient of episodes {every} is not finite"
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}; {where}; the weights were not updated. Look at them with"
            " `manyicl show RECIPE --episode N`; lower train.learning_rate, or set model.precision = 'fp32'"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's rounded figures by the exact ones of the interval, and keep them in metrics.jsonl."""
        del start_time
        if "train_runtime" in logs:
            return  # the Trainer's closing summary; run.json holds those figures
        if "loss" in logs:
            logs = self._interval_logs(logs["learning_rate"])
        record = {"step": self.state.global_step, **logs}
        if self.is_world_process_zero():
            self.metrics_log.append(record)
        super().log(dict(logs))

    def _interval_logs(self, learning_rate: float) -> dict[str, float]:
        seconds = time.perf_counter() - self.interval_started
        rows = np.stack(self.interval)
        steps = range(self.state.global_step - len(rows), self.state.global_step)
        packs = self.packs.packs
        per_step = self.packs.packs_per_step
        num_tokens = sum(pack.num_tokens for step in steps for pack in packs[step * per_step : (step + 1) * per_step])
        num_answers = sum(self.packs.divisors[step].num_answers for step in steps)
        logs = {
            "loss": float(rows[:, 1].mean()),
            "grad_norm": float(rows[-1, 0]),
            "learning_rate": learning_rate,
            "tokens": num_tokens,
            "answers": num_answers,
            "tokens_per_s": num_tokens / seconds,
            "answers_per_s": num_answers / seconds,
            **self._flops_logs(steps, seconds=seconds),
        }
        sums, counts = np.split(rows[:, 2:].sum(axis=0), 2)
        for index in np.flatnonzero(counts):
            logs[f"loss_by_shot/{bucket_name(int(index))}"] = float(sums[index] / counts[index])
        self.interval.clear()
        self.interval_started = time.perf_counter()
        return logs

    def _flops_logs(self, steps: range, *, seconds: float) -> dict[str, float]:
        """Return the model FLOP/s of all ranks, and their fraction of the measured ceiling, if they are known."""
        if not self.step_flops:
            return {}
        logs = {"model_flops_per_s": sum(self.step_flops[steps.start : steps.stop]) / seconds}
        if self.ceiling is not None:
            logs["mfu"] = logs["model_flops_per_s"] / (self.ceiling * self.accelerator.num_processes)
        return logs

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the validation loss: mean over tasks of the mean over answers of the mean token loss; and by task."""
        started = time.perf_counter()
        self.validating = True
        maker, planned = self.validation
        sums = torch.zeros(len(maker.task_names), 2, dtype=torch.float64, device=self.args.device)
        tasks_K1 = torch.arange(len(maker.task_names), device=self.args.device)[:, None]
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        model: Any = self.model
        model.eval()
        # Its rows are of any length, and would all be compiled for.
        eager = torch.compiler.set_stance("force_eager") if self.recipe.train.compile else nullcontext()
        with torch.no_grad(), self.accelerator.autocast(), eager:
            for pack, counts in share_rows(planned, rank=rank, num_ranks=ranks):
                batch = maker.make_batch([pack]).to(self.args.device)
                scored = row_loss(model, batch)
                if not counts:
                    continue
                mean_nll_A = (scored.nll_A / scored.num_tokens_A).double()
                # By K tasks; not `index_add_`, which adds in another order each time on a GPU.
                is_of_task_KA = batch.answer_tasks_A == tasks_K1
                sums[:, 0] += torch.where(is_of_task_KA, mean_nll_A, 0.0).sum(dim=1)
                sums[:, 1] += is_of_task_KA.sum(dim=1)
        self.validating = False
        totals = self.accelerator.reduce(sums, reduction="sum").cpu().numpy()
        metrics = {
            f"eval_loss/{name}": float(total / count)
            for name, (total, count) in zip(maker.task_names, totals, strict=True)
            if count
        }
        metrics = {"eval_loss": float(np.mean(list(metrics.values()))) if metrics else math.nan, **metrics}
        self.log({**metrics})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # Validation is not training time: the rates of the next interval leave it out.
        self.interval_started += time.perf_counter() - started
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write each weight once: of FSDP2's shards, tied ones are gathered as if they were two."""
        model: Any = self.model
        tied = getattr(model, "all_tied_weights_keys", {})
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict=state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of tied weights, which a checkpoint holds once."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it there whole; then drop the ones not needed any more."""
        del model, trial
        checkpoints, step = Checkpoints(Path(str(self.args.output_dir))), self.state.global_step
        with self.accelerator.main_process_first():
            partial = checkpoints.begin(step)
        self.save_model(str(partial), _internal_call=True)
        self._save_optimizer_and_scheduler(str(partial))
        self._save_rng_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(partial / TRAINER_STATE))
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing of ours reads
            sync_tree(partial)
            checkpoints.complete(step, partial, keep=[self.state.best_global_step or step])
        self.accelerator.wait_for_everyone()


class PrefetchCallback(TrainerCallback):
    """Puts right, once accelerate has wrapped the model, what FSDP2 would gather ahead in vain."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """See `ranks.end_prefetch_at_first_unit`."""
        del args, state, control
        end_prefetch_at_first_unit(model)


class LastStepCallback(TrainerCallback):
    """Validates, logs and saves after the last step too, wherever the intervals fall."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for all three at the end of the run."""
        if state.global_step >= state.max_steps:
            control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"


def _text_of(packs: PackDataset) -> NDArray[np.int32]:
    """Return the token ids of the run's first pack: ordinary text, if the model is still to be tried."""
    batch = packs.maker.make_batch([packs.packs[0]])
    return batch.input_ids_1T[0].numpy().astype(np.int32)


def _refuse_if_alone(fault: str, *, compiled: bool, sharded: bool) -> None:
    """Refuse what does not go with a model whose episodes must go through it one at a time, if there is a `fault`.

    Raises:
        UserError: compiled layers, which are made for one length; FSDP2, whose ranks must run as many forward passes.
    """
    if fault and compiled:
        raise UserError(
            f"train.compile = true: the model {fault}, so each episode goes through it alone, and layers are compiled"
            " for one length; set train.compile = false"
        )
    if fault and sharded:
        raise UserError(
            f"FSDP: the model {fault}, so each episode goes through it alone, and ranks have different numbers of"
            " episodes; train on one GPU, or by DDP (accelerate launch without FSDP)"
        )


def _tell_out_of_memory(trainer: AnswerTrainer) -> OutOfMemoryError:
    """Return where a GPU ran out of memory, and the next setting that takes less."""
    model: Any = trainer.model
    num_layers, num_recomputed = len(decoder_layers(model)), trainer.recompute.num_layers
    where = f"step {trainer.state.global_step + 1}: the GPU is out of memory"
    if trainer.graph is not None:
        return OutOfMemoryError(f"{where}, with rows as a CUDA graph, which keeps its memory", "train.cuda_graph=false")
    if trainer.validating:  # nothing is recomputed there
        is_packed = trainer.recipe.pack_tokens > trainer.recipe.episodes.token_budget
        lower = "train.pack_tokens" if is_packed else "episodes.token_budget"
        fix = f"start a new run with a lower {lower}, or with train.validation_tokens = 0"
        return OutOfMemoryError(f"{where}, with a validation row; {fix}", None)
    is_full, offload = num_recomputed == num_layers and not trainer.attention.is_kept, trainer.recompute.offload
    why = (
        f"{where}, with rows of up to {trainer.recipe.row_tokens:,} tokens and {num_recomputed} of {num_layers} layers"
        f" recomputed{' in full' if is_full else ''}{', from inputs in the host' if offload else ''}"
        f"{', in tiles' if trainer.recompute.tiles else ''}"
    )
    if not is_full:
        return OutOfMemoryError(why, f"train.recompute={'full' if num_recomputed == num_layers else 'selective'}")
    if not offload and device_of(model).type == "cuda":
        return OutOfMemoryError(why, "train.recompute=offload")
    if offload and not trainer.recompute.tiles and tiles_help(decoder_layers(model), num_tokens=trainer.row.num_tokens):
        return OutOfMemoryError(why, "train.recompute=tiled")
    if trainer.recipe.train.packs_at_once > 1:
        return OutOfMemoryError(why, "train.packs_per_batch=1")
    fix = "start a new run with a lower episodes.token_budget or train.pack_tokens, or shard it over GPUs"
    return OutOfMemoryError(f"{why}; {fix}", None)
