"""What every command shares: how a model is named, where output goes, and the progress bar."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dslm.cli import interrupt
from dslm.places import expanded
from dslm.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from dslm.checkpoint.reader import Checkpoint
    from dslm.train.watch import Evaluation


Command = TypeVar("Command", bound=Callable[..., Any])

SCHEMA = 1
"""Version of the objects that ``--json`` prints; it changes when a key changes its meaning."""

_DELAY = 1.0
_PIPE_WIDTH = 120


def model_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``MODEL`` as an argument or with ``-i/--input``; it receives ``model``, a string."""

    @click.argument("model", required=False, metavar="MODEL")
    @click.option(
        "-i", "--input", "model_option", metavar="MODEL", help="The model, instead of the argument."
    )
    @functools.wraps(function)
    def wrapper(*args: Any, model: str | None, model_option: str | None, **options: Any) -> Any:
        if (model is None) == (model_option is None):
            given = "is missing" if model is None else "is given twice"
            message = f"MODEL {given}; give it once, as an argument or with -i"
            raise click.UsageError(message, click.get_current_context())
        return function(*args, model=model_option if model is None else model, **options)

    return wrapper


def output_options(function: Command) -> Command:
    """Give a command ``--json`` (it receives ``as_json``) and ``-q/--quiet`` (``quiet``)."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks on stderr.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    return as_json(quiet(function))


class Place(click.Path):
    """A path, with ``~`` for the home folder also where the shell left it: behind ``--option=``."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        return expanded(os.fsdecode(super().convert(value, param, ctx)))


adapter_option = click.option(
    "--adapter",
    type=Place(),
    metavar="FOLDER",
    help="Low-rank adapters to put on MODEL, as dslm train --lora writes them.",
)


def open_model(
    model: str, *, weights: bool = True, quiet: bool = False, adapter: Path | None = None
) -> Checkpoint:
    """Open what the user named, with a progress bar if it has to be fetched or converted.

    Args:
        model: a folder, a hub id, a ``.gguf`` file or ``demo:smollm2-135m``.
        weights: False when headers are enough.
        quiet: show no progress.
        adapter: adapters that are put on it.

    Raises:
        DslmError: there is no such model, or it cannot be read.
    """
    from dslm.checkpoint.source import open_checkpoint

    with progress_bar(quiet=quiet) as progress:
        checkpoint = open_checkpoint(model, weights=weights, progress=progress)
    if adapter is None:
        return checkpoint
    from dslm.adapter import with_adapter

    return with_adapter(checkpoint, adapter)


def refuse_unused(context: click.Context, unused: Mapping[str, str]) -> None:
    """Refuse options that were given and that nothing would use.

    Args:
        context: of the command.
        unused: name of a parameter -> what it needs.

    Raises:
        click.UsageError: there is one.
    """
    for name, needed in unused.items():
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs {needed}", context)


def console(*, stderr: bool = False) -> Console:
    """A rich console; into a pipe it is wide enough that tables do not wrap."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def print_json(payload: Mapping[str, Any]) -> None:
    """Print one JSON object with its schema number; numbers that JSON lacks become null."""
    click.echo(json.dumps({"schema": SCHEMA, **_finite(payload)}, indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remark(message: str, *, quiet: bool = False) -> None:
    """Say something on stderr, unless quiet."""
    if not quiet:
        click.echo(message, err=True)


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """A callback for the library that draws a bar on stderr.

    Nothing is drawn in the first second, when quiet, or where stderr is not a terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda label, done, total: interrupt.check()
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), left
    bar = Bar(*columns, console=console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}
    begin = time.monotonic()

    def update(label: str, done: int, total: int) -> None:
        interrupt.check()
        key = label.partition("\t")[0]
        if key not in tasks:
            tasks[key] = bar.add_task(key)
        bar.update(tasks[key], description=label.replace("\t", "  "), completed=done, total=total or None)
        if time.monotonic() - begin > _DELAY:
            bar.start()

    try:
        yield update
    finally:
        bar.stop()


def tell_evaluation(found: Evaluation) -> None:
    """Print what an evaluation during training found, on stderr."""
    loss = "" if found.loss is None else f", training loss {found.loss:.4f}"
    remark(
        f"step {found.step}/{found.steps}, {found.tokens:,} tokens{loss}, held-out perplexity {found.perplexity:.3f}"
    )
    if found.sample:
        remark(f"  {' '.join(found.sample.split())}")
