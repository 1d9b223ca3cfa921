"""Units that equal another unit bit for bit, found by hashing each unit once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dslm.verify.units import Part, unit_positions

_TOLERANCE = 1e-4
_CHUNK = 2**22
MODEL_WIDE = ("hidden", "embedding")


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """What was found among the units of one dimension in one block.

    Attributes:
        dimension: the dimension.
        layer: index of the block; None for a dimension that runs through the whole model.
        original: ``[units]``, the first unit that each equals in weights and in gradients; itself if none.
    """

    dimension: str
    layer: int | None
    original: Tensor


def find_copies(parts: list[Part], sizes: Mapping[str, int], dimensions: tuple[str, ...]) -> list[Copies]:
    """Find the units that are locked to another, per dimension and block.

    Two query heads count only if their key-value heads are the same one or equal; two key-value heads only if
    their query heads are equal too.

    Args:
        parts: the model's parameters, with their gradients.
        sizes: size of every dimension.
        dimensions: the dimensions to search.

    Returns:
        One entry for each dimension and block that has it.
    """
    groups: dict[tuple[str, int | None], list[_Slice]] = {}
    for part in parts:
        for position, axis in enumerate(part.line.spec.axes):
            for dimension in dimensions:
                where = unit_positions(axis, dimension, sizes)
                if where is not None:
                    layer = None if dimension in MODEL_WIDE else part.line.layer
                    groups.setdefault((dimension, layer), []).append(_Slice(part, position, where))
    hashes = {key: _hash_units(slices) for key, slices in groups.items()}
    found = []
    for (dimension, layer), slices in groups.items():
        codes = hashes[dimension, layer]
        if dimension in ("heads", "kv_heads"):
            codes = _with_partners(dimension, hashes.get(("heads", layer)), hashes.get(("kv_heads", layer)))
        found.append(_judge(dimension, layer, slices, codes))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """How one storage axis of one tensor is shared among units: ``where`` is ``[units, entries]``."""

    part: Part
    position: int
    where: Tensor


def _hash_units(slices: list[_Slice]) -> Tensor:
    """A 64-bit code of each unit's numbers in all its tensors, in order; equal numbers give equal codes."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(len(slices[0].where), dtype=torch.int64)
    for piece in slices:
        entries = _hash_entries(piece.part.parameter.detach(), piece.position, generator)
        total = _mix(total) + (_mix(entries)[piece.where] * _odd(piece.where.shape[1], generator)).sum(dim=1)
    return total


def _hash_entries(weight: Tensor, position: int, generator: torch.Generator) -> Tensor:
    """A code of each row (``position`` 0) or column (1) of a tensor's bits; integer arithmetic wraps, as it may."""
    matrix = weight if weight.dim() == 2 else weight[:, None]
    factors = _odd(matrix.shape[1 - position], generator)
    total = torch.zeros(matrix.shape[position], dtype=torch.int64)
    rows = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        # Adding zero turns -0.0 into 0.0: the two are equal numbers with different bits.
        bits = (matrix[start : start + rows] + 0.0).view(torch.int32).to(torch.int64)
        if position == 0:
            total[start : start + rows] = (bits * factors).sum(dim=1)
        else:
            total += (bits * factors[start : start + rows, None]).sum(dim=0)
    return total


def _odd(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1


def _mix(codes: Tensor) -> Tensor:
    """Scramble codes, so that sums of them do not cancel (the finaliser of splitmix64, shifts kept signed)."""
    codes = (codes ^ (codes >> 30)) * -4658895280553007687
    codes = (codes ^ (codes >> 27)) * -7723592293110705685
    return codes ^ (codes >> 31)


def _with_partners(dimension: str, heads: Tensor | None, kv_heads: Tensor | None) -> Tensor:
    """Codes of heads that also cover the other side of the attention."""
    if heads is None or kv_heads is None:
        only = heads if heads is not None else kv_heads
        assert only is not None
        return only
    group = len(heads) // len(kv_heads)
    # A sum over the group does not depend on the order of its query heads.
    whole = _mix(kv_heads) + _mix(heads + 1).view(-1, group).sum(dim=1)
    return whole if dimension == "kv_heads" else _mix(heads) + whole.repeat_interleave(group)


def _judge(dimension: str, layer: int | None, slices: list[_Slice], codes: Tensor) -> Copies:
    """Keep those units of equal code whose gradients are equal as well."""
    _, classes = torch.unique(codes, return_inverse=True)
    units = torch.arange(len(codes))
    first = torch.full((len(codes),), len(codes)).scatter_reduce(0, classes, units, "amin")[classes]
    copies = units[first != units]
    apart, norm = torch.zeros(len(copies)), torch.zeros(len(copies))
    for piece in slices:
        gradient = piece.part.parameter.grad
        if gradient is None:
            continue
        width = gradient.numel() // gradient.shape[piece.position] * piece.where.shape[1]
        step = max(1, _CHUNK // width)
        for start in range(0, len(copies), step):
            some = copies[start : start + step]
            one = gradient.index_select(piece.position, piece.where[some].flatten())
            other = gradient.index_select(piece.position, piece.where[first[some]].flatten())
            apart[start : start + step] += _squares(one - other, piece)
            norm[start : start + step] += _squares(other, piece)
    differing = copies[apart > _TOLERANCE**2 * norm]
    return Copies(dimension, layer, original=first.index_copy(0, differing, differing))


def _squares(values: Tensor, piece: _Slice) -> Tensor:
    """Sum of squares per unit of a selection along the piece's axis."""
    per_entry = values.square() if values.dim() == 1 else values.square().sum(dim=1 - piece.position)
    return per_entry.view(-1, piece.where.shape[1]).sum(dim=1)
