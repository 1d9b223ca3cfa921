"""What the loss feels of units, heads and the stream: first-order importance, by one backward pass, block by block.

Silencing a unit changes the loss by about ``-z g`` at each token, ``z`` what the unit gives there and ``g`` the loss's
gradient with respect to that; the sum of its square over tokens is the importance of Molchanov et al.
(https://arxiv.org/abs/1906.10771, equation 8), here of activations. The streams between the blocks wait in a file, so
backwards as forwards one block is in memory at a time. For the stream the directions of the gradient are told, by their
second moment.

Shape letters: B windows, T tokens, D hidden size, L layers, X what a writer reads, H query heads, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dslm.errors import VerificationError
from dslm.progress import Progress
from dslm.shrink.refine import PIECE, positions_at_once, repeatable
from dslm.shrink.solve import sum_over_processes
from dslm.shrink.streams import stream_in_file
from dslm.shrink.tap import reads_heads, writes_stream
from dslm.shrink.walk import Walk

_LEAST, _MOST, _SHARE = 4096, 8192, 6
"""Tokens that are read, on each process of a distributed run: one in so many, but not fewer and not more; at least one
window. A backward pass takes a few times as long as a pass forwards, and twice the tokens choose hardly better."""
_LABEL = "ranking units"


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What a model's loss feels. All in float64, sums over tokens.

    Attributes:
        writers: name of a matrix that writes the stream -> ``[M]`` or ``[H]``: the squared first-order change of the
            loss if an FFN unit, or a whole query head, were silent; empty if that was not asked.
        stream_DD: second moment of the loss's gradient with respect to the stream scaled to a mean square of one,
            summed over the places between blocks; None if that was not asked.
    """

    writers: Mapping[str, Tensor] = field(default_factory=dict)
    stream_DD: Tensor | None = None


@torch.no_grad()
def importance(walk: Walk, ids_BT: Tensor, folder: Path, progress: Progress | None = None) -> Importance:
    """How much a model's loss feels what is in it; all processes of a distributed run get the same.

    Args:
        walk: the model.
        ids_BT: windows, int64; no more are used than are needed.
        folder: where streams go for the time being.
        progress: called with a label, steps done and steps in all.

    Raises:
        VerificationError: activations or gradients are not finite.
    """
    tokens = max(_LEAST, min(_MOST, ids_BT.numel() // _SHARE))
    ids_BT = ids_BT[: max(1, tokens // ids_BT.shape[1])]
    pieces = torch.split(torch.arange(len(ids_BT)), max(1, PIECE // ids_BT.shape[1]))
    layers, width = len(walk.blocks), walk.weights.family.dimensions(walk.weights.config)["hidden"]
    writers: dict[str, Tensor] = {}
    stream_DD = torch.zeros(width, width, dtype=torch.float64)

    def step(number: int) -> None:
        if progress is not None:
            progress(_LABEL, number, 2 * layers)

    with tempfile.TemporaryDirectory(dir=folder) as room:
        between_LBTD = stream_in_file((layers + 1, *ids_BT.shape, width), Path(room), "between")
        walk.embed(ids_BT, between_LBTD[0])
        for layer in range(layers):
            with walk.block(layer):
                for some in pieces:
                    between_LBTD[layer + 1, some] = walk.run(
                        layer, between_LBTD[layer, some].to(walk.device)
                    ).cpu()
            step(layer + 1)
        gradient_BTD = between_LBTD[layers]  # in the room of what it is the gradient of
        with walk.head():
            for some in pieces:
                end_BTD = gradient_BTD[some]
                gradient_BTD[some] = _through_head(walk, end_BTD, ids_BT[some])
                stream_DD += _outer(end_BTD, gradient_BTD[some])
        for layer in reversed(range(layers)):
            with walk.block(layer):
                for some in pieces:
                    before_BTD = between_LBTD[layer, some]
                    gradient_BTD[some], felt = _through_block(walk, layer, before_BTD, gradient_BTD[some])
                    stream_DD += _outer(before_BTD, gradient_BTD[some])
                    for name, felt_X in felt.items():
                        writers[name] = writers.get(name, 0.0) + felt_X
            step(2 * layers - layer)
    for what, sums in {**writers, "the stream": stream_DD}.items():
        if not torch.isfinite(sum_over_processes(sums)).all():
            raise VerificationError(
                f"the gradient of the loss at {what} is NaN or infinite",
                "the model is broken there or behind it; check it with dslm diff",
            )
    return Importance({name: felt_X.cpu() for name, felt_X in writers.items()}, stream_DD)


def _outer(stream_BTD: Tensor, gradient_BTD: Tensor) -> Tensor:
    """``sum g g^T`` of the gradient with respect to a stream whose tokens are scaled to a mean square of one."""
    scale_BT1 = stream_BTD.square().mean(dim=-1, keepdim=True).sqrt()
    g_ND = (gradient_BTD * scale_BT1).flatten(0, 1)
    return (g_ND.T @ g_ND).double()


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
    """From the gradient behind a loaded block to that before it, and what the loss feels of what its writers read."""
    reads: dict[str, Tensor] = {}
    handles = []
    for module, name in walk.linears(layer).items():
        if writes_stream(walk, name):

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
        if reads_heads(walk, name):
            product_NX = product_NX.view(len(product_NX), heads, -1).sum(dim=-1)
        felt[name] = product_NX.double().square().sum(dim=0)
    return gradients[0].cpu(), felt
