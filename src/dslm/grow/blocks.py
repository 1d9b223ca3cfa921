"""New blocks: copies of the block before them that add nothing to the residual stream at the start.

Block expansion as in LLaMA-Pro (Wu et al., arXiv 2401.02415), which zeroes what writes the stream. Where a norm sits
between writer and stream (OLMo-2, Gemma 2 and 3) its gain is zeroed instead: behind a writer of zeros such a norm would
blow the first step of training up to full size.
"""

from __future__ import annotations

from collections.abc import Sequence

from dslm.families import Family, Tensor
from dslm.families.axes import Role

SOURCE = "https://arxiv.org/abs/2401.02415"


def origins(source: int, target: int) -> tuple[int, ...]:
    """The source block of each target block: new ones spread evenly, each behind the one that it is a copy of."""
    return tuple(number * source // target for number in range(target))


def new_blocks(layers: Sequence[int]) -> frozenset[int]:
    """Which target blocks are new: those behind another of the same origin."""
    return frozenset(number for number in range(1, len(layers)) if layers[number] == layers[number - 1])


def silences(family: Family, tensor: Tensor) -> bool:
    """Whether zeroing this tensor of a block, and those like it, makes the block add nothing."""
    if family.branch_norms:
        return family.is_branch_norm(tensor)
    axis = tensor.spec.axes[0]
    return axis.role in (Role.WRITE, Role.BIAS) and axis.dimensions == ("hidden",)
