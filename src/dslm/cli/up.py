"""``dslm up``: grow a model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dslm.checkpoint.config import DTYPE_NAMES
from dslm.cli.common import (
    console,
    model_argument,
    open_model,
    output_options,
    print_json,
    progress_bar,
)
from dslm.cli.sizes import (
    FREE_BESIDE_PLAN,
    change_facts,
    change_rows,
    default_output,
    dry_run_option,
    named_sizes,
    output_option,
    overwrite_option,
    plan_option,
    recorded_name,
    refuse_beside_plan,
    seed_option,
    size_options,
    sizes_of,
    untie_option,
)
from dslm.errors import RecipeError, VerificationError
from dslm.plan import COPYING, GROWN, METHOD_NAMES, Plan, check_plan, plan_growth
from dslm.report.tables import columns_table
from dslm.sizes import Sizes, differing
from dslm.targets import candidates, like, parse_count, parse_multiplier, scaled

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.progress import Progress


@click.command(short_help="Grow a model.")
@model_argument
@output_option
@click.option(
    "-edm",
    "--embed-dim-multiplier",
    metavar="X",
    help="Multiply hidden_size and the head counts: 2, 1.5, 4/3.",
)
@click.option("-upm", "--up-proj-multiplier", metavar="X", help="Multiply intermediate_size.")
@size_options(GROWN)
@click.option("--params", metavar="COUNT", help="Grow to about this many parameters: 360M, 1.5B.")
@click.option("--like", "like_model", metavar="MODEL", help="Grow to the shape of another model.")
@plan_option
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default="hypercloning",
    show_default=True,
    help="How new capacity is made.",
)
@click.option(
    "--split",
    type=click.Choice(["uneven", "even"]),
    default="uneven",
    show_default=True,
    help="How copies share what they are read with.",
)
@click.option(
    "--snr-db",
    type=float,
    metavar="DB",
    help="Split evenly and add the HyperCloning paper's noise at this level.",
)
@untie_option
@seed_option
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPE_NAMES.values())),
    help="dtype of the output. [default: as the source]",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare the result with the source, and fail unless it is the same function and alive.",
)
@overwrite_option
@dry_run_option
@output_options
def command(
    model: str,
    output: Path | None,
    plan_file: Path | None,
    dtype: str | None,
    verify: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Grow a model to a larger one that computes the same function.

    Sizes come from multipliers, by name, from --params, or from --like. The output is a plain checkpoint of the
    same architecture in the source's dtype.
    """
    if plan_file is not None:
        refuse_beside_plan(click.get_current_context(), FREE_BESIDE_PLAN | {"verify"})
    _check_split(options)
    source = open_model(model, weights=not dry_run, quiet=quiet)
    plan = Plan.from_yaml(plan_file) if plan_file else _plan(source, dtype, options)
    if plan.shrinks:
        raise RecipeError(f"{plan_file} is a plan to shrink", "give it to dslm down")
    check_plan(plan, source.family, source.config)
    plan = replace(plan, model=recorded_name(model, source))
    facts = change_facts(source, plan) | {"split": plan.split, "seed": plan.seed}
    if not differing(plan.source, plan.target) and plan.dtype is None:
        raise RecipeError(
            "nothing to grow: the target is the source", "give -edm, -upm, a size, --params or --like"
        )
    out = output or default_output(source, facts)
    if dry_run:
        from dslm.checkpoint.reader import torch_dtype
        from dslm.grow.maps import build_growth

        build_growth(source.family, source.config, plan, torch_dtype(plan.dtype or source.dtype))
        _report(facts | {"output": None}, as_json)
        return
    from dslm.resizing import resize

    with progress_bar(quiet=quiet) as progress:
        check = (
            partial(_verify, source, out.resolve().name, plan.split, progress, quiet or as_json)
            if verify
            else None
        )
        done = resize(source, plan, out, overwrite=overwrite, check=check, progress=progress)
    _report(facts | {"output": str(out), "measured": dict(done.measured)}, as_json)


def _plan(source: Checkpoint, dtype: str | None, options: dict[str, Any]) -> Plan:
    target = target_sizes(source, options)
    if options["untie"]:
        target = target.replace(tied=False)
    return plan_growth(
        source.name,
        source.family,
        source.config,
        target,
        method=options["method"],
        split=options["split"],
        snr_db=options["snr_db"],
        seed=options["seed"],
        dtype=next((code for code, name in DTYPE_NAMES.items() if name == dtype), None),
    )


def _check_split(options: dict[str, Any]) -> None:
    """Refuse a split that would change nothing."""
    given = (
        click.get_current_context().get_parameter_source("split") is click.core.ParameterSource.COMMANDLINE
    )
    named = ["--split"] * given + ["--snr-db"] * (options["snr_db"] is not None)
    if named and options["method"] == "padding":
        raise RecipeError(f"{named[0]} is for copies, and padding makes none", "leave one of them out")
    if len(named) == 2:
        raise RecipeError("--snr-db is a split of its own: even, with noise", "leave out --split")


def target_sizes(source: Checkpoint, options: dict[str, Any]) -> Sizes:
    """The sizes that the command's options ask for.

    Raises:
        RecipeError: two ways of asking were mixed.
        SizeError: what is asked for is not legal.
    """
    hidden_times, ffn_times = options["embed_dim_multiplier"], options["up_proj_multiplier"]
    named = named_sizes(
        options,
        GROWN,
        {"--params": options["params"], "--like": options["like_model"]},
        "multipliers",
        {"hidden_size": hidden_times, "intermediate_size": ffn_times},
    )
    family, config = source.family, source.config
    if options["params"] is not None:
        wanted = parse_count(options["params"])
        return candidates(family, config, wanted, untie=options["untie"], method=options["method"])[0].sizes
    if options["like_model"] is not None:
        return like(source.sizes, sizes_of(options["like_model"]))
    hidden = parse_multiplier("1" if hidden_times is None else hidden_times)
    intermediate = parse_multiplier("1" if ffn_times is None else ffn_times)
    return scaled(family, config, hidden, intermediate).with_named(family, named)


def _verify(
    source: Checkpoint, name: str, split: str, progress: Progress, quiet: bool, folder: Path
) -> dict[str, Any]:
    """Compare the finished checkpoint with its source before it takes its place; print what was measured."""
    from dslm.checkpoint.reader import open_folder
    from dslm.cli.diff import print_report
    from dslm.verify import compare_checkpoints, gate

    report = compare_checkpoints(source, open_folder(folder, name), progress=progress)
    if not quiet:
        print_report(report, sizes=False)
        console().print()
    if report.verdict not in ("identical", "same", "rounded"):
        raise VerificationError(f"{name} is not the function of {source.name}: KL {report.comparison.kl:.3g}")
    assert report.liveness is not None, "asked for above"
    if split != "even" or not report.liveness.alive:  # whoever asks for even copies asks for locked ones
        gate(report, require_alive=True)
    return report.measured()


def _report(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    out = console()
    rows = change_rows(facts, lambda a, b: f"x {b / a:.4g}")
    out.print(columns_table(("", "before", "after", ""), rows))
    methods = list(dict.fromkeys(facts["methods"].values()))
    if methods:
        split = [f"{facts['split']} split"] if set(methods) & set(COPYING) else []
        out.print("\n" + ", ".join([*methods, *split, f"seed {facts['seed']}"]))
    out.print(f"written to {facts['output']}" if facts["output"] else "nothing written (--dry-run)")
