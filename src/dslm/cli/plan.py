"""``dslm plan``: legal shapes near a number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
from dslm.errors import CheckpointError, RecipeError, SizeError
from dslm.plan import METHOD_NAMES, SHRINK_METHODS, Plan, plan_growth, plan_shrink
from dslm.report.shapes import (
    SHAPE_HEADER,
    SizePoint,
    loss_facts,
    perplexity,
    shape_facts,
    shape_rows,
    size_picture,
)
from dslm.report.tables import columns_table
from dslm.sizes import Sizes, count_parameters
from dslm.targets import Candidate, candidates, parse_count
from dslm.targets_down import shrink_candidates

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.shrink.search import Scored

_WIDTHS = {
    "hidden_size": "hidden",
    "intermediate_size": "FFN",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv heads",
}
_SHARES = (0.95, 0.9, 0.85, 0.75, 0.6, 0.5)  # of the picture
_MEASURING = ("samples", "sequence_length", "build")


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
    type=Place(),
    metavar="FILE",
    help="Write the first shape as a plan for dslm up or down --plan.",
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="TEXT",
    help="Rank smaller shapes by what cutting costs on a text, given as to dslm down; repeat it to mix several.",
)
@click.option(
    "--samples",
    type=int,
    default=32,
    show_default=True,
    help="Windows of calibration text; 32 at most are used.",
)
@click.option("--sequence-length", type=int, default=512, show_default=True, help="Tokens in a window.")
@click.option(
    "--build",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="How many of the best shapes to build and measure.",
)
@output_options
def command(
    model: str,
    params: str,
    count: int,
    untie: bool,
    method: str | None,
    yaml_file: Path | None,
    calibration: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **measuring: int,
) -> None:
    """Show legal shapes near a number of parameters, best first.

    Above the model's own size it would grow, below it would shrink. Counts are exact. Shapes are ranked by closeness,
    by how well they keep the model's proportions (down: by how much each cut is likely to cost), and by whether both
    widths are multiples of 256, 128 or 64. Reads the config and headers only.

    With --calibration smaller shapes are ranked by what cutting the model costs on that text, the best are built on a
    few windows and measured, and a picture shows size against loss. What was measured is kept for the next size.
    """
    _refuse_unused(click.get_current_context(), calibration)
    source = open_model(model, weights=bool(calibration), quiet=quiet)
    wanted = parse_count(params)
    now = count_parameters(source.family, source.config)["total"]
    shrinks = wanted < now
    method = _method(method, shrinks)
    text: dict[str, Any] = {}
    if calibration:
        if not shrinks:
            raise RecipeError(
                f"--calibration ranks smaller shapes, and {wanted:,} is not below {now:,}", "leave it out"
            )
        measured = _measure(source, wanted, calibration, measuring, untie=untie, method=method, quiet=quiet)
        best = measured.shapes[0].sizes
        text = {"texts": calibration, "length": measuring["sequence_length"]}
        show = partial(_report_measured, source, measured, count, as_json=as_json)
    else:
        if shrinks:
            found = shrink_candidates(source.family, source.config, wanted, count=count, untie=untie)
        else:
            found = candidates(source.family, source.config, wanted, count=count, untie=untie, method=method)
        best = found[0].sizes
        show = partial(_report, source, found, wanted, as_json=as_json)
    if yaml_file is not None:
        _write_plan(yaml_file, source, best, method, text)
    show()
    if yaml_file is not None and not as_json:
        console().print(f"\nfirst shape written to {yaml_file}")


def _report(source: Checkpoint, found: list[Candidate], wanted: int, *, as_json: bool) -> None:
    if as_json:
        shapes = [c.sizes.as_dict() | {"parameters": c.parameters, "multiple_of": c.friendly} for c in found]
        print_json({"model": source.name, "target": wanted, "candidates": shapes})
        return
    now = count_parameters(source.family, source.config)["total"]
    out = console()
    out.print(f"{source.name}: {now:,} parameters now, {wanted:,} wanted\n")
    layers = {"num_hidden_layers": "layers"} if wanted < now else {}
    columns = layers | _WIDTHS
    header = ("", *columns.values(), "parameters", "off", "multiple of")
    out.print(columns_table(header, [_row(i, c, columns) for i, c in enumerate(found, 1)]))


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is known about sizes of a model: its loss now, shapes at one size, and the best at several."""

    wanted: int
    now: int
    base: float
    shapes: list[Scored]
    picture: list[SizePoint]


def _measure(
    source: Checkpoint,
    wanted: int,
    texts: tuple[str, ...],
    measuring: Mapping[str, int],
    *,
    untie: bool,
    method: str,
    quiet: bool,
) -> _Measured:
    from dslm.shrink.recipe import Recipe
    from dslm.shrink.search import ranked, read_windows, search
    from dslm.shrink.weights import Stored

    weights, recipe = Stored(source), Recipe(solve=method != "slice")
    now = count_parameters(source.family, source.config)["total"]
    shrink_candidates(source.family, source.config, wanted, untie=untie)  # refuses what cannot be, at once
    with progress_bar(quiet=quiet) as progress:
        samples, length = measuring["samples"], measuring["sequence_length"]
        windows = read_windows(source, texts, samples=samples, length=length, progress=progress)
        found = search(
            weights,
            wanted,
            windows,
            build=measuring["build"],
            untie=untie,
            recipe=recipe,
            progress=progress,
        )
    base = found.known.base
    picture = [SizePoint(1.0, now, base)]
    for share in _SHARES:
        with suppress(SizeError):  # smaller than the smallest shape there is
            best = ranked(found.known, weights, round(share * now), untie=untie, recipe=recipe)[0]
            picture.append(SizePoint(share, best.parameters, best.predicted))
    return _Measured(wanted, now, base, found.shapes, picture)


def _report_measured(source: Checkpoint, found: _Measured, count: int, *, as_json: bool) -> None:
    shapes = found.shapes[:count]
    if as_json:
        print_json(
            {
                "model": source.name,
                "target": found.wanted,
                "parameters": found.now,
                "before": loss_facts(found.base),
                "candidates": [shape_facts(shape) for shape in shapes],
                "picture": [
                    {"share": p.share, "parameters": p.parameters, "predicted": loss_facts(p.loss)}
                    for p in found.picture
                ],
            }
        )
        return
    out = console()
    out.print(f"{source.name}: {found.now:,} parameters now, {found.wanted:,} wanted")
    out.print(f"perplexity now {perplexity(found.base):.2f}; of smaller shapes:\n")
    out.print(columns_table(SHAPE_HEADER, shape_rows(shapes, found.wanted)))
    out.print("\nsize against loss, as predicted for the best shape of each size:\n")
    out.print("\n".join(size_picture(found.picture)))


def _refuse_unused(context: click.Context, calibration: tuple[str, ...]) -> None:
    """Options of a measurement say nothing without a text.

    Raises:
        click.UsageError: one was given without it.
    """
    for name in _MEASURING:
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and not calibration:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --calibration TEXT")


def _method(method: str | None, shrinks: bool) -> str:
    """The method that was asked for, which must be of the right direction, or the usual one."""
    known = SHRINK_METHODS if shrinks else METHOD_NAMES
    if method is not None and method not in known:
        direction = "shrink" if shrinks else "grow"
        raise RecipeError(f"--method {method} does not {direction}", f"{direction} with {', '.join(known)}")
    return method or known[0]


def _write_plan(path: Path, source: Checkpoint, sizes: Sizes, method: str, text: Mapping[str, Any]) -> None:
    make: Callable[..., Plan] = plan_shrink if method in SHRINK_METHODS else plan_growth
    plan = make(source.name, source.family, source.config, sizes, method=method, **text)
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
