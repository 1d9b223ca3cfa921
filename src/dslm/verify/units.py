"""A loaded model seen through its family's table: which numbers belong to which unit of which dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dslm.checkpoint.oracle import stored_parameters
from dslm.checkpoint.reader import Checkpoint
from dslm.families import Tensor as TableTensor
from dslm.families.axes import Axis
from dslm.families.units import unit_parts


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One tensor of a loaded model.

    Attributes:
        line: what the family's table says about it.
        parameter: its numbers, shared with the model; a tied table appears once.
    """

    line: TableTensor
    parameter: torch.nn.Parameter


def parts_of(model: Any, checkpoint: Checkpoint) -> list[Part]:
    """Match the parameters of a loaded model with the lines of its family's table.

    Raises:
        CheckpointError: a tensor of the table is not a parameter of the model.
    """
    layout = checkpoint.family.layout(checkpoint.config)
    parameters = stored_parameters(model, layout)
    return [Part(line=line, parameter=parameters[name]) for name, line in layout.items()]


def unit_positions(axis: Axis, dimension: str, sizes: Mapping[str, int]) -> Tensor | None:
    """Where the units of a dimension lie along a storage axis.

    Args:
        axis: the storage axis.
        dimension: the dimension whose units are asked for.
        sizes: size of every dimension.

    Returns:
        int64 of shape ``[units, entries per unit]``, or None if the axis does not hold the dimension. In
        ``(heads 3 head_dim)`` a head has ``3 head_dim`` entries; in ``intermediate+intermediate`` a unit has two.
    """
    found = unit_parts(axis, dimension, sizes)
    return torch.cat(found, dim=1) if found else None


class Shuffle:
    """Another order of a model's channels, FFN units and heads: the same function, other sums.

    Exact in exact arithmetic, because every tensor that touches a dimension is reordered with it. What
    differs in floating point is the order of the sums, and that is what a rounding floor is.

    Args:
        parts: the model's parameters.
        sizes: size of every dimension.
        seed: of the order.
    """

    def __init__(self, parts: list[Part], sizes: Mapping[str, int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        orders = {
            name: torch.randperm(sizes[name], generator=generator)
            for name in ("hidden", "intermediate", "kv_heads")
        }
        # A query head stays with its key-value head, so whole groups move.
        group = sizes["heads"] // sizes["kv_heads"]
        orders["heads"] = (orders["kv_heads"][:, None] * group + torch.arange(group)).flatten()
        self._moves = [move for part in parts for move in _moves(part, orders, sizes)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Reorder the model in place, and put it back bit for bit afterwards."""
        self._move(inverse=False)
        try:
            yield
        finally:
            self._move(inverse=True)

    def _move(self, *, inverse: bool) -> None:
        for parameter, position, order in self._moves:
            index = torch.argsort(order) if inverse else order
            parameter.data.copy_(parameter.data.index_select(position, index.to(parameter.device)))


def _moves(
    part: Part, orders: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Iterator[tuple[torch.nn.Parameter, int, Tensor]]:
    for position, axis in enumerate(part.line.spec.axes):
        index = torch.arange(axis.size(sizes))
        for dimension, order in orders.items():
            where = unit_positions(axis, dimension, sizes)
            if where is not None:
                index[where.flatten()] = where[order].flatten()
        if not torch.equal(index, torch.arange(len(index))):
            yield part.parameter, position, index
