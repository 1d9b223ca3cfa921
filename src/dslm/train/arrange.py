"""From what was asked for to a Trainer that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, gcd
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PrinterCallback, TrainingArguments

from dslm.load import pick_device
from dslm.progress import Progress
from dslm.train.data import Blocks
from dslm.train.growth import Scale
from dslm.train.settings import Training
from dslm.train.trainer import GroupTrainer
from dslm.train.watch import Evaluation, Watch, sampler

_EVALUATED, _LEAST = 64, 4
"""Held-out blocks in an evaluation, at most and at least."""


def _step_blocks(asked: Training, processes: int) -> int:
    """Blocks in an optimiser step of all processes."""
    return asked.batch_size * asked.gradient_accumulation * processes


def count_steps(asked: Training, blocks: Blocks, processes: int) -> int:
    """Optimiser steps of the run."""
    if asked.max_steps is not None:
        return asked.max_steps
    per_step = _step_blocks(asked, processes)
    in_epoch = ceil(len(blocks) / per_step)  # the last one of an epoch may see fewer blocks
    if asked.tokens is not None:
        epochs, rest = divmod(asked.tokens / int(blocks.ids.shape[1]), len(blocks))
        return max(1, int(epochs) * in_epoch + round(rest / per_step))
    return max(1, ceil(asked.epochs * in_epoch))


def _intervals(asked: Training, steps: int) -> tuple[int, int, int]:
    """Steps between lines of metrics, evaluations and checkpoints; the first divides the others.

    There is a checkpoint before the last one: where the output cannot be written the run goes on from there.
    """
    evaluate = min(asked.eval_every or ceil(steps / 10), steps)
    save = asked.save_every or evaluate
    save = save if save < steps else max(1, steps // 2)
    common = gcd(evaluate, save)
    wished = max(1, min(10, steps // 20))
    return max(d for d in range(1, wished + 1) if common % d == 0), evaluate, save


def arrange(
    model: Any,
    tokenizer: Any,
    asked: Training,
    train_blocks: Blocks,
    held_out: Blocks,
    scales: Mapping[str, Scale],
    folder: Path,
    *,
    progress: Progress | None,
    on_evaluation: Callable[[Evaluation], None] | None,
) -> tuple[GroupTrainer, Watch]:
    """A Trainer for a run, and what watches it.

    Args:
        model: with its loss and adapters.
        tokenizer: of the model, for samples of text.
        asked: how to train.
        train_blocks: to train on.
        held_out: to evaluate on.
        scales: parameter name -> how its rate differs.
        folder: of the run.
        progress: called with a label, steps done and steps in all.
        on_evaluation: called with what each evaluation found.
    """
    schedule = {"constant": "constant_with_warmup"}.get(asked.schedule, asked.schedule)
    use_cpu = asked.device == "cpu" or pick_device("auto").type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=use_cpu,
        bf16=asked.precision == "bfloat16" or (asked.precision == "auto" and not use_cpu and _has_bfloat16()),
        per_device_train_batch_size=asked.batch_size,
        per_device_eval_batch_size=asked.batch_size,
        gradient_accumulation_steps=asked.gradient_accumulation,
        activation_checkpointing=asked.gradient_checkpointing,
        learning_rate=asked.rate,
        lr_scheduler_type=schedule,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=2,
        logging_nan_inf_filter=False,
        seed=asked.seed,
        data_seed=asked.seed,
        use_cache=model.config.use_cache,  # as it was: checkpoints are models by themselves
        report_to=[],
        # Unless layers are left out at random, every parameter takes part in every step.
        ddp_find_unused_parameters=bool(getattr(model.config, "layerdrop", 0)),
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        log_level="error",
    )
    # Several GPUs without torchrun: replicas would call the forward pass of the first.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    steps = count_steps(asked, train_blocks, arguments.world_size)
    arguments.max_steps = steps
    arguments.warmup_steps = round(asked.warmup * steps)
    arguments.logging_steps, arguments.eval_steps, arguments.save_steps = _intervals(asked, steps)
    alone = arguments.world_size == 1
    # Ten evaluations, at a third of the cost of a training step each, should take a small share of the time.
    held_out = held_out.first(
        min(_EVALUATED, max(_LEAST, steps * _step_blocks(asked, arguments.world_size) // 16))
    )
    prompt = held_out.ids[0][: min(8, held_out.ids.shape[1] // 2)].tolist()
    # One process cannot write with a model that is cut up over all.
    whole = not any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    sample = sampler(model, tokenizer, prompt) if whole else None
    watch = Watch(folder, alone, sample, tokenizer.save_pretrained, progress, on_evaluation)
    trainer = GroupTrainer(
        scales=scales,
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=held_out,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, watch


def _has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
