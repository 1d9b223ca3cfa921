"""What ``down`` does after shrinking when it is asked to: a short distillation from the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dslm.cli.common import progress_bar
from dslm.errors import RecipeError
from dslm.targets import parse_count

heal_tokens_option = click.option(
    "--heal-tokens", metavar="COUNT", help="Then train on so many tokens with the source as teacher: 100k."
)
heal_data_option = click.option(
    "--data", multiple=True, metavar="DATA", help="Text for --heal-tokens.  [default: the calibration text]"
)


def check_healing(tokens: str | None, data: tuple[str, ...], calibration: str | None) -> tuple[str, ...]:
    """The text to heal on; empty if healing was not asked for.

    Raises:
        RecipeError: there is a text and no number of tokens, or the other way round.
    """
    if tokens is None:
        if data:
            raise RecipeError("--data is for healing", "say how long with --heal-tokens")
        return ()
    parse_count(tokens)
    if not data and calibration is None:
        raise RecipeError("there is no text to heal on", "name some with --data or --calibration")
    return data or (str(calibration),)


def heal(
    out: Path, teacher: str, tokens: str, data: tuple[str, ...], seed: int, device: str, *, quiet: bool
) -> dict[str, Any]:
    """Train a model that was just shrunk, in its place; what was reached.

    If it fails the model stays as shrinking left it.

    Raises:
        DslmError: the text cannot be used, or the training failed.
    """
    from dslm.checkpoint.reader import open_folder
    from dslm.train.run import train_checkpoint
    from dslm.train.settings import Training

    asked = Training(
        data=data,
        tokens=parse_count(tokens),
        teacher=teacher,
        seed=seed,
        device="cpu" if device == "cpu" else "auto",
    )
    with progress_bar(quiet=quiet) as progress:
        done = train_checkpoint(
            open_folder(out), asked, out, in_place=True, overwrite=True, progress=progress
        )
    before, after = done.perplexity
    return {"tokens": done.tokens, "perplexity": {"before": before, "after": after}, "seconds": done.seconds}
