"""Which layers can go: those whose absence the others can make up for.

A block that is rebuilt before a gap aims at the teacher's stream behind it, so what counts is not what a layer does but
what of it that block cannot do. Each gap is bridged by refitting the last writer of the block before it, and the loss
of the bridged model decides. Where a norm stands between a writer and the stream (OLMo-2, Gemma 2 and 3) no linear map
says what a block can do, and nothing is bridged. That whole runs of layers are nearly linear maps is the observation of
Gromov et al. (https://arxiv.org/abs/2403.17887) and Razzhigaev et al. (https://arxiv.org/abs/2405.12250).

Shape letters: B windows, T tokens, N tokens of all windows, D hidden size, X what the last writer of a block reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.solve import Moments, sum_over_processes
from dslm.shrink.streams import batches, token_weights
from dslm.shrink.survey import removal_losses
from dslm.shrink.tap import anatomy, bias_of, watch, with_one
from dslm.shrink.walk import Walk, mean_loss

Gap = tuple[int, int]
"""The first layer that is gone, and the first one behind it that is not."""
_JUDGED, _FITTED = 2048, 384
"""So many tokens to judge by, the first quarter of each window, and so many others of it to fit bridges on, at most."""
_ROUNDS, _RUN = 3, 3
"""Rounds at most; so many layers go in one before there is another."""
_NEAR, _LIKELY = 0.1, (2, 4)
"""So many choices are likely at least and at most; in between, those that cost at most such a share more than the best.
For SmolLM2-135M bridges once put a run of three 4 % of the cost ahead of one that is better when it is rebuilt."""


def likely_layers(
    walk: Walk, ids_BT: Tensor, count: int, *, bridge: bool = True, progress: Progress | None = None
) -> list[tuple[int, ...]]:
    """Choices of layers to keep that cost about the least loss, the best one first; all processes get the same.

    In up to `_ROUNDS` rounds a run of neighbours goes; the choices differ in that of the last round. The first layer
    always stays.

    Args:
        walk: the model.
        ids_BT: windows to measure on, int64.
        count: how many layers to keep.
        bridge: whether blocks are refitted to make up for what goes; otherwise the loss without it decides.
        progress: called with a label, blocks done and blocks in all.
    """
    layers = len(walk.blocks)
    out = layers - count
    judged = max(2, ids_BT.shape[1] // 4)
    some_BT = ids_BT[: max(1, _JUDGED // judged)]
    windows = some_BT[:, :judged], some_BT[:, judged : judged + _FITTED]
    bridge = bridge and walk.weights.family.writers_add(walk.weights.config)
    choices, costs = [frozenset[int]()], [0.0]
    rounds = min(_ROUNDS, ceil(out / _RUN))
    for number in range(rounds):
        gone = choices[0]
        size = (out - len(gone)) // (rounds - number)
        left = [layer for layer in range(1, layers) if layer not in gone]
        choices = [gone.union(left[i : i + size]) for i in range(len(left) - size + 1)]
        measured = [frozenset[int](), *choices]
        if bridge:
            whole, *losses = bridged_losses(walk, *windows, measured, progress)
        else:
            whole, *losses = removal_losses(walk, windows[0], measured, progress)
        order = sorted(range(len(choices)), key=losses.__getitem__)
        choices, costs = [choices[i] for i in order], [losses[i] - whole for i in order]
    least, most = _LIKELY
    count = max(least, sum(cost - costs[0] <= _NEAR * abs(costs[0]) for cost in costs[:most]))
    return [tuple(layer for layer in range(layers) if layer not in gone) for gone in choices[:count]]


def bridged_losses(
    walk: Walk,
    ids_BT: Tensor,
    fit_BT: Tensor,
    removals: Sequence[frozenset[int]],
    progress: Progress | None = None,
) -> list[float]:
    """Loss of the model without some of its layers, each gap bridged, for many choices in one pass over the blocks.

    Args:
        walk: the model.
        ids_BT: windows to judge by, int64.
        fit_BT: windows to fit the bridges on, int64.
        removals: the layers to leave out, per choice; never the first.
        progress: called with a label, blocks done and blocks in all.

    Returns:
        Mean cross-entropy in nats per predicted token, per choice.
    """
    assert not any(0 in gone for gone in removals), "nothing stands before the first layer to bridge it"
    plans = [gaps_of(gone) for gone in removals]
    # Choices share a stream as long as they have had the same gaps.
    histories = {plan[:length] for plan in plans for length in range(len(plan) + 1)}
    end = {history: max(_leaves(plan, history) for plan in plans) for history in histories}
    gaps = {gap for plan in plans for gap in plan}
    teacher = walk.embed(fit_BT)
    streams: dict[tuple[Gap, ...], Tensor] = {(): walk.embed(ids_BT)}
    read: dict[tuple[Gap, ...], Tensor] = {}
    before: dict[int, tuple[Tensor, Tensor, bool]] = {}
    for layer in range(len(walk.blocks) + 1):
        for gap in sorted(gap for gap in gaps if gap[1] == layer):
            x_BTX, before_BTD, biased = before[gap[0]]
            bridge_XD = _bridge(x_BTX, before_BTD, teacher, biased=biased)
            for history in [history for history in streams if history[-1:] == (gap,)]:
                streams[history] = streams[history] + read[history] @ bridge_XD
                del read[history]
        before = {
            start: kept for start, kept in before.items() if any(s == start and e > layer for s, e in gaps)
        }
        streams = {history: stream for history, stream in streams.items() if end[history] > layer}
        if layer == len(walk.blocks):
            break
        leaving = [history for history in histories if history and history[-1][0] == layer + 1]
        with walk.block(layer):
            writer = anatomy(walk, layer, teacher[:1]).writers[-1] if leaving else None
            for history in [history for history in streams if not history or history[-1][1] <= layer]:
                forks = [fork for fork in leaving if fork[:-1] == history]
                streams[history], x_BTX = _past(walk, layer, streams[history], writer if forks else None)
                for fork in forks:
                    streams[fork], read[fork] = streams[history], x_BTX
            if before or any(start > layer for start, _ in gaps):
                teacher, x_BTX = _past(walk, layer, teacher, writer)
                if writer is not None:
                    before[layer + 1] = x_BTX, teacher, bias_of(walk, writer) is not None
        if progress is not None:
            progress("ranking layers", layer + 1, len(walk.blocks))
    with walk.head():
        return [mean_loss(walk, streams[plan], ids_BT) for plan in plans]


def _past(walk: Walk, layer: int, stream_BTD: Tensor, writer: str | None) -> tuple[Tensor, Tensor]:
    """The stream behind a loaded block and what one of its writers reads, with a one behind it for its bias."""
    out_BTD, seen = watch(walk, layer, stream_BTD, [writer] if writer else ())
    x_NX = seen[writer] if writer else out_BTD.flatten(0, 1)[:, :0]
    if writer and bias_of(walk, writer):
        x_NX = with_one(x_NX)
    return out_BTD, x_NX.reshape(*out_BTD.shape[:2], x_NX.shape[1])


def gaps_of(gone: frozenset[int]) -> tuple[Gap, ...]:
    """The gaps that some layers leave, in order."""
    starts = sorted(layer for layer in gone if layer - 1 not in gone)
    ends = sorted(layer + 1 for layer in gone if layer + 1 not in gone)
    return tuple(zip(starts, ends, strict=True))


def _leaves(plan: tuple[Gap, ...], history: tuple[Gap, ...]) -> float:
    """The layer before which a choice leaves a history for a longer one: never, if that is all; -1 if not its own."""
    if plan[: len(history)] != history:
        return -1
    return float("inf") if plan == history else plan[len(history)][0]


def _bridge(x_BTX: Tensor, before_BTD: Tensor, after_BTD: Tensor, *, biased: bool) -> Tensor:
    """The map from what the last writer before a gap reads to what is missing behind the gap, ``[X, D]``.

    The ridge is as strong as the features outnumber the tokens; the last feature is free of it where it is a bias's.
    """
    inputs, outputs, length = x_BTX.shape[2], before_BTD.shape[2], before_BTD.shape[1]
    moments = Moments.zero(inputs, outputs, before_BTD.device)
    for some in batches(0, len(before_BTD), length):
        x_NX, before_ND, after_ND = (t[some].flatten(0, 1) for t in (x_BTX, before_BTD, after_BTD))
        moments.add(x_NX, after_ND - before_ND, token_weights(after_ND))
    diagonal_X = moments.summed().gram_XX.diagonal()
    tokens = float(sum_over_processes(torch.tensor(float(before_BTD[..., 0].numel()))))
    damped = inputs - int(biased)
    diagonal_X[:damped] += diagonal_X[:damped] * inputs / tokens
    diagonal_X += diagonal_X.mean() * 1e-9 + 1e-30
    bridge_XD: Tensor = torch.cholesky_solve(moments.cross_YX.T, torch.linalg.cholesky(moments.gram_XX))
    return bridge_XD.to(before_BTD.dtype)
