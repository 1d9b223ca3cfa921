"""Turning what is redundant into folds of the sizes wanted.

A partition may always be refined, so where fewer entries are to go than could, some twins simply stay.
Heads have to be packed: every layer needs the same number of query heads in each key-value head's group.

Shape letters: C channels, M units, H query heads, K key-value heads, T target entries.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from dslm.shrink.find_twins import LayerTwins
from dslm.shrink.fold import Fold, Key
from dslm.shrink.twins import Classes


def fold_stream(stream: Classes, size: int, *, whole: bool) -> Fold:
    """The fold of the stream to one of its `stream_sizes`.

    Each channel is scaled so that a norm keeps its mean square: ``amplitude^2 = (d' / d) sum of ratio^2``.

    Args:
        stream: the channels' classes.
        size: the size wanted.
        whole: as in `stream_sizes`.
    """
    leader_C = stream.leader_N.clone()
    zeros = (leader_C < 0).nonzero().squeeze(1)
    if whole:
        copies, spare = _whole_shapes(stream)[size]
        leader_C = _in_chunks(leader_C, copies)
    else:
        spare = max(0, len(zeros) - (stream.leader_N.numel() - size))
    leader_C[zeros[:spare]] = zeros[:spare]
    twins = ((leader_C >= 0) & (leader_C != torch.arange(len(leader_C)))).nonzero().squeeze(1)
    alone = 0 if whole else size - int((leader_C == torch.arange(len(leader_C))).sum())
    leader_C[twins[:alone]] = twins[:alone]
    ratio_C = torch.where(leader_C < 0, 1.0, stream.ratio_N / stream.ratio_N[leader_C.clamp(min=0)])
    fold = _fold(leader_C, ratio_C)
    used = leader_C >= 0
    square_T = torch.zeros(size, dtype=torch.float64)
    square_T.index_add_(0, fold.group_S[used], ratio_C[used] ** 2)
    return replace(fold, amplitude_T=(size / fold.source * square_T).sqrt())


def stream_sizes(stream: Classes, floor: int, *, whole: bool) -> list[int]:
    """Sizes that the stream can have without loss, ascending, none below ``floor``.

    Args:
        stream: the channels' classes.
        floor: the least size wanted.
        whole: whether every channel must keep equally many copies, as a LayerNorm's mean demands.
    """
    size = stream.leader_N.numel()
    if whole:
        return sorted(d for d in {*_whole_shapes(stream), size} if d >= floor)
    distinct = int((stream.leader_N == torch.arange(size)).sum())
    return list(range(max(floor, distinct, 1), size + 1))


def _whole_shapes(stream: Classes) -> dict[int, tuple[int, int]]:
    """Size -> copies merged into one and zero channels kept."""
    alive = stream.leader_N[stream.leader_N >= 0]
    counts = torch.unique(alive, return_counts=True)[1].tolist()
    zeros = stream.leader_N.numel() - len(alive)
    common = gcd(*counts) if counts else 1
    return {
        len(alive) // copies + spare: (copies, spare)
        for copies in range(1, common + 1)
        if common % copies == 0
        for spare in range(zeros + 1)
    }


def _in_chunks(leader_C: Tensor, copies: int) -> Tensor:
    """Every class cut into classes of ``copies`` members."""
    cut_C = leader_C.clone()
    order = leader_C.argsort(stable=True)
    members = order[leader_C[order] >= 0].view(-1, copies)
    cut_C[members] = members[:, :1].expand_as(members)
    return cut_C


def _fold(leader_N: Tensor, ratio_N: Tensor) -> Fold:
    keep_T = torch.unique(leader_N[leader_N >= 0])
    group_N = torch.searchsorted(keep_T, leader_N).masked_fill(leader_N < 0, -1)
    return Fold(keep_T, group_N, ratio_N, torch.ones(len(keep_T), dtype=torch.float64))


def fold_units(unit_M: Tensor, size: int) -> Fold:
    """The fold of one layer's FFN to ``size`` units, at least as many as are distinct."""
    leader_M = unit_M.clone()
    idle = (leader_M != torch.arange(len(leader_M))).nonzero().squeeze(1)
    # A twin that stays teaches more than a dead unit does.
    idle = idle[(leader_M[idle] < 0).long().argsort(stable=True)]
    kept = idle[: size - (len(leader_M) - len(idle))]
    leader_M[kept] = kept
    return _fold(leader_M, torch.ones(len(leader_M), dtype=torch.float64))


def distinct_units(layers: list[LayerTwins]) -> int:
    """The least FFN size that holds every layer's distinct units."""
    return max(1, *(int((m.unit_M == torch.arange(len(m.unit_M))).sum()) for m in layers))


def head_counts(layers: list[LayerTwins], floor: tuple[int, int]) -> list[tuple[int, int]]:
    """Numbers of query and key-value heads that hold every layer without loss, none below ``floor``."""
    heads, kv_heads = len(layers[0].head_H), len(layers[0].kv_head_K)
    held = [_held(layer) for layer in layers]
    return [
        (kv_target * group, kv_target)
        for kv_target in range(max(1, floor[1]), kv_heads + 1)
        for group in range(1, heads // kv_target + 1)
        if kv_target * group >= floor[0]
        if all(sum(_slots_needed(classes, group).values()) <= kv_target for classes in held)
    ]


def _held(layer: LayerTwins) -> dict[int, tuple[int, bool]]:
    """For each class of key-value heads: its distinct query heads, and whether it must stay even with none."""
    per_kv = len(layer.head_H) // len(layer.kv_head_K)
    distinct_K = (layer.head_H == torch.arange(len(layer.head_H))).view(-1, per_kv).sum(dim=1)
    held: dict[int, tuple[int, bool]] = {}
    columns = (layer.kv_head_K.tolist(), distinct_K.tolist(), layer.spare_kv_K.tolist())
    for leader, distinct, spare in zip(*columns, strict=True):
        before, busy = held.get(leader, (0, False))
        held[leader] = (before + distinct, busy or not spare)
    return held


def _slots_needed(held: dict[int, tuple[int, bool]], group: int) -> dict[int, int]:
    """Key-value heads that each class of them needs when ``group`` query heads share one."""
    return {leader: max(-(-distinct // group), int(busy)) for leader, (distinct, busy) in held.items()}


def fold_heads(layer: int, twins: LayerTwins, heads: int, kv_heads: int) -> dict[Key, Fold]:
    """The folds of one layer's heads, packed into ``kv_heads`` equal groups."""
    group = heads // kv_heads
    per_kv = len(twins.head_H) // len(twins.kv_head_K)
    members: dict[int, list[int]] = defaultdict(list)
    for kv_head, leader in enumerate(twins.kv_head_K.tolist()):
        members[leader].append(kv_head)
    kv_slots, head_slots, silent = [], [], []
    for leader, slots in _share_slots(twins, members, group, kv_heads).items():
        kv_slots += [members[leader][slot % len(members[leader])] for slot in range(slots)]
        own = [h for kv in members[leader] for h in range(kv * per_kv, (kv + 1) * per_kv)]
        # First what is distinct, then twins with what they write, then the dead, then copies that nobody reads.
        rank = {h: (twins.head_H[h] != h) + int(twins.head_H[h] < 0) for h in own}
        chosen = sorted(own, key=lambda h: (int(rank[h]), h))[: slots * group]
        repeats = [own[i % len(own)] for i in range(slots * group - len(chosen))]
        head_slots += chosen + repeats
        silent += [False] * len(chosen) + [True] * len(repeats)
    folds = {
        "heads": _packed(twins.head_H, head_slots, silent),
        "kv_heads": _packed(twins.kv_head_K, kv_slots, [False] * len(kv_slots)),
    }
    if twins.normed:
        classes = {"heads": twins.head_H, "kv_heads": twins.kv_head_K}
        folds |= {f"normed {name}": _balanced(fold, classes[name]) for name, fold in folds.items()}
    return {(name, layer): fold for name, fold in folds.items()}


def _share_slots(
    twins: LayerTwins, members: dict[int, list[int]], group: int, kv_heads: int
) -> dict[int, int]:
    """Key-value heads that each class gets: what it needs, and what is over to those with most members left."""
    slots = _slots_needed(_held(twins), group)
    for _ in range(kv_heads - sum(slots.values())):
        widest = max(slots, key=lambda leader: len(members[leader]) - slots[leader])
        slots[widest] += 1
    return {leader: count for leader, count in slots.items() if count}


def _packed(leader_N: Tensor, slots: list[int], silent: list[bool]) -> Fold:
    """Targets repeat the entries in ``slots``; the rest go where their leaders are; nobody reads the silent ones."""
    group_N = torch.full_like(leader_N, -1)
    where = {entry: slot for slot, entry in enumerate(slots) if not silent[slot]}
    for entry, leader in enumerate(leader_N.tolist()):
        group_N[entry] = where.get(entry, where.get(leader, -1))
    ones = torch.ones(len(leader_N), dtype=torch.float64)
    return Fold(torch.tensor(slots), group_N, ones, torch.ones(len(slots), dtype=torch.float64))


def _balanced(fold: Fold, leader_N: Tensor) -> Fold:
    """Scaled so that a norm over all heads keeps its mean square, whatever the number of each head's copies."""
    class_T = leader_N[fold.keep_T]
    before_T = (leader_N == class_T[:, None]).sum(dim=1)
    after_T = (class_T == class_T[:, None]).sum(dim=1)
    square_T = fold.target / fold.source * before_T / after_T
    return replace(fold, amplitude_T=square_T.double().sqrt())
