"""``dslm train``: continue the training of a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dslm.cli.common import (
    Place,
    console,
    model_argument,
    open_model,
    output_options,
    print_json,
    progress_bar,
    refuse_unused,
    remark,
    tell_evaluation,
)
from dslm.cli.sizes import recorded_name
from dslm.report.tables import columns_table, short_count
from dslm.targets import parse_count
from dslm.train.settings import (
    LEARNING_RATES,
    PRECISIONS,
    RECIPES,
    RUNS_ON,
    SCHEDULES,
    Training,
    check_training,
)

if TYPE_CHECKING:
    from dslm.train.record import Trained

_RATES = "{full:g}; with a teacher {distilled:g}; adapters {lora:g}".format(**LEARNING_RATES)
_DEFAULTS = Training(data=())


def _setting(name: str, help_text: str, **options: Any) -> Callable[[Any], Any]:
    """An option for a setting of `Training`, whose default and kind are that setting's."""
    default = getattr(_DEFAULTS, name)
    if default is False:
        options["is_flag"] = True
    elif default is not None:
        options |= {"default": default, "show_default": True} | (
            {} if "type" in options else {"type": type(default)}
        )
    return click.option(f"--{name.replace('_', '-')}", help=help_text, **options)


_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "-o",
        "--output",
        type=Place(),
        required=True,
        metavar="OUT",
        help="Folder to write.",
    ),
    click.option(
        "--data",
        multiple=True,
        required=True,
        metavar="DATA",
        help="Text file, JSON lines (text or messages), folder, or hub data set; may be given several times.",
    ),
    _setting("eval_data", "Evaluate on this.  [default: a share held out of --data]", metavar="DATA"),
    _setting("held_out", "That share."),
    click.option("--full", "mode", flag_value="full", default=True, help="Train all weights (the default)."),
    click.option("--lora", "mode", flag_value="lora", help="Train low-rank adapters."),
    click.option("--qlora", "mode", flag_value="qlora", help="Train adapters on weights in 4 bits (NF4)."),
    _setting("merge", "Merge the adapters into the model: the output is a plain checkpoint."),
    _setting("epochs", "Passes over the data."),
    _setting("tokens", "Train on so many tokens instead: 5M.", metavar="COUNT"),
    _setting("max_steps", "Train so many optimiser steps instead.", type=int),
    _setting("block_size", "Tokens in a block."),
    _setting("batch_size", "Blocks in a step of one device."),
    _setting("gradient_accumulation", "Batches in an optimiser step."),
    click.option("--learning-rate", "--lr", type=float, help=f"Of AdamW.  [default: {_RATES}]"),
    _setting("schedule", "How the rate falls after the warm-up.", type=click.Choice(SCHEDULES)),
    _setting("warmup", "Share of the steps in which it rises."),
    _setting("weight_decay", "Of matrices, decoupled."),
    _setting("max_grad_norm", "Longer gradients are cut; 0: none."),
    _setting(
        "recipe",
        "growth: rates by how dslm up grew the model; auto: that, if it only added and did not copy.",
        type=click.Choice(RECIPES),
    ),
    _setting("freeze_old", "Train only what dslm up added."),
    _setting("teacher", "Learn from this model too; source: the one that dslm resized.", metavar="MODEL"),
    _setting("temperature", "Of the distillation."),
    _setting("kl_weight", "Share of the distillation in the loss."),
    _setting("lora_r", "Rank of the adapters."),
    _setting("lora_alpha", "Their scale times the rank."),
    _setting("lora_dropout", "On what they read."),
    _setting("lora_target", "Modules, with commas.", metavar="NAMES"),
    _setting("gradient_checkpointing", "Less memory, more time."),
    _setting(
        "precision", "Numbers to compute with; weights are kept in float32.", type=click.Choice(PRECISIONS)
    ),
    _setting("eval_every", "Evaluate so often.  [default: ten times in all]", type=int, metavar="STEPS"),
    _setting(
        "save_every", "Keep a checkpoint so often.  [default: as --eval-every]", type=int, metavar="STEPS"
    ),
    _setting("seed", "Of all randomness."),
    _setting("device", "Where to run.", type=click.Choice(RUNS_ON)),
    click.option("--resume", is_flag=True, help="Go on with an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace an existing OUT, and drop an unfinished run."),
]


def _options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command(short_help="Continue the training of a model.")
@model_argument
@_options
@output_options
def command(
    model: str, output: Path, resume: bool, overwrite: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Continue training: all weights, adapters, or adapters on 4-bit weights; with a teacher, distillation.

    The output has the model's architecture and dtype. An interrupted run goes on with --resume. Several processes:
    torchrun --nproc-per-node N -m dslm.cli.main train ...
    """
    from dslm.train.run import train_checkpoint
    from dslm.train.runs import goes_on_in_place, has_begun, run_folder

    if options["tokens"] is not None:
        options["tokens"] = parse_count(options["tokens"], "tokens")
    asked = Training(**options)
    check_training(asked)
    refuse_unused(click.get_current_context(), _unused(asked))
    source = open_model(model, quiet=quiet)
    quiet_here = quiet or _rank() > 0
    if quiet_here:
        logging.getLogger("dslm").setLevel(logging.WARNING)
    try:
        with progress_bar(quiet=quiet_here) as progress:
            done = train_checkpoint(
                source,
                asked,
                output,
                base=recorded_name(model, source),
                resume=resume,
                overwrite=overwrite,
                in_place=resume and goes_on_in_place(source.folder, output),
                progress=progress,
                on_evaluation=None if quiet_here else tell_evaluation,
            )
    except KeyboardInterrupt:
        if has_begun(output):
            remark(f"the run so far is in {run_folder(output)}; --resume goes on with it", quiet=quiet_here)
        raise
    if _rank() == 0:
        _report(done, asked.adapts and not asked.merge, as_json)


def _unused(asked: Training) -> dict[str, str]:
    """Options that nothing would use, and what each needs."""
    unused: dict[str, str] = {}
    if asked.teacher is None:
        unused |= dict.fromkeys(("temperature", "kl_weight"), "--teacher")
    if not asked.adapts:
        unused |= dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target"), "--lora or --qlora")
    if asked.eval_data is not None:
        unused["held_out"] = "a run without --eval-data"
    if asked.tokens is not None or asked.max_steps is not None:
        unused["epochs"] = "a run without --tokens and --max-steps"
    return unused


def _rank() -> int:
    """Which of several processes this is; torchrun says so."""
    return int(os.environ.get("RANK", "0"))


def _report(done: Trained, adapter: bool, as_json: bool) -> None:
    before, after = done.perplexity
    if as_json:
        facts = asdict(done) | {"folder": str(done.folder), "perplexity": {"before": before, "after": after}}
        print_json(facts | {"adapter": adapter})
        return
    rows = [
        ("held-out perplexity", f"{before:.3f}", f"{after:.3f}"),
        ("tokens read", "", f"{done.tokens:,}"),
        ("optimiser steps", "", f"{done.steps:,}"),
        ("parameters that learned", "", short_count(done.learning)),
    ]
    out = console()
    out.print(columns_table(("", "before", "after"), rows))
    if not done.apart:
        out.print("this model reads over the border between documents in a block")
    kind = "adapter" if adapter else "model"
    out.print(
        f"\n{kind} written to {done.folder} in {done.seconds:.1f} s; the loss is in loss.png and metrics.jsonl"
    )
