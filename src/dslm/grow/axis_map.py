"""The one value that growing is made of: how the entries of a dimension map to those of a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Columns = slice | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CopyGroup:
    """Source entries that have equally many copies.

    Attributes:
        source: the source entries.
        targets: one item per copy: where the entries' first, second, ... copies lie.
    """

    source: Columns
    targets: tuple[Columns, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AxisMap:
    """How a dimension of ``size`` entries becomes one of ``len(source)`` entries.

    For every tensor that writes the dimension, target entry ``k`` is ``amplitude[k]`` times source entry
    ``source[k]``; for every tensor that reads it, the copies of one source entry share it (`split`), divided by
    the amplitude. A new entry writes zero and reads at random, or the other way round, so that it is silent at
    the start and learns afterwards. See ``docs/how-it-works.md``, "Growing".

    Attributes:
        size: source size.
        source: ``[target]``, the source entry of each target entry; a new entry names the one whose scale it takes.
        new: ``[target]``, whether the entry is new instead of a copy.
        amplitude: ``[target]``, scale on the write side.
        new_writes: new entries write at random and are read as zero; otherwise they write zero and read at random.
        centred: writers lose their mean over the dimension first (LayerNorm does not see it).
    """

    size: int
    source: NDArray[np.int64]
    new: NDArray[np.bool_]
    amplitude: NDArray[np.float64]
    new_writes: bool = True
    centred: bool = False
    _groups: list[CopyGroup] = field(default_factory=list, repr=False)

    @property
    def target(self) -> int:
        """Target size."""
        return len(self.source)

    @property
    def groups(self) -> list[CopyGroup]:
        """The copied entries by number of copies, for splitting readers; computed once."""
        if not self._groups:
            self._groups.extend(_copy_groups(self))
        return self._groups

    @property
    def added(self) -> NDArray[np.bool_]:
        """``[target]``: entries that the source did not have, new ones and every copy but the first."""
        first = np.zeros(self.target, dtype=bool)
        first[np.unique(self.source, return_index=True)[1]] = True
        return ~first | self.new

    @property
    def scaled(self) -> bool:
        """Whether writers need arithmetic and not only copying."""
        return self.centred or bool(np.any(self.amplitude != 1.0))


def identity(size: int) -> AxisMap:
    """The map that leaves a dimension of ``size`` entries as it is."""
    return copies(np.arange(size), size)


def copies(source: NDArray[np.int64], size: int) -> AxisMap:
    """Plain copies, every amplitude 1: for dimensions that no norm runs over."""
    return AxisMap(
        size=size, source=source, new=np.zeros(len(source), dtype=bool), amplitude=np.ones(len(source))
    )


def weighted_copies(source: NDArray[np.int64], size: int) -> AxisMap:
    """Copies that keep the mean square of the dimension, whatever their counts.

    With ``c_j`` copies of entry ``j`` each is scaled by ``a_j = sqrt(D / (d c_j))``, so that
    ``mean(x'^2) = mean(x^2)`` and an RMSNorm over the dimension does not notice. For an integer multiple
    ``a_j = 1`` and this is the cloning of HyperCloning (arXiv 2409.12903, section 3).
    """
    counts = np.bincount(source, minlength=size)
    amplitude = np.sqrt(len(source) / (size * counts[source].astype(np.float64)))
    return AxisMap(size=size, source=source, new=np.zeros(len(source), dtype=bool), amplitude=amplitude)


def padded(
    size: int, target: int, *, tiles: int = 1, new_writes: bool, normed: bool, centred: bool = False
) -> AxisMap:
    """``tiles`` whole copies followed by new entries.

    Args:
        size: source size.
        target: target size.
        tiles: whole copies in front.
        new_writes: which side of the new entries is random; see `AxisMap`.
        normed: a norm runs over the dimension, so old entries are scaled by ``sqrt(D / (tiles d))``.
        centred: the norm is a LayerNorm, whose mean must stay zero.
    """
    source = np.arange(target) % size
    scale = sqrt(target / (tiles * size)) if normed else 1.0
    return AxisMap(
        size=size,
        source=source,
        new=np.arange(target) >= tiles * size,
        amplitude=np.full(target, scale),
        new_writes=new_writes,
        centred=centred,
    )


def merged(maps: Sequence[AxisMap]) -> AxisMap:
    """The map of dimensions merged into one axis, outermost first: ``(heads head_dim)``."""
    result = maps[0]
    for inner in maps[1:]:
        result = AxisMap(
            size=result.size * inner.size,
            source=(result.source[:, None] * inner.size + inner.source[None, :]).ravel(),
            new=(result.new[:, None] | inner.new[None, :]).ravel(),
            amplitude=(result.amplitude[:, None] * inner.amplitude[None, :]).ravel(),
            new_writes=result.new_writes,
            centred=result.centred or inner.centred,
        )
    return result


def concatenated(maps: Sequence[AxisMap]) -> AxisMap:
    """The map of blocks laid end to end along one axis: fused projections."""
    if len(maps) == 1:
        return maps[0]
    offsets = np.cumsum([0, *(m.size for m in maps[:-1])])
    return AxisMap(
        size=sum(m.size for m in maps),
        source=np.concatenate([m.source + offset for m, offset in zip(maps, offsets, strict=True)]),
        new=np.concatenate([m.new for m in maps]),
        amplitude=np.concatenate([m.amplitude for m in maps]),
        new_writes=maps[0].new_writes,
        centred=any(m.centred for m in maps),
    )


def _copy_groups(axis: AxisMap) -> list[CopyGroup]:
    kept = np.flatnonzero(~axis.new)
    kept = kept[np.argsort(axis.source[kept], kind="stable")]
    source = axis.source[kept]
    entries, first, counts = np.unique(source, return_index=True, return_counts=True)
    groups = []
    for count in np.unique(counts):
        chosen = counts == count
        starts = first[chosen]
        groups.append(
            CopyGroup(
                source=_columns(entries[chosen]),
                targets=tuple(_columns(kept[starts + rank]) for rank in range(count)),
            )
        )
    return groups


def _columns(indices: NDArray[np.int64]) -> Columns:
    """A slice where the indices are a run, since slices are copied much faster."""
    if len(indices) and np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices))):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
