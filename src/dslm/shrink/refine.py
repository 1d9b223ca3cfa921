"""Block-local refinement: a few optimiser steps on one rebuilt block, towards where the teacher's stream goes.

The closed form solves each matrix alone; what is lost between a matrix and the nonlinearity behind it only the whole
block sees. That is little where a block stands for itself, and much beside dropped ones: the block before them must
become another function, and not only a smaller one, and the block behind them reads another stream. The last block
need not give the teacher's stream at all, but what the teacher says. No labels and no backward pass through the model
are needed: a block's input and goal are the streams that are there anyway. The idea of reconstructing by blocks is that
of BRECQ (https://arxiv.org/abs/2102.05426).

Shape letters: B windows, T tokens, P positions of a window, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dslm.logits import divergence
from dslm.progress import Progress
from dslm.shrink.solve import place_of_share, sum_over_processes
from dslm.shrink.walk import Walk

STEP, FAR = 0.003, 0.01
"""Largest step, relative to the root mean square of each tensor: at first, and once layers have been dropped."""
_TOKENS = 2048
"""Tokens in one step, over all processes of a distributed run; at least one window."""
PIECE = 512
"""Tokens whose gradient is computed at once, which takes many times the memory of a pass; at least one window."""
_LOGITS = 2**24
"""Logits that exist at once, as numbers; a few copies of them are made on the way."""

Loss = Callable[[Tensor, Tensor, Tensor | slice], Tensor]
"""From what a block gives for some windows at some positions ``[B, P, D]``, their numbers and the positions to the sum
over the windows of each one's mean loss, a scalar."""


Kept = Callable[[str, Tensor], Tensor]
"""From a tensor's name and numbers to the numbers that it will be kept with."""


def steps_for(windows: int, length: int, passes: int) -> int:
    """Steps in which so many windows of one length are seen so often at most, but one step at least."""
    return max(1, passes * windows // batch_of(length))


def batch_of(length: int) -> int:
    """Windows in one step, over all processes."""
    return max(1, _TOKENS // length)


def stream_loss(goals: Callable[[Tensor], Tensor]) -> Loss:
    """The relative squared error.

    Args:
        goals: from window numbers to the stream that the block should give, ``[B, T, D]``, where it runs.
    """

    def loss(out_BPD: Tensor, windows: Tensor, positions: Tensor | slice) -> Tensor:
        goal_BPD = goals(windows)[:, positions]
        scale = goal_BPD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)
        return ((out_BPD - goal_BPD).square() / scale).mean(dim=(1, 2)).sum()

    return loss


def kl_loss(teacher: Walk, student: Walk, ends: Callable[[Tensor], Tensor]) -> Loss:
    """``KL(teacher || student)`` in nats per token; the heads of both must be loaded.

    Args:
        teacher: the model to follow.
        student: the one whose last block is trained.
        ends: from window numbers to the teacher's stream behind its last block, ``[B, T, D]``, where it runs.
    """

    def loss(out_BPD: Tensor, windows: Tensor, positions: Tensor | slice) -> Tensor:
        states = (ends(windows)[:, positions].flatten(0, 1), out_BPD.flatten(0, 1))
        pieces = zip(*(torch.split(x_ND, positions_at_once(student)) for x_ND in states), strict=True)
        nats = [  # each state as a window of its own: a model may know few positions
            divergence(teacher.logits(end_ND[:, None])[:, 0], student.logits(out_ND[:, None])[:, 0], 1.0)
            for end_ND, out_ND in pieces
        ]
        return torch.stack(nats).sum() / out_BPD.shape[1]

    return loss


def positions_at_once(walk: Walk, windows: int = 1) -> int:
    """Positions of each of some windows whose logits exist at once."""
    return max(1, _LOGITS // walk.vocab // windows)


def refine(
    walk: Walk,
    layer: int,
    inputs_BTD: Tensor,
    loss: Loss,
    fit: int,
    held_out: range,
    *,
    steps: int,
    step: float = STEP,
    positions: int | None = None,
    beside: Sequence[str] = (),
    seed: int = 0,
    kept: Kept = lambda name, values: values,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Train a loaded block for a few steps, and keep the result if it does better on held-out windows.

    Adam with a step proportional to each tensor's own size, falling to zero along a half cosine; a tensor of zeros
    stays. The processes of a distributed run, each with windows of its own, take the same steps.

    Args:
        walk: the student.
        layer: its block, loaded.
        inputs_BTD: the student's stream before the block.
        loss: what is to become small.
        fit: windows to fit on: the first so many.
        held_out: numbers of the windows that decide.
        steps: optimiser steps.
        step: the largest, relative to each tensor's size.
        positions: of each window that one step looks at, drawn anew each time; None for all.
        beside: names of loaded tensors outside the block that are trained with it.
        seed: of the order of windows, and of positions.
        kept: what becomes of a tensor's numbers when they are kept: it decides with those.
        progress: called with a label, steps done and steps in all.

    Returns:
        Mean loss on held-out windows before and after.
    """
    names = [*walk.names(layer), *beside]
    before = {name: walk.get(name).clone() for name in names}
    deciding = torch.arange(held_out.start, held_out.stop)
    start = _mean(walk, layer, inputs_BTD, loss, deciding)
    parameters: list[nn.Parameter] = []
    rates = []
    for name in names:
        module, attribute = walk.places[name].owners[0]
        parameter = getattr(module, attribute).requires_grad_(True)
        size = float(parameter.detach().square().mean().sqrt())
        parameters.append(parameter)
        rates.append({"params": [parameter], "lr": step * size})
    optimiser = torch.optim.Adam(rates, betas=(0.9, 0.98), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    first, whole = place_of_share(fit)
    at_once = max(1, PIECE // inputs_BTD.shape[1])
    draw, batch = torch.Generator().manual_seed(seed), batch_of(inputs_BTD.shape[1])
    for number in range(steps):
        windows = torch.randint(whole, (batch,), generator=draw) - first
        seen: Tensor | slice = slice(None)
        if positions is not None:
            seen = torch.randperm(inputs_BTD.shape[1], generator=draw)[:positions]
        windows = windows[(windows >= 0) & (windows < fit)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for some in torch.split(windows, at_once):
            if len(some):
                with torch.enable_grad(), repeatable(walk.device):
                    out_BTD = walk.forward(layer, inputs_BTD[some].to(walk.device))
                    mean = loss(out_BTD[:, seen], some, seen) / batch
                    mean.backward()  # type: ignore[no-untyped-call]
        for parameter in parameters:
            assert parameter.grad is not None
            sum_over_processes(parameter.grad)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress("refining", number + 1, steps)
    del optimiser, schedule, rates, parameters  # gradients and moments
    for name in names:
        walk.put(name, kept(name, walk.get(name)))
    after = _mean(walk, layer, inputs_BTD, loss, deciding)
    if not after < start:
        for name, values in before.items():
            walk.put(name, values)
    return start, min(start, after)


def repeatable(device: torch.device) -> AbstractContextManager[None]:
    """Where fast attention adds its gradients in any order, the plain one runs."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def _mean(walk: Walk, layer: int, inputs_BTD: Tensor, loss: Loss, windows: Tensor) -> float:
    """Mean over the windows of all processes, and all their positions."""
    total = 0.0
    for some in torch.split(windows, 4):
        if len(some):
            out_BTD = walk.forward(layer, inputs_BTD[some].to(walk.device))
            total += float(loss(out_BTD, some, slice(None)))
    total, count = sum_over_processes(torch.tensor([total, len(windows)], dtype=torch.float64)).tolist()
    return float(total / count)
