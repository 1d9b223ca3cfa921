"""How text is drawn and where: the options that ``gen`` and ``chat`` share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from dslm.load import DEVICES, DTYPES

Command = TypeVar("Command", bound=Callable[..., Any])


class _FiniteRange(click.FloatRange):
    """A range of real numbers: without infinity, and without nan, which lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number of a text."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


NUMBERS: dict[str, click.ParamType[Any]] = {
    "n": click.IntRange(min=1),
    "temperature": _FiniteRange(min=0),
    "top_k": click.IntRange(min=0),
    "top_p": _FiniteRange(min=0, max=1, min_open=True),
    "seed": click.IntRange(min=0),
}
"""Name -> its legal values."""

_option = partial(click.option, show_default=True)
_TOP_P_HELP = "Draw among the likeliest tokens with this share of the probability; 1: all."
_OPTIONS: list[Callable[[Any], Any]] = [
    _option(
        "--temperature",
        type=NUMBERS["temperature"],
        default=0.8,
        help="Higher is more varied; 0 always takes the likeliest token.",
    ),
    _option("--top-k", type=NUMBERS["top_k"], default=40, help="Draw among this many tokens; 0: among all."),
    _option("--top-p", type=NUMBERS["top_p"], default=0.9, help=_TOP_P_HELP),
    click.option("--seed", type=NUMBERS["seed"], help="Start of the random numbers; random if not given."),
    _option("--device", type=click.Choice(DEVICES), default="auto", help="Where to run."),
    _option(
        "--dtype", type=click.Choice(DTYPES), default="auto", help="Numbers to compute with; auto: as stored."
    ),
]


def sampling_options(n_predict: int) -> Callable[[Command], Command]:
    """Give a command the options of sampling, and where it runs.

    Args:
        n_predict: how many tokens are written at most, unless the user says otherwise.
    """
    most = _option("-n", "--n-predict", type=NUMBERS["n"], default=n_predict, help="Most tokens to write.")

    def decorate(function: Command) -> Command:
        for option in reversed([most, *_OPTIONS]):
            function = option(function)
        return function

    return decorate


def random_seed() -> int:
    """A seed for a user who gave none."""
    return random.SystemRandom().randrange(2**31)
