"""``dslm chat``: a conversation with a model, or with two side by side."""

from __future__ import annotations

import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

import click

from dslm.chat import Chatter, Conversation, payload
from dslm.cli import interrupt
from dslm.cli.answers import screen_for
from dslm.cli.common import adapter_option, model_argument, open_model, output_options, print_json, remark
from dslm.cli.sampling import random_seed, sampling_options
from dslm.cli.session import Session
from dslm.sampler import load

_PROMPT = "> "


@click.command(short_help="Talk with a model.")
@model_argument
@click.option("--against", metavar="MODEL", help="A second model that answers the same messages beside it.")
@click.option("--system", default="", metavar="TEXT", help="Text that tells the model how to answer.")
@adapter_option
@sampling_options(n_predict=512)
@output_options
def command(
    model: str,
    against: str | None,
    system: str,
    adapter: Path | None,
    n_predict: int,
    seed: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
    **drawing: float,
) -> int:
    """Talk with a model: each line is a message, /help lists the commands, Ctrl-C stops an answer.

    A model without a chat template goes on with the text of the conversation. From a pipe, each line of stdin is a
    message or a command, and Ctrl-C ends the program. --json prints the whole conversation when it is over.

    With --against both models draw from the same seed. A model that was only grown then says what its source says,
    as far as rounding lets it: with --dtype float32 word for word, or nearly.
    """
    given = [model] if against is None else [model, against]
    checkpoints = [open_model(model, quiet=quiet, adapter=adapter)]
    checkpoints += [] if against is None else [open_model(against, quiet=quiet)]
    chatters = [Chatter(load(checkpoint, device=device, dtype=dtype)) for checkpoint in checkpoints]
    for chatter in chatters:
        chatter.check_system(system)
    interrupt.check()
    interactive = sys.stdin.isatty()
    names = [checkpoint.name for checkpoint in checkpoints]
    names = names if len(set(names)) == len(names) else given
    session = Session(
        chatters=chatters,
        names=names,
        screen=screen_for(names, as_json=as_json, interactive=interactive, quiet=quiet),
        params={"n": n_predict, **drawing, "seed": random_seed() if seed is None else seed},
        talks=[Conversation(system) for _ in chatters],
        interactive=interactive,
    )
    _welcome(session, told=seed is not None, quiet=quiet)
    _talk(session, with_editing=interactive and sys.stdout.isatty() and not as_json)
    if as_json:
        print_json(payload(session.named()))
    return 1 if session.failed and not interactive else 0


def _welcome(session: Session, *, told: bool, quiet: bool) -> None:
    """Say once what a newcomer needs; ``told`` is whether the seed is known already."""
    if not told and session.params["temperature"] > 0:
        remark(f"seed {session.params['seed']}", quiet=quiet)
    for name, chatter in zip(session.names, session.chatters, strict=True):
        if session.interactive:
            remark(f"{name} ({chatter.loaded.device}, {chatter.loaded.dtype})", quiet=quiet)
        if not chatter.has_template:
            remark(
                f"{name} has no chat template: each message is the next line of one text, and it goes on from there",
                quiet=quiet,
            )
    if session.interactive:
        remark("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves\n", quiet=quiet)


def _talk(session: Session, *, with_editing: bool) -> None:
    """Take lines until there are no more."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text is no reason to stop
    if with_editing:
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    while True:
        try:
            line = _line(session.interactive, with_editing)
            if line is None or not session.take(line):
                return
        except KeyboardInterrupt:
            if not session.interactive:
                raise
            interrupt.clear()
            click.echo("\n/quit or Ctrl-D leaves", err=True)


def _line(interactive: bool, with_editing: bool) -> str | None:
    """The next line without its end; None when there are no more."""
    if with_editing:
        with suppress(EOFError):
            return input(_PROMPT)
        click.echo()  # the shell's prompt begins on a line of its own
        return None
    if interactive:
        click.echo(_PROMPT, err=True, nl=False)
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
