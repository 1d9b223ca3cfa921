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
from functools import cached_property
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.families import Family
from dslm.families import Tensor as TableTensor
from dslm.families.axes import Axis, Role
from dslm.families.family import Config
from dslm.sizes import Sizes

Key = tuple[str, int | None]
"""A space: its dimension (``hidden``, ``intermediate``, ``heads``, ``kv_heads``, or one of the last two as
``normed ...`` for axes under a norm over all heads), and its layer; None for the stream."""


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


class Weights(Protocol):
    """Named tensors of one model, read one at a time."""

    @property
    def family(self) -> Family:
        """The model's family."""

    @property
    def config(self) -> Config:
        """The model's config."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, in float32 or wider."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The weights of a checkpoint on disk."""

    checkpoint: Checkpoint

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.checkpoint.family

    @property
    def config(self) -> Config:
        """The model's config."""
        return self.checkpoint.config

    def read(self, name: str) -> Tensor:
        """A whole tensor, in float32, or float64 if it is stored so.

        Raises:
            CheckpointError: it holds NaN or infinite numbers.
        """
        stored = self.checkpoint.read_finite_rows(name, 0, self.checkpoint.entries[name].shape[0])
        return stored if stored.dtype is torch.float64 else stored.float()


@dataclass(frozen=True, eq=False)  # no slots: what follows from the sizes is computed once
class Folded:
    """Weights seen through folds: a smaller model, computed a tensor at a time.

    Attributes:
        base: the weights they come from.
        sizes: the smaller model's sizes.
        layers: the source layer of each target layer.
        folds: space -> its fold, by the *source's* layer; a space that is absent stays as it is.
    """

    base: Weights
    sizes: Sizes
    layers: tuple[int, ...]
    folds: Mapping[Key, Fold]

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.base.family

    @cached_property
    def config(self) -> Config:
        """The smaller model's config."""
        return shrunk_config(self.family, self.base.config, self.sizes, self.layers)

    @cached_property
    def _layout(self) -> dict[str, TableTensor]:
        return self.family.layout(self.config)

    @cached_property
    def _base_layout(self) -> dict[str, TableTensor]:
        return self.family.layout(self.base.config)

    def read(self, name: str) -> Tensor:
        """A whole tensor of the smaller model."""
        family, config = self.family, self.base.config
        line = self._layout[name]
        layer = None if line.layer is None else self.layers[line.layer]
        origin = name if layer is None else name.replace(f".{line.layer}.", f".{layer}.", 1)
        weight = self.base.read(origin if origin in self._base_layout else family.embedding)
        weight = fold_tensor(family, line, weight, layer, self.folds, family.dimensions(config))
        before, after = Sizes.from_config(family, config), self.sizes
        if name == family.embedding:
            return weight * table_factor(family, before, after)
        stream = self.folds.get(("hidden", None))
        is_final_norm = bool(family.final_norm) and name.startswith(family.final_norm + ".")
        if stream is not None and is_final_norm and after.tied and table_on_stream(family, config):
            is_gain = line.spec.axes[0].role is Role.GAIN
            offset = family.gain_offset if is_gain else 0
            balanced = _balanced(stream, self.base.read(origin) + offset, is_gain=is_gain)
            return balanced / table_factor(family, before, after) - offset
        return weight


def table_on_stream(family: Family, config: Config) -> bool:
    """Whether the input table writes the residual stream itself (some OPT models project in between)."""
    return "hidden" in family.layout(config)[family.embedding].spec.dimensions


def table_factor(family: Family, before: Sizes, after: Sizes) -> float:
    """Scale of the input table that makes up for a multiplier of ``sqrt(hidden)``."""
    if family.embedding_multiplier != "sqrt(hidden)":
        return 1.0
    return sqrt(before.hidden_size) / sqrt(after.hidden_size)


def _balanced(stream: Fold, stored_S: Tensor, *, is_gain: bool) -> Tensor:
    """The last norm's gain or shift before a tied table, whose columns are both written and read with the amplitude.

    With ``E_i = ratio_i E_rep`` the logits keep ``sum_i ratio_i^2 g_i`` of a gain and ``sum_i ratio_i b_i`` of a shift.
    """
    power = 2 if is_gain else 1
    used = (stream.group_S >= 0).nonzero().squeeze(1)
    terms = stored_S[used].double() * stream.ratio_S[used] ** power
    total_T = torch.zeros(stream.target, dtype=torch.float64).index_add_(0, stream.group_S[used], terms)
    return (total_T / stream.amplitude_T**power).to(stored_S.dtype)


def shrunk_config(family: Family, config: Config, sizes: Sizes, layers: tuple[int, ...]) -> dict[str, object]:
    """``config`` with smaller sizes, and every per-layer list cut to the layers that stay."""
    edited = sizes.into_config(family, config)
    for key in family.per_layer:
        value = config.get(key)
        if isinstance(value, list):
            edited[key] = [value[layer] for layer in layers]
    return edited


def fold_tensor(
    family: Family,
    line: TableTensor,
    weight: Tensor,
    layer: int | None,
    folds: Mapping[Key, Fold],
    sizes: Mapping[str, int],
) -> Tensor:
    """Fold every axis of one tensor.

    Args:
        family: the family's table.
        line: what the table says about the tensor.
        weight: its source values.
        layer: the *source's* layer that it belongs to, None outside the blocks.
        folds: the folds.
        sizes: the source's size of every dimension.
    """
    for position, axis in enumerate(line.spec.axes):
        fold = axis_fold(axis, layer, folds, sizes)
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
    if dimension == "hidden":
        return folds.get(("hidden", None))
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
