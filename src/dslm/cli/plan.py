"""``dslm plan``: legal shapes near a number of parameters."""

from __future__ import annotations

from pathlib import Path

import click

from dslm.cli.common import console, model_argument, open_model, output_options, print_json
from dslm.errors import CheckpointError
from dslm.plan import GROWN, METHOD_NAMES, plan_growth
from dslm.report.tables import columns_table
from dslm.sizes import count_parameters
from dslm.targets import Candidate, candidates, parse_count


@click.command(short_help="Show legal shapes near a size.")
@model_argument
@click.option("--params", required=True, metavar="COUNT", help="Parameters to reach: 360M, 1.5B.")
@click.option("-n", "--count", type=click.IntRange(1), default=8, show_default=True, help="How many shapes.")
@click.option("--untie", is_flag=True, help="The output has its own table.")
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default="hypercloning",
    show_default=True,
    help="How it will be grown.",
)
@click.option(
    "--yaml",
    "yaml_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the first shape as a plan for dslm up --plan.",
)
@output_options
def command(
    model: str,
    params: str,
    count: int,
    untie: bool,
    method: str,
    yaml_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show legal shapes near a number of parameters, best first.

    Counts are exact. Shapes are ranked by closeness, by how well they keep the model's proportions, and by
    whether both widths are multiples of 256, 128 or 64. Reads the config and headers only.
    """
    source = open_model(model, weights=False, quiet=quiet)
    wanted = parse_count(params)
    found = candidates(source.family, source.config, wanted, count=count, untie=untie, method=method)
    if yaml_file is not None:
        plan = plan_growth(source.name, source.family, source.config, found[0].sizes, method=method)
        try:
            yaml_file.write_text(plan.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {yaml_file}: {error.strerror}", "give another FILE"
            ) from error
    if as_json:
        shapes = [c.sizes.as_dict() | {"parameters": c.parameters, "multiple_of": c.friendly} for c in found]
        print_json({"model": source.name, "target": wanted, "candidates": shapes})
        return
    now = count_parameters(source.family, source.config)["total"]
    out = console()
    out.print(f"{source.name}: {now:,} parameters now, {wanted:,} wanted\n")
    header = ("", "hidden", "FFN", "heads", "kv heads", "parameters", "off", "multiple of")
    out.print(columns_table(header, [_row(i, c) for i, c in enumerate(found, 1)]))
    if yaml_file is not None:
        out.print(f"\nfirst shape written to {yaml_file}")


def _row(rank: int, candidate: Candidate) -> tuple[str, ...]:
    widths = [f"{getattr(candidate.sizes, word):,}" for word in GROWN]
    return (
        str(rank),
        *widths,
        f"{candidate.parameters:,}",
        f"{candidate.off:+.2%}",
        str(candidate.friendly) if candidate.friendly > 1 else "-",
    )
