"""``dslm plan``: legal shapes near a number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dslm.cli.common import console, model_argument, open_model, output_options, print_json
from dslm.errors import CheckpointError, RecipeError
from dslm.plan import GROWN, METHOD_NAMES, SHRINK_METHODS, Plan, plan_growth, plan_shrink
from dslm.report.tables import columns_table
from dslm.sizes import count_parameters
from dslm.targets import Candidate, candidates, parse_count
from dslm.targets_down import shrink_candidates

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint


@click.command(short_help="Show legal shapes near a size.")
@model_argument
@click.option("--params", required=True, metavar="COUNT", help="Parameters to reach: 360M, 1.5B.")
@click.option("-n", "--count", type=click.IntRange(1), default=8, show_default=True, help="How many shapes.")
@click.option("--untie", is_flag=True, help="The output has its own table.")
@click.option(
    "--method",
    type=click.Choice((*METHOD_NAMES, *SHRINK_METHODS)),
    help="How it will be resized. [default: hypercloning up, reconstruct down]",
)
@click.option(
    "--yaml",
    "yaml_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the first shape as a plan for dslm up or down --plan.",
)
@output_options
def command(
    model: str,
    params: str,
    count: int,
    untie: bool,
    method: str | None,
    yaml_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show legal shapes near a number of parameters, best first.

    Above the model's own size it would grow, below it would shrink. Counts are exact. Shapes are ranked by closeness,
    by how well they keep the model's proportions (down: by how much each cut is likely to cost), and by whether both
    widths are multiples of 256, 128 or 64. Reads the config and headers only.
    """
    source = open_model(model, weights=False, quiet=quiet)
    wanted = parse_count(params)
    now = count_parameters(source.family, source.config)["total"]
    shrinks = wanted < now
    method = _method(method, shrinks)
    if shrinks:
        found = shrink_candidates(source.family, source.config, wanted, count=count, untie=untie)
    else:
        found = candidates(source.family, source.config, wanted, count=count, untie=untie, method=method)
    if yaml_file is not None:
        _write_plan(yaml_file, source, found[0], method)
    if as_json:
        shapes = [c.sizes.as_dict() | {"parameters": c.parameters, "multiple_of": c.friendly} for c in found]
        print_json({"model": source.name, "target": wanted, "candidates": shapes})
        return
    out = console()
    out.print(f"{source.name}: {now:,} parameters now, {wanted:,} wanted\n")
    layers = {"num_hidden_layers": "layers"} if shrinks else {}
    columns = layers | dict(zip(GROWN, ("hidden", "FFN", "heads", "kv heads"), strict=True))
    header = ("", *columns.values(), "parameters", "off", "multiple of")
    out.print(columns_table(header, [_row(i, c, columns) for i, c in enumerate(found, 1)]))
    if yaml_file is not None:
        out.print(f"\nfirst shape written to {yaml_file}")


def _method(method: str | None, shrinks: bool) -> str:
    """The method that was asked for, which must be of the right direction, or the usual one."""
    known = SHRINK_METHODS if shrinks else METHOD_NAMES
    if method is not None and method not in known:
        direction = "shrink" if shrinks else "grow"
        raise RecipeError(f"--method {method} does not {direction}", f"{direction} with {', '.join(known)}")
    return method or known[0]


def _write_plan(path: Path, source: Checkpoint, candidate: Candidate, method: str) -> None:
    make: Callable[..., Plan] = plan_shrink if method in SHRINK_METHODS else plan_growth
    plan = make(source.name, source.family, source.config, candidate.sizes, method=method)
    try:
        path.write_text(plan.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}", "give another FILE") from error


def _row(rank: int, candidate: Candidate, words: Iterable[str]) -> tuple[str, ...]:
    widths = [f"{getattr(candidate.sizes, word):,}" for word in words]
    return (
        str(rank),
        *widths,
        f"{candidate.parameters:,}",
        f"{candidate.off:+.2%}",
        str(candidate.friendly) if candidate.friendly > 1 else "-",
    )
