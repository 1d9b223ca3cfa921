"""Where answers appear: streamed one after the other, or in two columns on a terminal that is wide enough."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TextIO

import click

from dslm.cli.common import console, remark

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

_GAP = 3
_MARGIN = 4
"""Columns kept free at the right: a terminal shows ^C where the cursor is, and must not begin a line for it."""
_NARROWEST = 72
"""Columns of a terminal below which two answers side by side are no help."""
_FRAME = 0.1
"""Seconds between two pictures, so that drawing does not hold up writing."""


class Screen(Protocol):
    """What a conversation needs of a place for answers."""

    def turn(self) -> AbstractContextManager[None]:
        """Everything that is said to one message appears inside."""

    def begin(self, index: int) -> None:
        """The model of this number begins to answer."""

    def write(self, text: str) -> None:
        """It goes on."""

    def end(self, notes: Sequence[str], error: str = "") -> None:
        """It is done: remarks about the answer, and why there is none or no more of it."""


def screen_for(labels: list[str], *, as_json: bool, interactive: bool, quiet: bool) -> Screen:
    """The best place there is.

    Args:
        labels: the name of each model.
        as_json: keep stdout for one object; answers then appear on stderr, for a person only.
        interactive: whether a person types the messages.
        quiet: make no remarks.
    """
    if as_json:
        return Stream(labels, sys.stderr if interactive else None, interactive=interactive, quiet=quiet)
    if len(labels) > 1 and interactive and sys.stdout.isatty() and console().width >= _NARROWEST:
        return Columns(labels, quiet=quiet)
    return Stream(labels, sys.stdout, interactive=interactive, quiet=quiet)


class Stream:
    """Answers one after the other, an empty line between them, each under its model's name if there are two."""

    def __init__(self, labels: list[str], file: TextIO | None, *, interactive: bool, quiet: bool) -> None:
        self._labels = labels
        self._file = file
        self._interactive = interactive
        self._quiet = quiet
        self._below_text = False
        self._last = "\n"

    def turn(self) -> AbstractContextManager[None]:
        """Nothing frames an answer here."""
        return nullcontext()

    def begin(self, index: int) -> None:
        """Set off the answer from what is above it."""
        if self._below_text and not self._interactive:
            self.write("\n")
            self._below_text = False
        if len(self._labels) > 1:
            self.write(f"== {self._labels[index]} ==\n")

    def write(self, text: str) -> None:
        """Show one piece of the answer."""
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
        self._last = text
        self._below_text = True

    def end(self, notes: Sequence[str], error: str = "") -> None:
        """End the line; remarks and errors go to stderr."""
        if not self._last.endswith("\n"):
            self.write("\n")
        for note in notes:
            remark(f"[{note}]", quiet=self._quiet)
        if error:
            click.echo(f"dslm: error: {error}", err=True)
        if self._interactive:
            self.write("\n")


class Columns:
    """Two answers side by side; both grow where the reader looks, and stay in full when they are done."""

    def __init__(self, labels: list[str], *, quiet: bool) -> None:
        self._labels = labels
        self._quiet = quiet
        self._console = console()
        self._answers: list[str] = []
        self._done = False
        self._live: Live
        self._drawn = 0.0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Draw until both have answered."""
        from rich.live import Live

        self._answers, self._done = [], False
        with Live(get_renderable=self._picture, console=self._console, auto_refresh=False) as self._live:
            yield
            self._done = True
        self._console.print()

    def begin(self, index: int) -> None:
        """Open the column of this model."""
        assert index == len(self._answers), "models answer in their order"
        self._answers.append("")

    def write(self, text: str) -> None:
        """Show one piece of the answer."""
        self._answers[-1] += text
        if time.monotonic() - self._drawn > _FRAME:
            self._live.refresh()
            self._drawn = time.monotonic()

    def end(self, notes: Sequence[str], error: str = "") -> None:
        """Put remarks and errors under the answer."""
        lines = [self._answers[-1].rstrip()] if self._answers[-1].strip() else []
        lines += [f"[{note}]" for note in notes if not self._quiet]
        lines += [f"error: {error}"] if error else []
        self._answers[-1] = "\n".join(lines)

    def _picture(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        width = (self._console.width - _GAP - _MARGIN) // 2
        table = Table.grid(padding=(0, _GAP, 0, 0))
        for _ in self._labels:
            table.add_column(width=width, overflow="fold")
        table.add_row(
            *(Text(label, style="bold", no_wrap=True, overflow="ellipsis") for label in self._labels)
        )
        table.add_row(*(Text("─" * width, style="dim") for _ in self._labels))
        table.add_row(*(self._visible(Text(answer), width) for answer in self._answers))
        return table

    def _visible(self, answer: Text, width: int) -> Text:
        """All of a finished answer; while it grows, its last lines, for a terminal shows no more than a screen."""
        if self._done:
            return answer
        lines = answer.wrap(self._console, width, overflow="fold")
        return type(answer)("\n").join(lines[-max(1, self._console.height - 4) :])
