"""``dslm diff``: two models side by side, and a gate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from dslm.cli.common import console, open_model, output_options, print_json, progress_bar
from dslm.places import expanded
from dslm.report.tables import columns_table

if TYPE_CHECKING:
    from dslm.verify import Liveness, Report


@click.command(short_help="Compare two models.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--text", metavar="FILE", help="Compare on this file, or on this text itself.  [default: built in]"
)
@click.option(
    "--max-kl", type=click.FloatRange(min=0), metavar="X", help="Fail above this KL, in nats per token."
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="Fail below this share (0 to 1) of equal likeliest tokens.",
)
@click.option("--require-alive", is_flag=True, help="Fail if anything in B is dead or locked that A had not.")
@click.option("--no-liveness", is_flag=True, help="Skip the liveness of B: faster, less memory.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Numbers to compute the comparison with, whatever the weights are.",
)
@output_options
def command(
    a: str,
    b: str,
    text: str | None,
    max_kl: float | None,
    min_agreement: float | None,
    require_alive: bool,
    no_liveness: bool,
    dtype: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare model B with model A: sizes, logits, perplexity, and whether all of B can learn.

    With --max-kl, --min-agreement or --require-alive the exit code is 1 when B does not meet them.
    """
    if require_alive and no_liveness:
        raise click.UsageError("--require-alive needs the liveness that --no-liveness skips")
    passage = _read_text(text)
    first, second = (open_model(model, quiet=quiet) for model in (a, b))
    from dslm.verify import compare_checkpoints, gate

    with progress_bar(quiet=quiet) as progress:
        report = compare_checkpoints(
            first, second, passage, liveness=not no_liveness, dtype=dtype, progress=progress
        )
    if as_json:
        print_json(report.as_dict())
    else:
        print_report(report)
    gate(report, max_kl=max_kl, min_agreement=min_agreement, require_alive=require_alive)


def _read_text(text: str | None) -> str | None:
    """The contents of a file, or the text itself where it cannot be meant as a file."""
    if text is None:
        return None
    path = expanded(text)
    try:
        is_file, is_there = path.is_file(), path.exists()
    except OSError:  # too long for the name of a file
        is_file = is_there = False
    if is_file:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"--text {text} is not a text file in UTF-8") from error
    named = not any(space in text for space in " \n\t")
    if named and (path.suffix or "/" in text or os.sep in text or is_there):
        raise click.UsageError(f"--text {text}: there is no such file")
    return text


def print_report(report: Report, *, sizes: bool = True) -> None:
    """Print a report: sizes unless they are shown elsewhere, figures next to the floor, and what they mean."""
    from dslm.verify.report import liveness_words, verdict_words

    out = console()
    if sizes:
        out.print(columns_table(("", "A", "B", ""), _size_rows(report)))
        out.print()
    out.print(f"A is {report.a}\nB is {report.b}\n")
    found = report.comparison
    columns = {"B against A": found, "rounding floor of A": report.floor}
    if report.storage is not None:
        columns["A rounded once more"] = report.storage
    rows = [
        ("largest logit difference", *(f"{c.max_difference:.3g}" for c in columns.values())),
        ("  relative to the largest logit", *(f"{c.relative_difference:.3g}" for c in columns.values())),
        ("KL(A || B), nats per token", *(f"{c.kl:.3g}" for c in columns.values())),
        ("top-1 agreement", *(f"{c.agreement:.2%}" for c in columns.values())),
    ]
    out.print(columns_table(("", *columns), rows))
    out.print(f"\nperplexity: A {found.perplexity_a:.4f}, B {found.perplexity_b:.4f}")
    out.print(f"on {found.tokens:,} tokens of {report.text}, computed in {report.dtype}")
    if report.liveness:
        out.print()
        _print_liveness(report.liveness)
    out.print()
    out.print(verdict_words(report))
    for line in liveness_words(report.liveness) if report.liveness else ():
        out.print(f"B is {line}.")


def _size_rows(report: Report) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for word, before in report.sizes_a.items():
        after = report.sizes_b[word]
        if word == "tied":
            rows.append(("embeddings", _tied(before), _tied(after), ""))
        else:
            rows.append((word, f"{before:,}", f"{after:,}", _ratio(before, after)))
    total_a, total_b = report.parameters_a, report.parameters_b
    return [*rows, ("parameters", f"{total_a:,}", f"{total_b:,}", _ratio(total_a, total_b))]


def _tied(tied: int | bool) -> str:
    return "tied" if tied else "untied"


def _ratio(before: int, after: int) -> str:
    return "" if before == after else f"x {after / before:.4g}"


def _print_liveness(liveness: Liveness) -> None:
    rows = [
        (space.name, f"{space.units:,}", f"{space.dead:,}", f"{space.locked:,}") for space in liveness.spaces
    ]
    out = console()
    out.print(columns_table(("liveness of B", "units", "dead", "locked"), rows))
    for example in liveness.examples:
        out.print(f"  {example}")
