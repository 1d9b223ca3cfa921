"""Where the units of a dimension lie along the axes of a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dslm.families.axes import Axis


def unit_parts(axis: Axis, dimension: str, sizes: Mapping[str, int]) -> list[Tensor]:
    """Where the units of a dimension lie along a storage axis.

    Args:
        axis: the storage axis.
        dimension: the dimension whose units are asked for.
        sizes: size of every dimension.

    Returns:
        One int64 tensor ``[units, entries]`` for every row that a unit has there: two in
        ``intermediate+intermediate``, three in ``(heads 3 head_dim)``.
    """
    parts, offset = [], 0
    for block in axis.blocks:
        size = block.size(sizes)
        if dimension in block.factors:
            shape = [f if isinstance(f, int) else sizes[f] for f in block.factors]
            grid = torch.arange(offset, offset + size).reshape(shape)
            grid = grid.movedim(block.factors.index(dimension), 0)
            several = grid.dim() == 3
            parts += list(grid.unbind(1)) if several else [grid.reshape(sizes[dimension], -1)]
        offset += size
    return parts
