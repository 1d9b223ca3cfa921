"""Shapes and their losses: rows of a table, facts for programs, and a picture of size against loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any

from dslm.report.tables import short_count

if TYPE_CHECKING:
    from dslm.shrink.search import Scored

SHAPE_COLUMNS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "FFN",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv heads",
}
"""Size word -> its column."""
SHAPE_HEADER = ("", *SHAPE_COLUMNS.values(), "parameters", "off", "predicted", "measured")

_BAR = 40  # characters of the longest bar
_LARGEST = 700.0  # nats; a perplexity beyond that is no number


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return exp(loss) if loss < _LARGEST else float("inf")


def shape_rows(shapes: Iterable[Scored], wanted: int) -> list[tuple[str, ...]]:
    """Rows under `SHAPE_HEADER`: ranks, sizes, and perplexities predicted and, where there are, measured."""
    return [
        (
            str(rank),
            *(f"{getattr(shape.sizes, word):,}" for word in SHAPE_COLUMNS),
            f"{shape.parameters:,}",
            f"{shape.parameters / wanted - 1:+.2%}",
            _short(perplexity(shape.predicted)),
            "-" if shape.measured is None else _short(perplexity(shape.measured)),
        )
        for rank, shape in enumerate(shapes, start=1)
    ]


def shape_facts(shape: Scored) -> dict[str, Any]:
    """One shape for ``--json``."""
    return shape.sizes.as_dict() | {
        "parameters": shape.parameters,
        "predicted": loss_facts(shape.predicted),
        "measured": None if shape.measured is None else loss_facts(shape.measured),
        "layers": None if shape.measured is None else list(shape.layers),
    }


def loss_facts(loss: float) -> dict[str, float]:
    """A loss for ``--json``, with its perplexity."""
    return {"loss": loss, "perplexity": perplexity(loss)}


@dataclass(frozen=True, slots=True)
class SizePoint:
    """A point of the picture.

    Attributes:
        share: of the source's parameters that is kept.
        parameters: how many that are.
        loss: predicted, in nats per token.
    """

    share: float
    parameters: int
    loss: float


def size_picture(points: Sequence[SizePoint]) -> list[str]:
    """Size against loss, a line for each point: a bar as long as the loss, and the perplexity behind it."""
    finite = [point.loss for point in points if perplexity(point.loss) < float("inf")]
    longest = max(finite, default=1.0)
    lines = []
    for point in points:
        length = round(_BAR * min(1.0, max(0.0, point.loss) / max(longest, 1e-9)))
        end = f"{point.loss:.2f} nats, perplexity {_short(perplexity(point.loss))}"
        lines.append(f"{point.share:>5.0%} {short_count(point.parameters):>8}  {'#' * length:<{_BAR}}  {end}")
    return lines


def _short(value: float) -> str:
    """A perplexity with as many digits as say something."""
    return f"{value:.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
