"""What a shrink measured: facts for programs, rows and words for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dslm.report.shapes import perplexity

if TYPE_CHECKING:
    from dslm.shrink.down import Shrunk

BLOCK_HEADER = ("block", "from layer", "relative squared error of the stream")
_TEXTS = {"held-out": "held-out calibration text", "check": "check text"}


def shrunk_facts(done: Shrunk) -> dict[str, Any]:
    """A finished shrink for ``--json``."""
    losses = {
        text: {
            "loss": {"before": before, "after": after},
            "perplexity": {"before": perplexity(before), "after": perplexity(after)},
        }
        for text, (before, after) in done.losses.items()
    }
    return {
        "bytes": done.nbytes,
        "removed_without_loss": dict(done.removed),
        "layers": list(done.layers),
        "texts": losses,
        "block_errors": list(done.errors),
        "tokens": done.tokens,
        "origin": done.origin,
        "seconds": done.seconds,
    }


def perplexity_rows(texts: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """A row for each text: perplexity before, after, and their ratio."""
    found = ((name, facts["perplexity"]) for name, facts in texts.items())
    return [
        (
            f"  {_TEXTS.get(name, name)}",
            f"{p['before']:.3f}",
            f"{p['after']:.3f}",
            f"x {p['after'] / p['before']:.3f}",
        )
        for name, p in found
    ]


def block_rows(errors: Sequence[float], layers: Sequence[int]) -> list[tuple[str, str, str]]:
    """A row for each block: its number, the source's layer that it comes from, and its error."""
    pairs = zip(layers, errors, strict=True)
    return [(f"  {block}", str(layer), f"{error:.3g}") for block, (layer, error) in enumerate(pairs)]
