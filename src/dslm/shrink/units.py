"""FFN units and heads: where they lie, what they are recognised by, and which are twins or do nothing.

Shape letters: M units, H query heads, K key-value heads, N units of either kind, U units, E entries per unit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dslm.families.axes import Axis, Role
from dslm.shrink.twins import Mark, find_classes, label


@dataclass(slots=True)
class Units:
    """Marks of the units of one dimension in one layer.

    Attributes:
        parts: one item for each row that a unit has (gate, up; query, key, value), with its bias.
        gains: what a norm over all units multiplies them with.
        normed: whether there is such a norm.
        under_norm: the parts that it runs over.
    """

    parts: dict[tuple[str, int], list[Mark]] = field(default_factory=lambda: defaultdict(list))
    gains: list[Mark] = field(default_factory=list)
    under_norm: list[Mark] = field(default_factory=list)

    def add(self, name: str, axis: Axis, wheres: list[Tensor], whole: Mark) -> None:
        """Take the marks of one tensor apart."""
        module = name.rpartition(".")[0]
        for number, where_UE in enumerate(wheres):
            found = whole.at(where_UE)
            if axis.role is Role.GAIN:
                self.gains.append(found)
                continue
            self.parts[module, number].append(found)
            if axis.normed:
                self.under_norm.append(found)

    @property
    def normed(self) -> bool:
        """Whether a norm runs over all units together."""
        return bool(self.under_norm)

    @property
    def marks(self) -> list[Mark]:
        """All marks."""
        return [*(m for part in self.parts.values() for m in part), *self.gains]

    @property
    def unseen_N(self) -> Tensor | bool:
        """Which units the norm over all of them would not miss."""
        return _all_zero(self.under_norm) if self.under_norm else True


def _all_zero(marks: list[Mark]) -> Tensor:
    return torch.stack([m.zero_N for m in marks]).all(dim=0)


def find_unit_twins(units: Units, unread_M: Tensor, *, silent_at_zero: bool) -> Tensor:
    """Classes of FFN units.

    Args:
        units: their marks.
        unread_M: which of them nobody reads.
        silent_at_zero: whether the activation of zero is zero, so that a unit with a part that is zero does nothing.

    Returns:
        int64 ``[M]``, the first living twin of each; -1 where it does nothing.
    """
    leader_M = find_classes(units.marks, scaled=False, zeros=False).leader_N
    dead_M = unread_M
    if silent_at_zero:
        for part in units.parts.values():
            dead_M = dead_M | _all_zero(part)
    return _led_by_the_living(leader_M, dead_M)


def find_head_twins(queries: Units, keys_values: Units, unread_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes of query heads and key-value heads, and which key-value heads may go.

    Args:
        queries: marks of the query heads.
        keys_values: marks of the key-value heads.
        unread_H: which query heads nobody reads.

    Returns:
        The first living twin of each query head (-1 where it does nothing), the first twin of each key-value head,
        and whether each key-value head may go altogether.
    """
    kv_head_K = find_classes(keys_values.marks, scaled=False, zeros=False).leader_N
    group = len(unread_H) // len(kv_head_K)
    # In every table queries stand before keys, and keys before values.
    no_value_K = _all_zero(list(keys_values.parts.values())[-1])
    dead_H = (unread_H | no_value_K.repeat_interleave(group)) & queries.unseen_N
    same_kv = label(kv_head_K.repeat_interleave(group))
    head_H = _led_by_the_living(
        find_classes([*queries.marks, same_kv], scaled=False, zeros=False).leader_N, dead_H
    )
    idle_K = (head_H < 0).view(-1, group).all(dim=1) & keys_values.unseen_N
    return head_H, kv_head_K, idle_K


def _led_by_the_living(leader_N: Tensor, dead_N: Tensor) -> Tensor:
    """The classes without their dead members."""
    alive = (~dead_N).nonzero().squeeze(1)
    first_N = torch.full_like(leader_N, -1).scatter_reduce(
        0, leader_N[alive], alive, "amin", include_self=False
    )
    return first_N[leader_N].masked_fill(dead_N, -1)
