"""What a shrink measured: facts for programs, rows and words for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dslm.report.shapes import perplexity

if TYPE_CHECKING:
    from dslm.shrink.down import Shrunk

_WORST = 3  # blocks shown with the largest error
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


def worst_blocks(errors: Sequence[float]) -> str:
    """The blocks with the largest errors, in words."""
    worst = sorted(range(len(errors)), key=lambda block: -errors[block])[:_WORST]
    return ", ".join(f"block {block} {errors[block]:.3g}" for block in worst)
