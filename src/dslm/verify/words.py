"""Scores on texts and tasks, for people: rows of tables, with as many digits as the errors leave."""

from __future__ import annotations

from math import floor, isfinite, log10

from dslm.verify.measured import Measured
from dslm.verify.perplexity import TextReport
from dslm.verify.task_scores import TaskScore
from dslm.verify.tasks import TaskReport

COMPARED = ("", "model", "against", "difference")
"""Columns of two models on a text."""

_MOST_DIGITS = 6
_DIGITS = 4  # where there is no error to go by


def with_error(figure: Measured | None, *, sign: str = "") -> str:
    """``2.723 ± 0.028``: two digits of the standard error, and the figure to the same place; ``-`` for none."""
    if figure is None:
        return "-"
    if not isfinite(figure.value):
        return "infinite"
    if figure.error is None:
        return f"{figure.value:{sign},.{_DIGITS}f}"
    digits = _DIGITS if figure.error == 0 else min(_MOST_DIGITS, max(0, 1 - floor(log10(figure.error))))
    return f"{figure.value:{sign},.{digits}f} ± {figure.error:,.{digits}f}"


def text_rows(report: TextReport) -> list[tuple[str, ...]]:
    """Rows under `COMPARED`, or of one model's figures alone; of two, what can be compared of them."""
    model, other = report.model, report.against
    if other is None:
        return [
            ("perplexity", with_error(model.perplexity)),
            ("bits per byte", with_error(model.bits_per_byte)),
            ("nats per token", with_error(model.loss)),
            ("tokens", f"{sum(model.tokens):,}"),
        ]
    ratio = report.perplexity_ratio
    return [
        (
            "perplexity",
            with_error(model.perplexity),
            with_error(other.perplexity),
            "-" if ratio is None else f"x {with_error(ratio)}",
        ),
        (
            "bits per byte",
            with_error(model.bits_per_byte),
            with_error(other.bits_per_byte),
            with_error(report.bits_difference, sign="+"),
        ),
        (
            "nats per token",
            with_error(model.loss),
            with_error(other.loss),
            with_error(report.loss_difference, sign="+"),
        ),
        ("tokens", f"{sum(model.tokens):,}", f"{sum(other.tokens):,}", ""),
    ]


def text_words(report: TextReport) -> list[str]:
    """What a text was and how it was read, and what the errors mean."""
    model, other = report.model, report.against
    lines = [
        f"on {sum(model.tokens):,} tokens ({sum(model.nbytes):,} bytes) of {report.text}",
        f"{_counted(report.documents, 'document')} in {_counted(len(model.nats), 'window')} of up to "
        f"{report.sequence_length:,} tokens; {model.dtype} on {model.device}",
    ]
    if other is not None and not report.same_tokenizer:
        lines.append(
            "the tokenizers differ: per-token figures cannot be compared, bits per byte can; "
            "the error of their difference takes the two as independent and is too wide"
        )
    lines.append(
        "one window gives no standard error: take a longer text or a smaller --sequence-length"
        if len(model.nats) < 2
        else "± is one standard error over windows"
        + (
            "; of a difference, over differences on the same windows"
            if other is not None and report.same_tokenizer
            else ""
        )
    )
    return lines


def task_header(report: TaskReport) -> tuple[str, ...]:
    """Columns of `task_rows`."""
    return COMPARED if report.against else COMPARED[:2]


def task_rows(report: TaskReport) -> list[tuple[str, ...]]:
    """A row for each task, and one below it for each of its metrics."""
    rows: list[tuple[str, ...]] = []
    last = None
    for score in report.scores:
        figures = [with_error(score.model)]
        if report.against:
            figures += [with_error(score.against), with_error(score.difference, sign="+") + _star(score)]
        if score.task != last:
            shots = f", {score.shots}-shot" if score.shots else ""
            rows.append((f"{score.task}{shots} ({score.examples:,})", *("" for _ in figures)))
        lower = ", lower is better" if score.higher_is_better is False else ""
        rows.append((f"  {score.metric}{lower}", *figures))
        last = score.task
    return rows


def task_words(report: TaskReport) -> list[str]:
    """How tasks were run, and what the errors mean."""
    part = ", all examples" if report.limit is None else f", the first {report.limit:,} examples of each task"
    dtypes = " and ".join(dict.fromkeys(report.dtypes))
    lines = [f"by lm-eval {report.harness}{part} (in brackets how many); {dtypes} on {report.device}"]
    if any(score.model.error is not None for score in report.scores):
        over = "; of a difference, over differences on the same examples" if report.against else ""
        lines.append(f"± is one standard error over examples{over}")
    if any(_star(score) for score in report.scores):
        lines.append("* both errors taken as independent, which is too wide")
    return lines


def _star(score: TaskScore) -> str:
    return "" if score.paired or score.difference is None or score.difference.error is None else " *"


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
