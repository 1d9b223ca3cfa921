"""Which heads become which, under grouped-query attention.

Query head ``q`` of the source attends through key-value head ``q // (H / K)``. A copy of ``q`` therefore must
lie in a group whose key-value head is a copy of that one; tiling query heads over kept key-value heads pairs them
wrongly. Head counts must also allow it: a source group of ``r`` heads has to fit into the target groups it gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dslm.errors import SizeError
from dslm.sizes import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class HeadLayout:
    """Source of every target head.

    Attributes:
        heads: ``[H']``, source query head of each target query head.
        kv_heads: ``[K']``, source key-value head of each target key-value head.
        new_heads: ``[H']``, whether the query head repeats one that came before it.
        new_kv_heads: ``[K']``, whether the key-value head is not needed to hold a source group.
    """

    heads: NDArray[np.int64]
    kv_heads: NDArray[np.int64]
    new_heads: NDArray[np.bool_]
    new_kv_heads: NDArray[np.bool_]


def lay_out_heads(source: Sizes, target: Sizes) -> HeadLayout:
    """Assign a source head to every target head.

    Key-value heads are tiled; the target groups of one source group are filled with its query heads in turn, so
    that whole multiples come out as whole tiles.

    Raises:
        SizeError: the source's groups do not fit into the target's.
    """
    per_group = source.num_attention_heads // source.num_key_value_heads
    per_target = target.num_attention_heads // target.num_key_value_heads
    kv_heads = np.arange(target.num_key_value_heads) % source.num_key_value_heads
    needed = -(-per_group // per_target)
    fewest = target.num_key_value_heads // source.num_key_value_heads
    if fewest < needed:
        raise _too_narrow(source, target, needed)
    seen: dict[int, int] = {}
    heads, new_heads, new_kv_heads = [], [], []
    for kv_head in kv_heads.tolist():
        filled = seen.get(kv_head, 0)
        new_kv_heads.append(filled >= per_group)
        for slot in range(filled, filled + per_target):
            heads.append(kv_head * per_group + slot % per_group)
            new_heads.append(slot >= per_group)
        seen[kv_head] = filled + per_target
    return HeadLayout(
        heads=np.array(heads),
        kv_heads=kv_heads,
        new_heads=np.array(new_heads),
        new_kv_heads=np.array(new_kv_heads),
    )


def _too_narrow(source: Sizes, target: Sizes, needed: int) -> SizeError:
    heads, kv_heads = source.num_attention_heads, source.num_key_value_heads
    wide = needed * kv_heads
    per_target = target.num_attention_heads // target.num_key_value_heads
    return SizeError(
        f"{target.num_attention_heads} heads in {target.num_key_value_heads} groups cannot hold "
        f"{heads} heads in {kv_heads} groups: each group of {heads // kv_heads} needs {needed} groups of {per_target}",
        f"nearest legal: num_key_value_heads {kv_heads} with num_attention_heads "
        f"{-(-target.num_attention_heads // kv_heads) * kv_heads}, "
        f"or {wide} with {wide * per_target}",
    )
