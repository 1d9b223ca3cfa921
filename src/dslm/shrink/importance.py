"""What the loss feels of query heads and of what FFNs write, by one backward pass.

An error ``e`` in an activation changes the loss at a token by about ``e . g``, ``g`` the loss's gradient there.
Silencing a head is an error of ``-z``, what the head gives, so ``sum (z . g)^2`` over tokens, each for itself, is what
counts of it: the importance of Molchanov et al. (https://arxiv.org/abs/1906.10771, equation 8), of activations. Of what
an FFN writes the second moment of ``g`` says how long an error is: one of the two factors of K-FAC (Martens and Grosse,
https://arxiv.org/abs/1503.05671, section 3), here with the text's own next tokens. See ``docs/how-it-works.md``, "What
stays". It goes block by block: the streams between the blocks wait in a file if they are large, so backwards as
forwards one block is in memory at a time.

Shape letters: B windows, T tokens, N some tokens, D hidden size, L layers, F matrices that FFNs write with, X what
heads give, H query heads, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from dslm.errors import VerificationError, enough_memory
from dslm.progress import Progress
from dslm.shrink.refine import PIECE, positions_at_once, repeatable
from dslm.shrink.solve import sum_over_processes
from dslm.shrink.streams import empty_stream
from dslm.shrink.tap import reads_heads, writes_stream
from dslm.shrink.walk import Walk

_TOKENS, _SHORTEST = 8192, 256
"""So many tokens are read, on each process of a distributed run, an equal part of each window, but so many of a window
at least."""
_BETWEEN, _METRICS = 2, 1
"""As large as so many streams of all windows may be what lies between the blocks, and all metrics together; what is
larger goes to a file. So this pass is never the largest part of a shrink, which has three such streams in memory."""
_BY_LOSS = 0.5
"""How much of a metric is the loss's; the rest counts all channels alike, since gradients are those of few tokens."""


def importance(
    walk: Walk, ids_BT: Tensor, folder: Path, progress: Progress | None = None
) -> dict[str, Tensor]:
    """How much a model's loss feels heads and what FFNs write; all processes of a distributed run get the same.

    Args:
        walk: the model.
        ids_BT: windows, int64; their `beginnings` are read. A process may have none.
        folder: where the streams between blocks go for the time being, and the metrics for as long as they are used, if
            they are large.
        progress: called with a label, steps done and steps in all.

    Returns:
        By name of a matrix that writes the stream. Where it reads heads, float64 ``[H]``: the sum over tokens of the
        squared first-order change of the loss if the head were silent there. Otherwise float32 ``[D, D]``: a metric in
        which an error in what it writes is as long as the loss feels it, of mean one on its diagonal.

    Raises:
        VerificationError: activations or gradients are not finite.
        OutOfMemoryError: the memory was not enough.
    """
    width = walk.weights.family.dimensions(walk.weights.config)["hidden"]
    stream = 4 * ids_BT.numel() * width
    ids_BT = beginnings(ids_BT)
    blocks = range(len(walk.blocks))
    of_units = [n for layer in blocks for n in _writers(walk, layer).values() if not reads_heads(walk, n)]
    file = f"metrics-{uuid4().hex}"  # of its own: those of another call may still be in use
    metrics_FDD = empty_stream((len(of_units), width, width), folder, file, most=_METRICS * stream)
    metrics = dict(zip(of_units, metrics_FDD, strict=True))
    felt: dict[str, Tensor] = {}
    with (
        enough_memory(
            f"for the gradients of one block on a window of {ids_BT.shape[1]} tokens",
            "lower --sequence-length",
        ),
        tempfile.TemporaryDirectory(dir=folder) as room,
    ):
        shape = (len(blocks) + 1, *ids_BT.shape, width)
        between_LBTD = empty_stream(shape, Path(room), "between", most=_BETWEEN * stream)
        for sums in _backwards(walk, ids_BT, between_LBTD, progress):
            for name, one in sums.items():
                if not torch.isfinite(sum_over_processes(one)).all():
                    raise VerificationError(
                        f"the gradient of the loss at {name} is NaN or infinite",
                        "the model is broken there or behind it; check it with dslm diff",
                    )
                felt[name] = metrics[name].copy_(_metric(one)) if name in metrics else one
    return felt


def _writers(walk: Walk, layer: int) -> dict[nn.Module, str]:
    return {module: name for module, name in walk.linears(layer).items() if writes_stream(walk, name)}


def _metric(gradients_DD: Tensor) -> Tensor:
    """What a second moment of gradients, which is overwritten, makes long; all alike where there are none."""
    diagonal_D = gradients_DD.diagonal()
    gradients_DD.mul_(_BY_LOSS / diagonal_D.mean().clamp_min(torch.finfo(torch.float64).tiny))
    diagonal_D += 1 - diagonal_D.mean()
    return gradients_DD


def beginnings(ids_BT: Tensor) -> Tensor:
    """The part of some windows that is read: as much of each, and all of few."""
    windows, length = ids_BT.shape
    read = min(length, max(_SHORTEST, _TOKENS // max(1, windows)))
    return ids_BT[: _TOKENS // read, :read].contiguous()


@torch.no_grad()
def _backwards(
    walk: Walk, ids_BT: Tensor, between_LBTD: Tensor, progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    """From the last block to the first: sums over some windows, zero where there are none, by a writer's name.

    There is room for the streams before each block and behind the last.
    """
    layers, count = len(walk.blocks), len(ids_BT)
    pieces = torch.split(torch.arange(count), max(1, PIECE // ids_BT.shape[1])) if count else ()

    def step(number: int) -> None:
        if progress is not None:
            progress("measuring gradients", number, 2 * layers)

    if count:
        walk.embed(ids_BT, between_LBTD[0])
    for layer in range(layers if count else 0):
        with walk.block(layer):
            for some in pieces:
                out_BTD = walk.run(layer, between_LBTD[layer, some].to(walk.device))
                between_LBTD[layer + 1, some] = out_BTD.cpu()
        step(layer + 1)
    gradient_BTD = between_LBTD[layers]  # in the room of what it is the gradient of
    with walk.head():
        for number, ids_T in enumerate(ids_BT):
            gradient_BTD[number] = _through_head(walk, gradient_BTD[number], ids_T)
    sizes = walk.weights.family.dimensions(walk.weights.config)
    shapes = {True: (sizes["heads"],), False: (sizes["hidden"], sizes["hidden"])}
    for layer in reversed(range(layers)):
        sums = {
            name: torch.zeros(shapes[reads_heads(walk, name)], dtype=torch.float64, device=walk.device)
            for name in _writers(walk, layer).values()
        }
        with walk.block(layer):
            for some in pieces:
                gradient_BTD[some], found = _through_block(
                    walk, layer, between_LBTD[layer, some], gradient_BTD[some]
                )
                for name, one in found.items():
                    sums[name].add_(one)
        step(2 * layers - layer)
        yield {name: one.cpu() for name, one in sums.items()}


def _through_head(walk: Walk, end_TD: Tensor, ids_T: Tensor) -> Tensor:
    """The gradient of a window's summed loss with respect to the stream behind the last block; the head is loaded."""
    gradient_TD = torch.zeros_like(end_TD)
    for positions in torch.split(torch.arange(len(ids_T) - 1), positions_at_once(walk)):
        with torch.enable_grad():
            end_ND = end_TD[positions].to(walk.device).requires_grad_()
            logits_NV = walk.logits(end_ND[:, None])[:, 0]  # each as a window of its own, as in `kl_loss`
            next_N = ids_T[positions + 1].to(walk.device)
            loss = nn.functional.cross_entropy(logits_NV, next_N, reduction="sum")
            (gradient_ND,) = torch.autograd.grad(loss, end_ND)
        gradient_TD[positions] = gradient_ND.cpu()
    return gradient_TD


def _through_block(
    walk: Walk, layer: int, before_BTD: Tensor, gradient_BTD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradient behind a loaded block to that before it, and what that adds to `importance`'s sums."""
    heads: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    handles = []
    for module, name in _writers(walk, layer).items():

        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
            if reads_heads(walk, name):
                heads[name] = args[0]
            else:
                writes[name] = out

        handles.append(module.register_forward_hook(keep))
    try:
        with torch.enable_grad(), repeatable(walk.device):
            start_BTD = before_BTD.detach().to(walk.device).requires_grad_()
            out_BTD = walk.forward(layer, start_BTD)
            wanted = [start_BTD, *heads.values(), *writes.values()]
            gradients = torch.autograd.grad(out_BTD, wanted, gradient_BTD.to(walk.device))
    finally:
        for handle in handles:
            handle.remove()
    count = walk.weights.family.dimensions(walk.weights.config)["heads"]
    found = {}
    for (name, z_BTX), g_BTX in zip(heads.items(), gradients[1:], strict=False):
        product_NX = (z_BTX.detach() * g_BTX).flatten(0, -2)
        change_NH = product_NX.view(len(product_NX), count, -1).sum(dim=-1)
        found[name] = change_NH.double().square().sum(dim=0)
    for name, g_BTD in zip(writes, gradients[1 + len(heads) :], strict=True):
        g_ND = g_BTD.flatten(0, -2).double()  # a square of it may exceed float32
        found[name] = g_ND.T @ g_ND
    return gradients[0].cpu(), found
