"""The entry point: a group whose commands are imported only when they run, and one place for errors."""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches

import click

from dslm.cli import interrupt
from dslm.errors import DslmError, tells_of_memory

COMMANDS: dict[str, tuple[str, str]] = {
    "desc": ("dslm.cli.desc", "Describe a model: sizes, exact parameters, bytes."),
    "gen": ("dslm.cli.gen", "Generate text from a prompt."),
    "chat": ("dslm.cli.chat", "Talk with a model, or compare the answers of two."),
    "plan": ("dslm.cli.plan", "List the legal shapes near a number of parameters."),
    "up": ("dslm.cli.up", "Grow a model; what it computes stays the same."),
    "down": ("dslm.cli.down", "Shrink a model by block-wise reconstruction."),
    "train": ("dslm.cli.train", "Continue training: full, LoRA, QLoRA, distillation."),
    "diff": ("dslm.cli.diff", "Compare two models: sizes, logits, liveness."),
    "eval": ("dslm.cli.eval", "Measure a model: perplexity on text, benchmark tasks."),
}
"""Command -> the module that holds it as ``command``, and its line in ``dslm --help``."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None for a name that is not one."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of a command line.

        Raises:
            click.UsageError: there is no such command; the message names the nearest one.
        """
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


@click.command(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="dslm", prog_name="dslm", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Resize language models: any dense checkpoint in, a plain one out, larger or smaller.

    MODEL is a folder, a hub id, a .gguf file, or demo:smollm2-135m.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Imports make hundreds of thousands of objects that all stay; looking through them for garbage again and again
    # takes a fifth of the time that torch and transformers need to import.
    gc.set_threshold(100_000, 50, 1000)
    _wait_shortly()
    code = run(sys.argv[1:])
    gc.freeze()  # nor need the interpreter look through them once more before it ends
    sys.exit(code)


def _wait_shortly() -> None:
    """Let threads of OpenMP that wait for each other keep their cores busy for a few tenths of a millisecond only.

    As GNU's OpenMP is set otherwise that is milliseconds, in which a machine with other work lets nobody go on: small
    steps then take twice as long. It reads its settings when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def run(arguments: Sequence[str]) -> int:
    """Run one command line; every failure becomes one line on stderr.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0; 1 for a failure; 2 for a wrong command line; 130 when interrupted, 128 more than a signal that ended it.
    """
    debug = bool(os.environ.get("DSLM_DEBUG", "").strip("0"))
    _listen(debug)
    interrupt.listen()
    try:
        for argument in arguments:
            _check_encoding(argument)
        result = cli.main(args=list(arguments), prog_name="dslm", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; no unfinished output is left", 130, prefix="dslm:")
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  (the one place where a failure becomes a line)
        if debug:
            traceback.print_exc()
        return _explain(error)


def _check_encoding(argument: str) -> None:
    """Refuse bytes that are no text, in a path too: no tokenizer and no record could hold them.

    Raises:
        click.UsageError: there are some.
    """
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        shown = argument.encode(errors="replace").decode()
        raise click.UsageError(f"{shown!r} is not UTF-8 text") from error


def _listen(debug: bool) -> None:
    """Send the library's log to stderr; keep other people's warnings for whoever debugs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dslm: %(message)s"))
    logger = logging.getLogger("dslm")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")


def _explain(error: Exception) -> int:
    """Print one line about a failure and return its exit code."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "dslm"
        return _fail(f"{error.format_message().rstrip('.')} (see '{path} --help')", error.exit_code)
    if isinstance(error, click.ClickException):
        return _fail(error.format_message(), error.exit_code)
    if isinstance(error, DslmError):
        return 1 if error.told else _fail(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        hint = "; free some space and try again" if error.errno == errno.ENOSPC else ""
        return _fail(f"{error.strerror or type(error).__name__}{where}{hint}")
    if tells_of_memory(error):
        return _fail("the memory is not enough; take a machine with more of it, or a smaller model")
    return _fail(f"unexpected {type(error).__name__}: {error}; set DSLM_DEBUG=1 for the traceback")


def _fail(message: str, code: int = 1, *, prefix: str = "dslm: error:") -> int:
    line = " ".join(message.split())
    try:
        click.echo(f"{prefix} {line}", err=True)
    except OSError:
        return code
    return code


if __name__ == "__main__":
    main()
