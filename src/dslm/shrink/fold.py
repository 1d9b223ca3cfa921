"""Folds: which entries of a space stay, and how readers and writers of the space change with it.

A space (the residual stream, the units of one FFN, the heads of one attention) has source entries and target entries.
Every source entry is a multiple of the target entry it is folded into, ``x_i = ratio_i x_rep``, or it is dropped.
The target entry is ``amplitude_j`` times its representative. Then (``docs/how-it-works.md``, "Shrinking")::

    writers:  W'_j  = amplitude_j W_rep(j)
    readers:  W'_.j = sum_i ratio_i W_.i / amplitude_j      over the i folded into j

This is exact where the multiples are real (the exact stage), and plain selection where everything else is dropped.

Shape letters: S source entries, T target entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dslm.families import Family
from dslm.families import Tensor as TableTensor
from dslm.families.axes import Axis, Role

if TYPE_CHECKING:
    from dslm.shrink.weights import Weights

Key = tuple[str, int]
"""A space of one block: its dimension (``intermediate``, ``heads``, ``kv_heads``, or one of the last two as
``normed ...`` for axes under a norm over all heads), and its layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What becomes of the entries of one space.

    Attributes:
        keep_T: int64, the source entry that represents each target entry.
        group_S: int64, the target entry that each source entry is folded into; -1 where it is dropped.
        ratio_S: float64, each source entry as a multiple of its representative; not used where dropped.
        amplitude_T: float64, each target entry as a multiple of its representative.
    """

    keep_T: Tensor
    group_S: Tensor
    ratio_S: Tensor
    amplitude_T: Tensor

    @property
    def source(self) -> int:
        """Number of source entries."""
        return len(self.group_S)

    @property
    def target(self) -> int:
        """Number of target entries."""
        return len(self.keep_T)

    def write(self, weight: Tensor, axis: int) -> Tensor:
        """Fold the axis of a weight that writes the space, or of an activation."""
        shape = [1] * weight.dim()
        shape[axis] = -1
        kept = weight.index_select(axis, self.keep_T.to(weight.device))
        return kept * self.amplitude_T.to(kept).view(shape)

    def read(self, weight: Tensor, axis: int) -> Tensor:
        """Fold the axis of a weight that reads the space."""
        shape = [1] * weight.dim()
        shape[axis] = -1
        used = (self.group_S >= 0).nonzero().squeeze(1)
        scale_S = self.ratio_S[used] / self.amplitude_T[self.group_S[used]]
        used, group = used.to(weight.device), self.group_S[used].to(weight.device)
        scaled = weight.index_select(axis, used) * scale_S.to(weight).view(shape)
        out_shape = list(weight.shape)
        out_shape[axis] = self.target
        return weight.new_zeros(out_shape).index_add_(axis, group, scaled)

    def gain(self, gain: Tensor, *, over_heads: bool) -> Tensor:
        """A norm's gain over the space. Over heads it undoes the amplitude; over the stream the amplitude stays."""
        kept = gain.index_select(0, self.keep_T.to(gain.device))
        return kept / self.amplitude_T.to(kept) if over_heads else kept

    def balanced(self, stored: Tensor, *, is_gain: bool) -> Tensor:
        """The last norm's gain or shift before a tied table, whose columns are written and read with the amplitude.

        With ``E_i = ratio_i E_rep`` the logits keep ``sum_i ratio_i^2 g_i`` of a gain and ``sum_i ratio_i b_i`` of a
        shift.
        """
        power = 2 if is_gain else 1
        used = (self.group_S >= 0).nonzero().squeeze(1)
        terms = stored[used].double() * self.ratio_S[used] ** power
        total_T = torch.zeros(self.target, dtype=torch.float64).index_add_(0, self.group_S[used], terms)
        return (total_T / self.amplitude_T**power).to(stored.dtype)

    def prepared(self, weights: Weights) -> Weights:
        """The weights as they must be before they are folded: as they are."""
        return weights


def identity(size: int) -> Fold:
    """Everything stays."""
    return select(torch.arange(size), size)


def select(keep_T: Tensor, source: int, amplitude: float = 1.0) -> Fold:
    """Keep some entries, in the order given, and drop the rest.

    Args:
        keep_T: int64, the entries to keep.
        source: number of entries there are.
        amplitude: scale of what is kept.
    """
    group_S = torch.full((source,), -1).index_copy(0, keep_T, torch.arange(len(keep_T)))
    ones = torch.ones(source, dtype=torch.float64)
    return Fold(keep_T=keep_T, group_S=group_S, ratio_S=ones, amplitude_T=amplitude * ones[: len(keep_T)])


class Encoder(Protocol):
    """What becomes of the residual stream: a `Fold`, or a rotation (`dslm.shrink.rotate`)."""

    def write(self, weight: Tensor, axis: int) -> Tensor:
        """The axis of a weight that writes the stream, or of an activation."""

    def read(self, weight: Tensor, axis: int) -> Tensor:
        """The axis of a weight that reads the stream."""

    def gain(self, gain: Tensor, *, over_heads: bool) -> Tensor:
        """A norm's gain over the stream."""

    def balanced(self, stored: Tensor, *, is_gain: bool) -> Tensor:
        """The last norm's gain or shift before a tied table."""

    def prepared(self, weights: Weights) -> Weights:
        """The same function with weights as they must be before this is done to them."""


def fold_tensor(
    family: Family,
    line: TableTensor,
    weight: Tensor,
    layer: int | None,
    folds: Mapping[Key, Fold],
    stream: Encoder | None,
    sizes: Mapping[str, int],
) -> Tensor:
    """Fold every axis of one tensor.

    Args:
        family: the family's table.
        line: what the table says about the tensor.
        weight: its source values.
        layer: the *source's* layer that it belongs to, None outside the blocks.
        folds: the folds.
        stream: what becomes of the residual stream.
        sizes: the source's size of every dimension.
    """
    for position, axis in enumerate(line.spec.axes):
        fold = stream if axis.dimensions == ("hidden",) else axis_fold(axis, layer, folds, sizes)
        if fold is None:
            continue
        if axis.role is Role.READ:
            weight = fold.read(weight, position)
        elif axis.role is Role.GAIN:
            over_heads = "head_dim" in axis.dimensions
            offset = family.gain_offset
            weight = fold.gain(weight + offset, over_heads=over_heads) - offset
        else:
            weight = fold.write(weight, position)
    return weight


def axis_fold(
    axis: Axis, layer: int | None, folds: Mapping[Key, Fold], sizes: Mapping[str, int]
) -> Fold | None:
    """The fold of a storage axis, entry by entry; None where nothing on it changes."""
    parts, changed, offset_S, offset_T = [], False, 0, 0
    for block in axis.blocks:
        fold = identity(1)
        for factor in block.factors:
            own = None if isinstance(factor, int) else _space(factor, axis, layer, folds)
            changed = changed or own is not None
            fold = _merged(fold, own or identity(factor if isinstance(factor, int) else sizes[factor]))
        parts.append(_shifted(fold, offset_S, offset_T))
        offset_S, offset_T = offset_S + fold.source, offset_T + fold.target
    if not changed:
        return None
    return Fold(
        keep_T=torch.cat([part.keep_T for part in parts]),
        group_S=torch.cat([part.group_S for part in parts]),
        ratio_S=torch.cat([part.ratio_S for part in parts]),
        amplitude_T=torch.cat([part.amplitude_T for part in parts]),
    )


def _space(dimension: str, axis: Axis, layer: int | None, folds: Mapping[Key, Fold]) -> Fold | None:
    if layer is None:
        return None
    normed = axis.normed or axis.role is Role.GAIN
    found = folds.get((f"normed {dimension}", layer)) if normed else None
    return found or folds.get((dimension, layer))


def _merged(outer: Fold, inner: Fold) -> Fold:
    """Both at once: entry ``(i, j)`` lies at ``i * inner.source + j``."""
    dropped = (outer.group_S < 0)[:, None] | (inner.group_S < 0)
    group = outer.group_S[:, None] * inner.target + inner.group_S
    return Fold(
        keep_T=(outer.keep_T[:, None] * inner.source + inner.keep_T).flatten(),
        group_S=group.masked_fill(dropped, -1).flatten(),
        ratio_S=(outer.ratio_S[:, None] * inner.ratio_S).flatten(),
        amplitude_T=(outer.amplitude_T[:, None] * inner.amplitude_T).flatten(),
    )


def _shifted(fold: Fold, offset_S: int, offset_T: int) -> Fold:
    group = torch.where(fold.group_S < 0, fold.group_S, fold.group_S + offset_T)
    return Fold(fold.keep_T + offset_S, group, fold.ratio_S, fold.amplitude_T)
