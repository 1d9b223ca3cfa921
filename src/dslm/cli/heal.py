"""What ``down`` does after shrinking when it is asked to: a short distillation from the source."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import click

from dslm.checkpoint.reader import Checkpoint
from dslm.cli.common import progress_bar, remark, tell_evaluation
from dslm.errors import DslmError, RecipeError, VerificationError
from dslm.places import expanded
from dslm.plan import Plan
from dslm.shrink_plan import SELF, names_data_set
from dslm.targets import parse_count
from dslm.train.runs import check_run, goes_on_in_place, run_folder
from dslm.train.settings import Training

heal_tokens_option = click.option(
    "--heal-tokens", metavar="COUNT", help="Then train on so many tokens with the source as teacher: 100k."
)
heal_data_option = click.option(
    "--data", multiple=True, metavar="DATA", help="Text for --heal-tokens.  [default: the calibration text]"
)


def check_healing(tokens: str | None, data: tuple[str, ...], out: Path | None, *, overwrite: bool) -> None:
    """Refuse before a long shrink what would keep it from being healed.

    Raises:
        RecipeError: there is a text and no number of tokens, or no such text.
        MissingExtraError: a package is not installed.
        CheckpointError: an unfinished run is in the place.
    """
    if tokens is None:
        if data:
            raise RecipeError("--data is for healing", "say how long with --heal-tokens")
        return
    from dslm.train.run import need_packages

    need_packages(_training(tokens, data))
    if out is not None:
        check_run(run_folder(out), resume=False, overwrite=overwrite)
    for source in data:
        if not names_data_set(source) and not expanded(source).exists():
            raise RecipeError(
                f"there is no file {source}", "give a text file or a data set's owner/name[:configuration]"
            )


def healing_text(data: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """The text to heal on: what was named, or what the shrink is calibrated on.

    Raises:
        RecipeError: there is none.
    """
    data = data or tuple(text for text in (plan.calibration or {}).get("texts", ()) if text != SELF)
    if not data:
        raise RecipeError("there is no text to heal on", "name some with --data or --calibration")
    return data


def read_healing_text(source: Checkpoint, tokens: str, data: tuple[str, ...], seed: int) -> None:
    """Read the text once before a long shrink.

    Raises:
        RecipeError: it cannot be read, or is too short.
        CheckpointError: the model has no tokenizer, or not one that fits.
    """
    from dslm.train.run import check_data

    try:
        check_data(source, _training(tokens, data, seed=seed))
    except RecipeError as error:
        hint = "give more text, or another one, with --data" if "--block-size" in error.hint else error.hint
        raise RecipeError(error.message, hint) from error


def _training(tokens: str, data: tuple[str, ...], **options: Any) -> Training:
    return Training(data=data, tokens=parse_count(tokens, "tokens"), **options)


def heal(
    out: Path,
    teacher: str,
    tokens: str,
    data: tuple[str, ...],
    seed: int,
    device: str,
    *,
    overwrite: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Train a model that was just shrunk, in its place; what was reached.

    If it fails or is interrupted the model stays as shrinking left it.

    Raises:
        DslmError: the text cannot be used, or the training failed.
    """
    from dslm.checkpoint.reader import open_folder
    from dslm.train.run import train_checkpoint

    if overwrite and goes_on_in_place(out, out):  # a run of the model that was there before
        shutil.rmtree(run_folder(out), ignore_errors=True)
    asked = _training(tokens, data, teacher=teacher, seed=seed, device="cpu" if device == "cpu" else "auto")
    try:
        with progress_bar(quiet=quiet) as progress:
            done = train_checkpoint(
                open_folder(out),
                asked,
                out,
                in_place=True,
                overwrite=overwrite,
                progress=progress,
                on_evaluation=None if quiet else tell_evaluation,
            )
    except VerificationError:  # the same run again would end the same
        remark(f"{out} is shrunk, not healed", quiet=False)
        raise
    except (KeyboardInterrupt, DslmError):
        remark(f"{out} is shrunk, not healed; {_how_to_heal(out, asked, tokens)} does that", quiet=False)
        raise
    before, after = done.perplexity
    return {"tokens": done.tokens, "perplexity": {"before": before, "after": after}, "seconds": done.seconds}


def _how_to_heal(out: Path, asked: Training, tokens: str) -> str:
    """The command that goes on with a run that broke off, or begins it."""
    begun = goes_on_in_place(out, out)
    place = ["-o", str(out), "--resume"] if begun else ["-o", f"{out}-healed"]
    words = ["dslm", "train", str(out), *place, "--teacher", str(asked.teacher), "--tokens", tokens]
    words += [word for source in asked.data for word in ("--data", source)]
    words += ["--seed", str(asked.seed)] if asked.seed else []
    return shlex.join(words + (["--device", "cpu"] if asked.device == "cpu" else []))
