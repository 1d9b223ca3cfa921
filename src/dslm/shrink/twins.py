"""Twins: entries of a space that are multiples of one another, found from random projections of their rows.

A row of ``I`` numbers is marked by ``K`` random sums of them. Rows are equal, proportional or zero, within rounding,
where their marks are (the chance of an accident is that of a random direction, about ``tolerance ** K``), and marks
of all rows of all layers cost little to keep and compare.

Shape letters: N entries, I numbers in a row, K numbers in a mark, U units, E entries per unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

PROJECTIONS = 32
"""Sums in a mark: enough that the largest of a million rounding errors looks not much larger than the usual one."""
ZERO = 2e-5
"""What a sum may keep of the size of its terms and still count as zero."""
_FILTERS = 3
_REACH = 0.05
"""Rows of which more than this share is lost to rounding are not looked for; they only cost comparisons."""


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """What the entries of one axis are recognised by.

    Attributes:
        values_NK: float64, random sums of each entry's row, or the number itself of a vector.
        size_N: float64, how large the row is before anything in it cancels, without what is dropped.
        tolerance: difference relative to the size that the rounding of the stored numbers explains.
        scaled: whether the values of a multiple are multiplied too (those of a norm's gain are not).
    """

    values_NK: Tensor
    size_N: Tensor
    tolerance: float
    scaled: bool = True

    @property
    def zero_N(self) -> Tensor:
        """Which rows are zero."""
        zero_N: Tensor = self.values_NK.norm(dim=1) <= ZERO * self.size_N
        return zero_N

    @property
    def limit_N(self) -> Tensor:
        """How far apart the values of equal rows may be."""
        return self.tolerance * self.size_N

    def at(self, where_UE: Tensor) -> Mark:
        """The marks of units that have several entries each."""
        return replace(
            self, values_NK=self.values_NK[where_UE].flatten(1), size_N=self.size_N[where_UE].norm(dim=1)
        )


def mark(weight: Tensor, axis: int, mix_IK: Tensor | None = None) -> Mark:
    """Mark the entries of one axis of a matrix or a vector.

    Args:
        weight: ``[.., N, ..]``.
        axis: which axis holds the entries.
        mix_IK: the random weights of the other axis' entries, equal for twins and zero for what is dropped, which
            marks the *folded* rows; None for a vector.
    """
    if mix_IK is None:
        values_NK = weight.double()[:, None]
        return Mark(values_NK, values_NK.abs().squeeze(1), _tolerance(weight))
    rows_NI = weight if axis == 0 else weight.T
    used_I = (mix_IK != 0).any(dim=1)
    used_NI = rows_NI if used_I.all() else rows_NI[:, used_I]
    values_NK = (rows_NI @ mix_IK.to(weight)).double()
    return Mark(values_NK, used_NI.norm(dim=1).double(), _tolerance(weight))


def label(names_N: Tensor) -> Mark:
    """A mark that is equal only where a whole number is."""
    values_NK = names_N.double()[:, None] + 1
    return Mark(values_NK, values_NK.squeeze(1), 1e-9)


def random_mix(size: int) -> Tensor:
    """``[size, K]``, float64: random weights, the same at every call, that keep a row's size on average."""
    generator = torch.Generator().manual_seed(size)
    drawn: Tensor = torch.randn(size, PROJECTIONS, generator=generator, dtype=torch.float64)
    return drawn / sqrt(PROJECTIONS)


def _tolerance(weight: Tensor) -> float:
    """Bounds twins' difference: copies share what is read in parts, each rounded to the stored dtype."""
    sample = weight[:: max(1, len(weight) // 64)]
    if torch.equal(sample.bfloat16().to(sample), sample):
        return 2**-8
    return 2**-11 if torch.equal(sample.half().to(sample), sample) else 2e-5


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """A partition of entries into twins: ``x_i = ratio_i x_leader(i)``.

    Attributes:
        leader_N: int64, the first entry of each entry's class; -1 where the entry is zero.
        ratio_N: float64, each entry as a multiple of its leader.
        scaled: whether multiples are twins, and not only copies.
    """

    leader_N: Tensor
    ratio_N: Tensor
    scaled: bool

    def mix(self, entries: int = 1) -> Tensor:
        """``[N, entries, K]``: random weights under which a reader's row is marked as if twins were merged.

        Args:
            entries: how many numbers of the row belong to each of the N.
        """
        mix_NEK = random_mix(len(self.leader_N) * entries).view(-1, entries, PROJECTIONS)
        scale_N = self.ratio_N * (self.leader_N >= 0)
        return mix_NEK[self.leader_N.clamp(min=0)] * scale_N[:, None, None]

    def refined(self, found: Mark) -> Classes:
        """Split the classes whose members do not bear out that they are multiples, or zero."""
        woken = self if not found.scaled else _woken(self, found)
        return _split(woken, found)


def find_classes(marks: Iterable[Mark], *, scaled: bool, zeros: bool) -> Classes:
    """The coarsest partition that all marks bear out.

    Args:
        marks: of the same entries.
        scaled: whether multiples are twins, and not only copies.
        zeros: whether entries that are zero in all marks are put into a class of zeros.
    """
    marks = list(marks)
    scales = [m.values_NK.norm().clamp(min=1e-300) for m in marks]
    values_NK = torch.cat([m.values_NK / scale for m, scale in zip(marks, scales, strict=True)], dim=1)
    limits = [m.limit_N / scale for m, scale in zip(marks, scales, strict=True)]
    classes = _grouped(values_NK, torch.stack(limits).norm(dim=0), scaled=scaled)
    if zeros:
        zero_N = torch.stack([m.zero_N for m in marks]).all(dim=0)
        classes = replace(classes, leader_N=classes.leader_N.masked_fill(zero_N, -1))
    for found in marks:
        classes = classes.refined(found)
    return classes


def _split(classes: Classes, found: Mark) -> Classes:
    """Members that disagree with their leader form classes of their own, led by the first of them."""
    leader_N, ratio_N = classes.leader_N.clone(), classes.ratio_N.clone()
    size = len(leader_N)
    while True:
        own_NK, lead_NK = found.values_NK, found.values_NK[leader_N.clamp(min=0)]
        expected_NK = lead_NK * ratio_N[:, None] if found.scaled else lead_NK
        factor_N = ratio_N.abs() if found.scaled else torch.ones_like(ratio_N)
        limit_N = torch.maximum(found.limit_N, factor_N * found.limit_N[leader_N.clamp(min=0)])
        off_N = (own_NK - expected_NK).norm(dim=1) > limit_N
        bad = (off_N & (leader_N >= 0)).nonzero().squeeze(1)
        if not len(bad):
            return replace(classes, leader_N=leader_N, ratio_N=ratio_N)
        first_N = torch.full((size,), size).scatter_reduce(0, leader_N[bad], bad, "amin")
        new = first_N[leader_N[bad]]
        ratio_N[bad] = ratio_N[bad] / ratio_N[new]
        leader_N[bad] = new


def _woken(classes: Classes, found: Mark) -> Classes:
    """Entries thought zero that are written after all are twins where they are multiples of one another."""
    woken = ((classes.leader_N < 0) & ~found.zero_N).nonzero().squeeze(1)
    if not len(woken):
        return classes
    among = _grouped(found.values_NK[woken], found.limit_N[woken], scaled=classes.scaled)
    return replace(
        classes,
        leader_N=classes.leader_N.index_copy(0, woken, woken[among.leader_N]),
        ratio_N=classes.ratio_N.index_copy(0, woken, among.ratio_N),
    )


def _grouped(values_NK: Tensor, limit_N: Tensor, *, scaled: bool) -> Classes:
    """Group rows that are nearer than their limits, by the order of a random projection, to compare few pairs."""
    size_N = values_NK.norm(dim=1).clamp(min=1e-300)
    directions = torch.randn(
        values_NK.shape[1], _FILTERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    directions = directions / directions.norm(dim=0)
    unit_NK = values_NK / size_N[:, None]
    signed_N = size_N
    if scaled:
        signed_N = torch.where(unit_NK @ directions[:, 0] < 0, -size_N, size_N)
        unit_NK = values_NK / signed_N[:, None]
    filters_NF = unit_NK @ directions
    order = filters_NF[:, 0].argsort(stable=True)
    reach_N = (limit_N / size_N).clamp(max=_REACH)
    compared_NK = unit_NK if scaled else values_NK
    allowed_N = reach_N if scaled else limit_N
    root = _roots(filters_NF[order], reach_N[order], compared_NK[order], allowed_N[order])
    leader_N = torch.empty_like(order).index_copy(0, order, order[root])
    first_N = torch.full_like(order, len(order)).scatter_reduce(0, leader_N, torch.arange(len(order)), "amin")
    leader_N = first_N[leader_N]
    if not scaled:
        return Classes(leader_N, torch.ones_like(size_N), scaled)
    ratio_N = signed_N / signed_N[leader_N]
    copies_N = (ratio_N.abs() - 1).abs() <= torch.maximum(reach_N, reach_N[leader_N])
    return Classes(leader_N, torch.where(copies_N, ratio_N.sign(), ratio_N), scaled)


def _roots(filters_NF: Tensor, reach_N: Tensor, values_NK: Tensor, allowed_N: Tensor) -> Tensor:
    """For each row, in the order of the first filter, a row before it that is near, followed to its end."""
    count = len(filters_NF)
    parent = torch.arange(count)
    for offset in range(1, count):
        alone = parent[offset:] == torch.arange(offset, count)
        reach = 2 * torch.maximum(reach_N[offset:], reach_N[:-offset])
        near = alone & (filters_NF[offset:, 0] - filters_NF[:-offset, 0] <= reach)
        if not near.any():
            break
        for filter_N in filters_NF.T[1:]:
            near = near & ((filter_N[offset:] - filter_N[:-offset]).abs() <= reach)
        later = near.nonzero().squeeze(1) + offset
        off = (values_NK[later] - values_NK[later - offset]).norm(dim=1)
        later = later[off <= torch.maximum(allowed_N[later], allowed_N[later - offset])]
        parent[later] = later - offset
    while not torch.equal(parent, parent[parent]):
        parent = parent[parent]
    return parent
