"""``dslm train``: continue the training of a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dslm.cli.common import (
    console,
    model_argument,
    open_model,
    output_options,
    print_json,
    progress_bar,
    remark,
)
from dslm.cli.sizes import recorded_name
from dslm.report.tables import columns_table, short_count

if TYPE_CHECKING:
    from dslm.train.record import Trained
    from dslm.train.watch import Evaluation

_GROUPS: list[Any] = [
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
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
    click.option(
        "--eval-data", metavar="DATA", help="Evaluate on this.  [default: a share held out of --data]"
    ),
    click.option("--held-out", type=float, default=0.05, show_default=True, help="That share."),
    click.option("--full", "mode", flag_value="full", default=True, help="Train all weights (the default)."),
    click.option("--lora", "mode", flag_value="lora", help="Train low-rank adapters."),
    click.option("--qlora", "mode", flag_value="qlora", help="Train adapters on weights in 4 bits (NF4)."),
    click.option(
        "--merge", is_flag=True, help="Merge the adapters into the model: the output is a plain checkpoint."
    ),
    click.option("--epochs", type=float, default=1.0, show_default=True, help="Passes over the data."),
    click.option("--tokens", metavar="COUNT", help="Train on so many tokens instead: 5M."),
    click.option("--max-steps", type=int, help="Train so many optimiser steps instead."),
    click.option("--block-size", type=int, default=512, show_default=True, help="Tokens in a block."),
    click.option(
        "--batch-size", type=int, default=4, show_default=True, help="Blocks in a step of one device."
    ),
    click.option(
        "--gradient-accumulation",
        type=int,
        default=1,
        show_default=True,
        help="Batches in an optimiser step.",
    ),
    click.option("--learning-rate", "--lr", type=float, help="Of AdamW.  [default: 1e-4; adapters 2e-4]"),
    click.option(
        "--schedule",
        type=click.Choice(["cosine", "linear", "constant"]),
        default="cosine",
        show_default=True,
        help="How the rate falls after the warm-up.",
    ),
    click.option(
        "--warmup", type=float, default=0.05, show_default=True, help="Share of the steps in which it rises."
    ),
    click.option(
        "--weight-decay", type=float, default=0.01, show_default=True, help="Of matrices, decoupled."
    ),
    click.option(
        "--max-grad-norm",
        type=float,
        default=1.0,
        show_default=True,
        help="Longer gradients are cut; 0: none.",
    ),
    click.option(
        "--recipe",
        type=click.Choice(["plain", "growth"]),
        default="plain",
        show_default=True,
        help="growth: rates by how dslm up grew the model.",
    ),
    click.option("--freeze-old", is_flag=True, help="Train only what dslm up added."),
    click.option(
        "--teacher", metavar="MODEL", help="Learn from this model too; source: the one that dslm resized."
    ),
    click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the distillation."),
    click.option(
        "--kl-weight",
        type=float,
        default=0.9,
        show_default=True,
        help="Share of the distillation in the loss.",
    ),
    click.option("--lora-r", type=int, default=16, show_default=True, help="Rank of the adapters."),
    click.option(
        "--lora-alpha", type=float, default=32.0, show_default=True, help="Their scale times the rank."
    ),
    click.option("--lora-dropout", type=float, default=0.0, show_default=True, help="On what they read."),
    click.option(
        "--lora-target",
        default="all-linear",
        show_default=True,
        metavar="NAMES",
        help="Modules, with commas.",
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Numbers to compute with; weights are kept in float32.",
    ),
    click.option(
        "--eval-every", type=int, metavar="STEPS", help="Evaluate so often.  [default: ten times in all]"
    ),
    click.option(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="Keep a checkpoint so often.  [default: as --eval-every]",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of all randomness."),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu"]),
        default="auto",
        show_default=True,
        help="Where to run.",
    ),
    click.option("--resume", is_flag=True, help="Go on with an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace an existing OUT, and drop an unfinished run."),
]


def _options(function: Any) -> Any:
    for option in reversed(_GROUPS):
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
    from dslm.targets import parse_count
    from dslm.train.run import train_checkpoint
    from dslm.train.runs import run_folder
    from dslm.train.settings import Training, check_training

    if options["tokens"] is not None:
        options["tokens"] = parse_count(options["tokens"])
    asked = Training(**options)
    check_training(asked)
    source = open_model(model, quiet=quiet)
    quiet_here = quiet or _rank() > 0
    try:
        with progress_bar(quiet=quiet_here) as progress:
            done = train_checkpoint(
                source,
                asked,
                output,
                base=recorded_name(model, source),
                resume=resume,
                overwrite=overwrite,
                progress=progress,
                on_evaluation=None if quiet_here else _tell,
            )
    except KeyboardInterrupt:
        remark(f"the run so far is in {run_folder(output)}; --resume goes on with it", quiet=quiet_here)
        raise
    if _rank() == 0:
        _report(done, asked.adapts and not asked.merge, as_json)


def _rank() -> int:
    """Which of several processes this is; torchrun says so."""
    import os

    return int(os.environ.get("RANK", "0"))


def _tell(found: Evaluation) -> None:
    loss = "" if found.loss is None else f", training loss {found.loss:.4f}"
    remark(
        f"step {found.step}/{found.steps}, {found.tokens:,} tokens{loss}, held-out perplexity {found.perplexity:.3f}"
    )
    if found.sample:
        remark(f"  {' '.join(found.sample.split())}")


def _report(done: Trained, adapter: bool, as_json: bool) -> None:
    before, after = done.perplexity
    if as_json:
        facts = asdict(done) | {"folder": str(done.folder), "perplexity": {"before": before, "after": after}}
        print_json(facts | {"adapter": adapter})
        return
    rows = [
        ("held-out perplexity", f"{before:.3f}", f"{after:.3f}"),
        ("tokens trained on", "", f"{done.tokens:,}"),
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
