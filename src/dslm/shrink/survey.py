"""One pass over the teacher before shrinking: which layers can go, and which channels of the stream matter.

Shape letters: B windows, T tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.fold import Fold
from dslm.shrink.select import choose_channels
from dslm.shrink.tap import anatomy, tap
from dslm.shrink.walk import Walk, mean_loss

_WINDOWS, _TOKENS = 4, 512
"""So many windows of at most so many tokens are enough to rank layers and channels."""


def few(ids_BT: Tensor) -> Tensor:
    """The part of some windows that a survey needs."""
    return ids_BT[:_WINDOWS, :_TOKENS]


def removal_losses(
    walk: Walk, ids_BT: Tensor, removals: Sequence[frozenset[int]], progress: Progress | None = None
) -> list[float]:
    """Loss of the model without some of its layers, for many choices of layers in one pass over the blocks.

    Choices that have removed nothing yet share one stream, so a run of layers costs only what comes after it.

    Args:
        walk: the model.
        ids_BT: windows, int64.
        removals: the layers to leave out, per choice.
        progress: called with a label, blocks done and blocks in all.

    Returns:
        Mean cross-entropy in nats per predicted token, per choice.
    """
    whole = walk.embed(ids_BT)
    streams: dict[int, Tensor] = {}
    for layer in range(len(walk.blocks)):
        starting = [i for i, gone in enumerate(removals) if layer in gone and i not in streams]
        with walk.block(layer):
            for i in starting:
                streams[i] = whole
            for i, stream in streams.items():
                if layer not in removals[i]:
                    streams[i] = walk.run(layer, stream)
            whole = walk.run(layer, whole)
        if progress is not None:
            progress("ranking layers", layer + 1, len(walk.blocks))
    with walk.head() as logits:
        return [mean_loss(logits, streams.get(i, whole), ids_BT, walk.device) for i in range(len(removals))]


def choose_layers(
    walk: Walk, ids_BT: Tensor, count: int, progress: Progress | None = None
) -> tuple[int, ...]:
    """The layers to keep: without the run whose removal costs the least loss, or without the cheapest single ones.

    A run of neighbours leaves the stream elsewhere undisturbed and is usually the better choice (Gromov et al.,
    https://arxiv.org/abs/2403.17887). The first layer always stays.

    Args:
        walk: the model.
        ids_BT: windows to measure on, int64.
        count: how many layers to keep.
        progress: called with a label, blocks done and blocks in all.
    """
    layers = len(walk.blocks)
    out = layers - count
    if out == 0:
        return tuple(range(layers))
    runs = [frozenset(range(start, start + out)) for start in range(1, layers - out + 1)]
    singles = [frozenset([layer]) for layer in range(1, layers)] if out > 1 else []
    losses = removal_losses(walk, ids_BT, runs + singles, progress)
    best = min(range(len(runs)), key=losses.__getitem__)
    gone, loss = runs[best], losses[best]
    if singles:
        ranked = sorted(range(len(singles)), key=lambda i: losses[len(runs) + i])
        cheapest = frozenset().union(*(singles[i] for i in ranked[:out]))
        if removal_losses(walk, ids_BT, [cheapest], progress)[0] < loss:
            gone = cheapest
    return tuple(layer for layer in range(layers) if layer not in gone)


def choose_stream(walk: Walk, ids_BT: Tensor, count: int, progress: Progress | None = None) -> Fold:
    """The channels of the stream to keep: those that carry most of what its readers make of it.

    A channel's score is its share of the power of what each reader computes, ``E[u_j^2] |W_.j|^2`` with ``u`` the
    reader's input, summed over all readers, the output table among them.

    Args:
        walk: the model.
        ids_BT: windows to measure on, int64.
        count: channels to keep.
        progress: called with a label, blocks done and blocks in all.
    """
    stream = walk.embed(ids_BT)
    width = stream.shape[-1]
    scores = torch.zeros(width, dtype=torch.float64)
    power = torch.zeros(width, dtype=torch.float64)
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            readers = [s.names for s in anatomy(walk, layer, stream[:1]).stages if not s.writes]
            seen = tap(walk, layer, stream, inputs=[names[0] for names in readers])
            for names in readers:
                mean_D = seen[names[0]].square().mean(dim=0).double()
                for name in names:
                    scores += _share(mean_D, walk.get(name))
            power += _power(stream)
            stream = walk.run(layer, stream)
        if progress is not None:
            progress("ranking channels", layer + 1, len(walk.blocks))
    with walk.head():
        inputs = walk.before_head(stream)
        table = walk.model.get_output_embeddings().weight
        if table.shape[1] == len(scores):
            scores += _share(inputs.square().mean(dim=0).double(), table)
    return choose_channels(scores, power + _power(stream), count)


def _share(mean_D: Tensor, weight_YD: Tensor) -> Tensor:
    contribution_D = (mean_D * weight_YD.double().square().sum(dim=0)).cpu()
    return contribution_D / contribution_D.sum().clamp_min(1e-300)


def _power(stream_BTD: Tensor) -> Tensor:
    """Mean square of each channel, every token scaled to a mean square of one."""
    scale = stream_BTD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)
    return (stream_BTD.square() / scale).mean(dim=(0, 1)).double().cpu()
