"""``dslm eval``: how well a model predicts a text, and what it scores on benchmark tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dslm.cli.common import (
    Place,
    adapter_option,
    console,
    model_argument,
    open_model,
    output_options,
    print_json,
    progress_bar,
    refuse_unused,
)
from dslm.report.tables import columns_table, pairs_table

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.verify.harness import Suite
    from dslm.verify.perplexity import TextReport
    from dslm.verify.tasks import TaskReport


@click.command(short_help="Measure a model on text and tasks.")
@model_argument
@click.option(
    "--text",
    type=Place(),
    metavar="FILE",
    help="Text or JSON-lines file to predict.  [default: built in, unless --tasks is given]",
)
@click.option(
    "--tasks",
    metavar="NAMES",
    help="Tasks of lm-eval, with commas: names (arc_easy,hellaswag), or paths of task files or folders (./mine.yaml).",
)
@click.option("--against", metavar="MODEL", help="Measure another model, too, and show the differences.")
@adapter_option
@click.option(
    "--sequence-length",
    type=click.IntRange(min=8),
    default=1024,
    show_default=True,
    help="Tokens in a window of text; at most the model's context.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N windows of text, N examples of each task.",
)
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    metavar="N",
    help="Solved examples in each prompt of a task.  [default: the task's own]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Examples of tasks at once.  [default: by the vocabulary and the device]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to run.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Numbers to compute with; auto: as stored.",
)
@output_options
def command(
    model: str,
    text: Path | None,
    tasks: str | None,
    against: str | None,
    adapter: Path | None,
    sequence_length: int,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a model: perplexity and bits per byte on a text, scores on benchmark tasks.

    Perplexity is per token and compares only models with the same tokenizer; bits per byte compare all models. With
    --against the difference is model minus other, and its error that of the differences on the same windows or
    examples. Tasks need lm-eval: pip install 'dslm[eval]'. Its own tasks come from the hub; a task file may name
    local data.
    """
    refuse_unused(click.get_current_context(), _unused(text, tasks))
    suite = None if tasks is None else _load_tasks(tasks, num_fewshot, quiet=quiet)
    wants_text = tasks is None or text is not None
    if text is not None:
        _check_text(text)
    first = open_model(model, quiet=quiet, adapter=adapter)
    other = None if against is None else open_model(against, quiet=quiet)
    shared: dict[str, Any] = {"against": other, "limit": limit, "device": device, "dtype": dtype}
    on_text = _score_text(first, text, sequence_length, shared, quiet=quiet) if wants_text else None
    on_tasks = None if suite is None else _run_tasks(first, suite, batch_size, shared, quiet=quiet)
    if as_json:
        _print_json(first, other, on_text, on_tasks)
        return
    if other is not None:
        console().print(pairs_table([("model", first.name), ("against", other.name)]), "")
    if on_text is not None:
        _print_text(on_text)
    if on_tasks is not None:
        _print_tasks(on_tasks, after_text=on_text is not None)


def _unused(text: Path | None, tasks: str | None) -> dict[str, str]:
    """Options that nothing would use, and what each needs."""
    unused = {"num_fewshot": "--tasks", "batch_size": "--tasks"} if tasks is None else {}
    if tasks is not None and text is None:
        unused = {"sequence_length": "--text"}
    return unused


def _load_tasks(tasks: str, num_fewshot: int | None, *, quiet: bool) -> Suite:
    from dslm.verify.harness import load_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with progress_bar(quiet=quiet) as progress:
        return load_tasks(names, num_fewshot=num_fewshot, progress=progress)


def _check_text(text: Path) -> None:
    """Read the file once before a model is fetched for it."""
    from dslm.verify.reading import read_documents

    read_documents(text)


def _score_text(
    model: Checkpoint, text: Path | None, length: int, shared: dict[str, Any], *, quiet: bool
) -> TextReport:
    from dslm.verify.perplexity import evaluate_text

    with progress_bar(quiet=quiet) as progress:
        return evaluate_text(model, text, sequence_length=length, progress=progress, **shared)


def _run_tasks(
    model: Checkpoint, suite: Suite, batch_size: int | None, shared: dict[str, Any], *, quiet: bool
) -> TaskReport:
    from dslm.verify.tasks import evaluate_tasks

    with progress_bar(quiet=quiet) as progress:
        return evaluate_tasks(model, suite, batch_size=batch_size, progress=progress, **shared)


def _print_json(
    model: Checkpoint, against: Checkpoint | None, on_text: TextReport | None, on_tasks: TaskReport | None
) -> None:
    print_json(
        {
            "model": model.name,
            "against": None if against is None else against.name,
            "text": None if on_text is None else on_text.as_dict(),
            "tasks": None if on_tasks is None else on_tasks.as_dict(),
        }
    )


def _print_text(report: TextReport) -> None:
    from dslm.verify.words import COMPARED, text_rows, text_words

    rows = text_rows(report)
    if report.against is None:
        console().print(pairs_table((row[0], row[1]) for row in rows))
    else:
        console().print(columns_table(COMPARED, rows))
    console().print("", *text_words(report), sep="\n")


def _print_tasks(report: TaskReport, *, after_text: bool) -> None:
    from dslm.verify.words import task_header, task_rows, task_words

    out = console()
    if after_text:
        out.print()
    out.print(columns_table(task_header(report), task_rows(report)))
    out.print("", *task_words(report), sep="\n")
