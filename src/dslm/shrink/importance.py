"""What a model would say otherwise without a head, or with an error in what an FFN writes: one backward pass.

To second order an error ``e`` in an activation changes the next token's distribution by a KL of ``E (e . g)^2 / 2``,
``g`` the gradient of the log-probability of a token drawn from the model's own distribution: by the Fisher information.
Silencing a head is an error of ``-z``, what the head gives, so ``sum (z . g)^2`` over tokens is what counts of it: the
importance of Molchanov et al. (https://arxiv.org/abs/1906.10771, equation 8), of activations and with drawn tokens. Of
what an FFN writes the second moment of ``g`` says how long an error is: one of the two factors of K-FAC (Martens and
Grosse, https://arxiv.org/abs/1503.05671, section 3). Why tokens are drawn instead of taken from the text: Kunstner et
al., https://arxiv.org/abs/1905.12558. See ``docs/how-it-works.md``, "What stays". It goes block by block: the streams
between the blocks wait in a file if they are large, so backwards as forwards one block is in memory at a time.

Shape letters: B windows, T tokens, N some tokens, D hidden size, L layers, F matrices that FFNs write with, X what
heads give, H query heads, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dslm.errors import VerificationError, enough_memory
from dslm.progress import Progress
from dslm.shrink.refine import PIECE, positions_at_once, repeatable
from dslm.shrink.solve import place_of_share, sum_over_processes
from dslm.shrink.streams import empty_stream
from dslm.shrink.tap import reads_heads, writes_stream
from dslm.shrink.walk import Walk

_TOKENS, _SHORTEST = 8192, 256
"""So many tokens are read, on each process of a distributed run, an equal part of each window, but so many of a window
at least."""
_STREAMS = 3
"""So many streams of all windows are in memory when blocks are rebuilt. If those between the blocks take more than
that, they go to a file, so that this pass never is the largest part of a shrink."""
_BY_KL = 0.5
"""How much of a metric is the KL's; the rest counts all channels alike, since gradients are those of few tokens."""


def importance(
    walk: Walk, ids_BT: Tensor, folder: Path, progress: Progress | None = None
) -> dict[str, Tensor]:
    """How much heads, and what FFNs write, matter to what a model says; all processes of a run get the same.

    Args:
        walk: the model.
        ids_BT: windows, int64; their `beginnings` are read. A process may have none.
        folder: where the streams between blocks go for the time being, and the metrics for good, if they are large.
        progress: called with a label, steps done and steps in all.

    Returns:
        By name of a matrix that writes the stream. Where it reads heads, float64 ``[H]``: over all tokens, twice the KL
        that silencing the head would cost. Otherwise float32 ``[D, D]``: a metric in which an error in what it writes
        is as long as the KL feels it, of mean one on its diagonal.

    Raises:
        VerificationError: activations or gradients are not finite.
        OutOfMemoryError: the memory was not enough.
    """
    width = walk.weights.family.dimensions(walk.weights.config)["hidden"]
    most = _STREAMS * 4 * ids_BT.numel() * width
    ids_BT = beginnings(ids_BT)
    blocks = range(len(walk.blocks))
    of_units = [n for layer in blocks for n in _writers(walk, layer).values() if not reads_heads(walk, n)]
    metrics_FDD = empty_stream((len(of_units), width, width), folder, "metrics", most=most)
    metrics = dict(zip(of_units, metrics_FDD, strict=True))
    felt: dict[str, Tensor] = {}
    with (
        enough_memory(
            f"for the gradients of one block on a window of {ids_BT.shape[1]} tokens",
            "lower --sequence-length",
        ),
        tempfile.TemporaryDirectory(dir=folder) as room,
    ):
        between_LBTD = empty_stream((len(blocks) + 1, *ids_BT.shape, width), Path(room), "between", most=most)
        for sums in _backwards(walk, ids_BT, between_LBTD, progress):
            for name, one in sums.items():
                if not torch.isfinite(sum_over_processes(one)).all():
                    raise VerificationError(
                        f"the gradient of what the model says at {name} is NaN or infinite",
                        "the model is broken there or behind it; check it with dslm diff",
                    )
                felt[name] = metrics[name].copy_(_metric(one)) if name in metrics else one
    return felt


def _writers(walk: Walk, layer: int) -> dict[nn.Module, str]:
    return {module: name for module, name in walk.linears(layer).items() if writes_stream(walk, name)}


def _metric(gradients_DD: Tensor) -> Tensor:
    """What a second moment of gradients, which is overwritten, makes long; all alike where there are none."""
    diagonal_D = gradients_DD.diagonal()
    gradients_DD.mul_(_BY_KL / diagonal_D.mean().clamp_min(torch.finfo(torch.float64).tiny))
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
    pieces = torch.split(torch.arange(len(ids_BT)), max(1, PIECE // ids_BT.shape[1])) if len(ids_BT) else ()
    layers = len(walk.blocks)

    def step(number: int) -> None:
        if progress is not None:
            progress("measuring gradients", number, 2 * layers)

    walk.embed(ids_BT, between_LBTD[0])
    for layer in range(layers):
        with walk.block(layer):
            for some in pieces:
                out_BTD = walk.run(layer, between_LBTD[layer, some].to(walk.device))
                between_LBTD[layer + 1, some] = out_BTD.cpu()
        step(layer + 1)
    gradient_BTD = between_LBTD[layers]  # in the room of what it is the gradient of
    first, _ = place_of_share(len(ids_BT))
    with walk.head():
        for number, end_TD in enumerate(gradient_BTD):
            gradient_BTD[number] = _through_head(walk, end_TD, seed=first + number)
    sizes = walk.weights.family.dimensions(walk.weights.config)
    shapes = {True: (sizes["heads"],), False: (sizes["hidden"], sizes["hidden"])}
    for layer in reversed(range(layers)):
        sums = {
            name: torch.zeros(shapes[reads_heads(walk, name)], dtype=torch.float64)
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
        yield sums


def _through_head(walk: Walk, end_TD: Tensor, seed: int) -> Tensor:
    """The gradient of drawn tokens' log-probabilities at the end of a window's stream; the head is loaded."""
    gradient_TD = torch.empty_like(end_TD)
    dice_T = torch.rand(len(end_TD), generator=torch.Generator().manual_seed(seed))
    for positions in torch.split(torch.arange(len(end_TD)), positions_at_once(walk)):
        with torch.enable_grad():
            end_ND = end_TD[positions].to(walk.device).requires_grad_()
            logits_NV = walk.logits(end_ND[:, None])[:, 0]  # each as a window of its own, as in `kl_loss`
            drawn_N = _draw(logits_NV.detach().cpu(), dice_T[positions])  # the same on every device
            loss = nn.functional.cross_entropy(logits_NV, drawn_N.to(walk.device), reduction="sum")
            (gradient_ND,) = torch.autograd.grad(loss, end_ND)
        gradient_TD[positions] = gradient_ND.cpu()
    return gradient_TD


def _draw(logits_NV: Tensor, dice_N: Tensor) -> Tensor:
    """Tokens with the model's probabilities, given numbers from zero to below one."""
    cumulative_NV = logits_NV.softmax(dim=-1).cumsum_(dim=-1)
    thrown_N1 = dice_N[:, None] * cumulative_NV[:, -1:]  # which rounding leaves near one
    return (cumulative_NV <= thrown_N1).sum(dim=-1).clamp_max(logits_NV.shape[1] - 1)


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
        found[name] = change_NH.double().square().sum(dim=0).cpu()
    for name, g_BTD in zip(writes, gradients[1 + len(heads) :], strict=True):
        g_ND = g_BTD.flatten(0, -2).double()  # a square of it may exceed float32
        found[name] = (g_ND.T @ g_ND).cpu()
    return gradients[0].cpu(), found
