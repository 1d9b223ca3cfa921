"""What a few windows say about a model: which part of them is enough, and what each layer is worth.

Shape letters: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.streams import batches
from dslm.shrink.walk import Walk, mean_loss

_WINDOWS, _TOKENS = 4, 512
"""So many windows of at most so many tokens are enough to rank layers and channels."""


def few(ids_BT: Tensor) -> Tensor:
    """The part of some windows that a survey needs."""
    return ids_BT[:_WINDOWS, :_TOKENS]


def walked_loss(walk: Walk, ids_BT: Tensor, progress: Progress | None = None) -> float:
    """Loss of a model of which one block at a time is in memory.

    Args:
        walk: the model.
        ids_BT: windows, int64.
        progress: called with a label, blocks done and blocks in all.

    Returns:
        Mean cross-entropy in nats per predicted token.

    Raises:
        VerificationError: what a block writes is NaN or infinite.
    """
    stream_BTD = walk.embed(ids_BT)
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            for some in batches(0, *ids_BT.shape):
                stream_BTD[some] = walk.run(layer, stream_BTD[some])
        if progress is not None:
            progress("measuring", layer + 1, len(walk.blocks))
    with walk.head():
        return mean_loss(walk, stream_BTD, ids_BT)


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
    with walk.head():
        return [mean_loss(walk, streams.get(i, whole), ids_BT) for i in range(len(removals))]
