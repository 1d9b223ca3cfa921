"""``dslm down``: shrink a model."""

from __future__ import annotations

from dataclasses import replace
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
)
from dslm.cli.down_target import check_search, search_shapes, target_sizes, wanted_parameters
from dslm.cli.heal import (
    check_healing,
    heal,
    heal_data_option,
    heal_tokens_option,
    healing_text,
    read_healing_text,
)
from dslm.cli.sizes import (
    FREE_BESIDE_PLAN,
    change_facts,
    change_rows,
    default_output,
    dry_run_option,
    output_option,
    overwrite_option,
    plan_option,
    recorded_name,
    refuse_beside_plan,
    seed_option,
    size_options,
    untie_option,
)
from dslm.errors import RecipeError
from dslm.load import DEVICES
from dslm.plan import SHRINK_METHODS, SHRUNK, Plan, check_plan, plan_shrink
from dslm.report.shapes import SHAPE_HEADER, shape_facts, shape_rows
from dslm.report.shrunk import BLOCK_HEADER, block_rows, perplexity_rows, shrunk_facts
from dslm.report.tables import columns_table
from dslm.shrink_plan import FIXED, SELF

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.shrink.search import Scored

_SHOWN = 8  # shapes of a search


def fixed_options(function: Any) -> Any:
    """Options for sizes that stay, which only say why."""

    def refuse(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            why, hint = FIXED[str(option.name)]
            raise click.UsageError(f"{option.name} cannot shrink: {why}; {hint}")

    for word in FIXED:
        name = f"--{word.replace('_', '-')}"
        function = click.option(name, word, hidden=True, expose_value=False, callback=refuse)(function)
    return function


@click.command(short_help="Shrink a model.")
@model_argument
@output_option
@click.option(
    "-edd",
    "--embed-dim-divisor",
    metavar="X",
    help="Divide hidden_size and the head counts: 2, 1.5, 4/3.",
)
@click.option("-upd", "--up-proj-divisor", metavar="X", help="Divide intermediate_size.")
@size_options(SHRUNK)
@fixed_options
@click.option("--params", metavar="COUNT", help="Shrink to about this many parameters: 100M.")
@click.option("--keep-ratio", metavar="SHARE", help="Keep about this share of the parameters: 0.8.")
@click.option(
    "--search",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="With --params or --keep-ratio: how many shapes to build and measure; 0 takes the first of dslm plan "
    "without a text.",
)
@click.option("--like", "like_model", metavar="MODEL", help="Shrink to the shape of another model.")
@plan_option
@click.option(
    "--method",
    type=click.Choice(SHRINK_METHODS),
    default="reconstruct",
    show_default=True,
    help="Make up for what is cut, or only cut.",
)
@click.option(
    "--calibration",
    multiple=True,
    default=(SELF,),
    show_default=True,
    metavar="TEXT",
    help="Text or JSON-lines file, or data set on the hub; self: the model writes it. Repeat it to mix several.",
)
@click.option(
    "--samples",
    type=int,
    default=64,
    show_default=True,
    help="Windows of calibration text; some are held out.",
)
@click.option("--sequence-length", type=int, default=512, show_default=True, help="Tokens in a window.")
@click.option(
    "--refine",
    type=click.IntRange(0),
    metavar="STEPS",
    help="Optimiser steps on every block after the closed form; 0 for none.  [default: up to 600 on the last block and "
    "on those beside dropped ones, none elsewhere]",
)
@click.option(
    "--check",
    type=Place(),
    metavar="TEXT",
    help="Another text file, to report the perplexity on.",
)
@untie_option
@seed_option
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Where to run; auto: a GPU if there is one.",
)
@heal_tokens_option
@heal_data_option
@overwrite_option
@dry_run_option
@output_options
def command(
    model: str,
    output: Path | None,
    plan_file: Path | None,
    check: Path | None,
    device: str,
    heal_tokens: str | None,
    data: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Shrink a model to a smaller one of the same architecture; --heal-tokens trains it after that.

    Sizes come from divisors, by name, from --params or --keep-ratio, or from --like. What is redundant goes without
    loss; what remains to be cut is made up for block by block, by least squares and, in the last block and beside
    dropped ones, a few optimiser steps. The output is a plain checkpoint in the source's dtype.
    """
    if plan_file is not None:
        refuse_beside_plan(
            click.get_current_context(), FREE_BESIDE_PLAN | {"check", "device", "heal_tokens", "data"}
        )
    check_healing(heal_tokens, data, output, overwrite=overwrite)
    source = open_model(model, weights=not dry_run or options["search"] > 0, quiet=quiet)
    plan = Plan.from_yaml(plan_file) if plan_file else _plan(source, options, [])
    if not plan.shrinks:
        raise RecipeError(f"{plan_file} is a plan to grow", "give it to dslm up")
    healing = healing_text(data, plan) if heal_tokens is not None else ()
    if heal_tokens is not None and not dry_run:
        read_healing_text(source, heal_tokens, healing, plan.seed)
    shapes: list[Scored] = []
    if options["search"]:
        check_search(source, plan.target, options, None if dry_run else output, overwrite=overwrite)
        if check is not None:  # it may turn out to be of no use, which shrinking would say after the search
            from dslm.shrink.calibrate import check_windows

            check_windows(source, check, length=options["sequence_length"], limit=1)
        place = None if dry_run else output or Path("out")
        shapes = search_shapes(source, options, device, place, quiet=quiet)
        plan = _plan(source, options, shapes)
    check_plan(plan, source.family, source.config)
    plan = replace(plan, model=recorded_name(model, source))
    if not plan.methods:
        same = "--untie takes nothing away" if options["untie"] else "the target is the source"
        raise RecipeError(f"nothing to shrink: {same}", "give -edd, -upd, a size, --params or --keep-ratio")
    facts = change_facts(source, plan) | {"seed": plan.seed, "calibration": plan.calibration}
    if shapes:
        facts["shapes"] = [shape_facts(shape) for shape in shapes]
    if shapes and not as_json:
        rows = shape_rows(shapes[:_SHOWN], wanted_parameters(source, options))
        console().print("perplexity of legal shapes\n", columns_table(SHAPE_HEADER, rows), "", sep="\n")
    if dry_run:
        _report(facts | {"output": None}, as_json)
        return
    from dslm.shrink.down import shrink_checkpoint

    out = output or default_output(source, facts)
    with progress_bar(quiet=quiet) as progress:
        done = shrink_checkpoint(
            source, plan, out, check=check, overwrite=overwrite, device=device, progress=progress
        )
    facts |= shrunk_facts(done) | {"output": str(out)}
    if heal_tokens is not None:
        facts["healed"] = heal(
            out, model, heal_tokens, healing, plan.seed, device, overwrite=overwrite, quiet=quiet
        )
    _report(facts, as_json)


def _plan(source: Checkpoint, options: dict[str, Any], shapes: list[Scored]) -> Plan:
    target = shapes[0].sizes if shapes else target_sizes(source, options)
    return plan_shrink(
        source.name,
        source.family,
        source.config,
        target.replace(tied=False) if options["untie"] else target,
        method=options["method"],
        texts=options["calibration"],
        samples=options["samples"],
        length=options["sequence_length"],
        refine=options["refine"],
        seed=options["seed"],
    )


def _report(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    out = console()
    rows = change_rows(facts, lambda before, after: f"{after / before:.1%}")
    out.print(columns_table(("", "before", "after", "kept"), rows))
    if facts["output"] is not None:
        _print_measured(facts)
    method = next(iter(facts["methods"].values()))
    out.print(f"\n{method}, seed {facts['seed']}")
    if facts["output"] is None:
        out.print("nothing written (--dry-run)")
    else:
        out.print(f"written to {facts['output']} in {facts['seconds']:.1f} s")
    if "healed" in facts:
        healed = facts["healed"]
        before, after = healed["perplexity"]["before"], healed["perplexity"]["after"]
        out.print(f"healed on {healed['tokens']:,} tokens: held-out perplexity {before:.2f} -> {after:.2f}")


def _print_measured(facts: dict[str, Any]) -> None:
    out = console()
    removed = facts["removed_without_loss"]
    lost = ", ".join(f"{count:,} of {word}" for word, count in removed.items())
    out.print(f"\nremoved without loss: {lost or 'nothing'}")
    if not facts["block_errors"]:
        out.print("nothing was approximated: it computes the same function")
    if facts["texts"]:
        out.print()
        out.print(columns_table(("perplexity on", "before", "after", ""), perplexity_rows(facts["texts"])))
    if facts["tokens"]:
        out.print(f"calibrated on {facts['tokens']:,} tokens of {facts['origin']}")
    if facts["block_errors"]:
        out.print()
        out.print(columns_table(BLOCK_HEADER, block_rows(facts["block_errors"], facts["layers"])))
