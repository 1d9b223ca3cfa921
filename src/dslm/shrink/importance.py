"""What the loss feels of each query head: first-order importance, by one backward pass, block by block.

Silencing a head changes the loss by about ``-z . g`` at each token, ``z`` what the head gives there and ``g`` the
loss's gradient with respect to that; the sum of its square over tokens is the importance of Molchanov et al.
(https://arxiv.org/abs/1906.10771, equation 8), here of activations (``docs/how-it-works.md``, "What stays"). The
streams between the blocks wait in a file if they are large, so backwards as forwards one block is in memory at a time.

Shape letters: B windows, T tokens, N some tokens, D hidden size, L layers, X what heads give, H query heads, V
vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dslm.errors import VerificationError, enough_memory
from dslm.progress import Progress
from dslm.shrink.refine import PIECE, positions_at_once, repeatable
from dslm.shrink.solve import sum_over_processes
from dslm.shrink.streams import empty_stream
from dslm.shrink.tap import reads_heads
from dslm.shrink.walk import Walk

_TOKENS, _SHORTEST = 16384, 256
"""So many tokens are read, on each process of a distributed run, an equal part of each window, but so many of a window
at least."""
_STREAMS = 3
"""So many streams of all windows are in memory when blocks are rebuilt. If those between the blocks take more than
that, they go to a file, so that this pass never is the largest part of a shrink."""


def importance(
    walk: Walk, ids_BT: Tensor, folder: Path, progress: Progress | None = None
) -> dict[str, Tensor]:
    """How much a model's loss feels each query head; all processes of a distributed run get the same.

    Args:
        walk: the model.
        ids_BT: windows, int64; their `beginnings` are read. A process may have none.
        folder: where the streams between blocks go for the time being, if they are large.
        progress: called with a label, steps done and steps in all.

    Returns:
        Name of a matrix that reads the heads -> float64 ``[H]``: the sum over tokens of the squared first-order change
        of the loss if the head were silent there.

    Raises:
        VerificationError: activations or gradients are not finite.
        OutOfMemoryError: the memory was not enough.
    """
    sizes = walk.weights.family.dimensions(walk.weights.config)
    most = _STREAMS * 4 * ids_BT.numel() * sizes["hidden"]
    ids_BT = beginnings(ids_BT)
    readers = [
        n for layer in range(len(walk.blocks)) for n in walk.linears(layer).values() if reads_heads(walk, n)
    ]
    felt = {name: torch.zeros(sizes["heads"], dtype=torch.float64) for name in readers}
    if len(ids_BT):
        with (
            enough_memory(
                f"for the gradients of one block on a window of {ids_BT.shape[1]} tokens",
                "lower --sequence-length",
            ),
            tempfile.TemporaryDirectory(dir=folder) as room,
        ):
            shape = (len(walk.blocks) + 1, *ids_BT.shape, sizes["hidden"])
            _add(felt, walk, ids_BT, empty_stream(shape, Path(room), "between", most=most), progress)
    for name, felt_H in felt.items():
        if not torch.isfinite(sum_over_processes(felt_H)).all():
            raise VerificationError(
                f"the gradient of the loss at {name} is NaN or infinite",
                "the model is broken there or behind it; check it with dslm diff",
            )
    return felt


def beginnings(ids_BT: Tensor) -> Tensor:
    """The part of some windows that is read: as much of each, and all of few."""
    windows, length = ids_BT.shape
    read = min(length, max(_SHORTEST, _TOKENS // max(1, windows)))
    return ids_BT[: _TOKENS // read, :read].contiguous()


@torch.no_grad()
def _add(
    felt: Mapping[str, Tensor], walk: Walk, ids_BT: Tensor, between_LBTD: Tensor, progress: Progress | None
) -> None:
    """Add what the loss of some windows feels; there is room for the streams before each block and behind the last."""
    pieces = torch.split(torch.arange(len(ids_BT)), max(1, PIECE // ids_BT.shape[1]))
    layers = len(walk.blocks)

    def step(number: int) -> None:
        if progress is not None:
            progress("ranking heads", number, 2 * layers)

    walk.embed(ids_BT, between_LBTD[0])
    for layer in range(layers):
        with walk.block(layer):
            for some in pieces:
                out_BTD = walk.run(layer, between_LBTD[layer, some].to(walk.device))
                between_LBTD[layer + 1, some] = out_BTD.cpu()
        step(layer + 1)
    gradient_BTD = between_LBTD[layers]  # in the room of what it is the gradient of
    with walk.head():
        for some in pieces:
            gradient_BTD[some] = _through_head(walk, gradient_BTD[some], ids_BT[some])
    for layer in reversed(range(layers)):
        with walk.block(layer):
            for some in pieces:
                gradient_BTD[some], found = _through_block(
                    walk, layer, between_LBTD[layer, some], gradient_BTD[some]
                )
                for name, felt_H in found.items():
                    felt[name].add_(felt_H)
        step(2 * layers - layer)


def _through_head(walk: Walk, end_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """The gradient of the summed loss with respect to the stream behind the last block; the head is loaded."""
    gradient_BTD = torch.zeros_like(end_BTD)
    for number, (end_TD, ids_T) in enumerate(zip(end_BTD, ids_BT, strict=True)):
        for positions in torch.split(torch.arange(len(ids_T) - 1), positions_at_once(walk)):
            with torch.enable_grad():
                end_ND = end_TD[positions].to(walk.device).requires_grad_()
                logits_NV = walk.logits(end_ND[:, None])[:, 0]  # each as a window of its own, as in `kl_loss`
                next_N = ids_T[positions + 1].to(walk.device)
                loss = nn.functional.cross_entropy(logits_NV, next_N, reduction="sum")
                (gradient_ND,) = torch.autograd.grad(loss, end_ND)
            gradient_BTD[number, positions] = gradient_ND.cpu()
    return gradient_BTD


def _through_block(
    walk: Walk, layer: int, before_BTD: Tensor, gradient_BTD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradient behind a loaded block to that before it, and what the loss feels of its heads."""
    reads: dict[str, Tensor] = {}
    handles = []
    for module, name in walk.linears(layer).items():
        if reads_heads(walk, name):

            def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                reads[name] = args[0]

            handles.append(module.register_forward_pre_hook(keep))
    try:
        with torch.enable_grad(), repeatable(walk.device):
            start_BTD = before_BTD.detach().to(walk.device).requires_grad_()
            out_BTD = walk.forward(layer, start_BTD)
            wanted = [start_BTD, *reads.values()]
            gradients = torch.autograd.grad(out_BTD, wanted, gradient_BTD.to(walk.device))
    finally:
        for handle in handles:
            handle.remove()
    heads = walk.weights.family.dimensions(walk.weights.config)["heads"]
    felt = {}
    for (name, z_BTX), g_BTX in zip(reads.items(), gradients[1:], strict=True):
        product_NX = (z_BTX.detach() * g_BTX).flatten(0, -2)
        change_NH = product_NX.view(len(product_NX), heads, -1).sum(dim=-1)
        felt[name] = change_NH.double().square().sum(dim=0).cpu()
    return gradients[0].cpu(), felt
