"""Block-local refinement: a few optimiser steps on one rebuilt block, towards where the teacher's stream goes.

The closed form solves each matrix alone; what is lost between a matrix and the nonlinearity behind it only the whole
block sees. That is little where a block stands for itself, and much beside dropped ones: the block before them must
become another function, and not only a smaller one, and the block behind them reads another stream. No labels and no
backward pass through the model are needed: the block's input and goal are the streams that are there anyway. The idea
of reconstructing by blocks is that of BRECQ (https://arxiv.org/abs/2102.05426).

Shape letters: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dslm.progress import Progress
from dslm.shrink.solve import place_of_share, sum_over_processes
from dslm.shrink.walk import Walk

STEP, FAR = 0.003, 0.01
"""Largest step, relative to the root mean square of each tensor: at first, and once layers have been dropped."""
_TOKENS = 2048
"""Tokens in one step, over all processes of a distributed run; at least one window."""


def steps_for(windows: int, length: int, passes: int) -> int:
    """Steps in which so many windows of one length are seen so often at most, but one step at least."""
    return max(1, passes * windows // _batch(length))


def _batch(length: int) -> int:
    return max(1, _TOKENS // length)


def refine(
    walk: Walk,
    layer: int,
    inputs_BTD: Tensor,
    goals: Callable[[Tensor], Tensor],
    fit: int,
    held_out: range,
    *,
    steps: int,
    step: float = STEP,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Train a loaded block for a few steps, and keep the result if it does better on held-out windows.

    Adam with a step proportional to each tensor's own size, falling to zero along a half cosine; a tensor of zeros
    stays. The processes of a distributed run, each with windows of its own, take the same steps.

    Args:
        walk: the student.
        layer: its block, loaded.
        inputs_BTD: the student's stream before the block.
        goals: from window numbers to the stream that the block should give.
        fit: windows to fit on: the first so many.
        held_out: numbers of the windows that decide.
        steps: optimiser steps.
        step: the largest, relative to each tensor's size.
        seed: of the order of windows.
        progress: called with a label, steps done and steps in all.

    Returns:
        Relative squared error on held-out windows before and after.
    """
    names = [name for name, place in walk.places.items() if place.line.layer == layer]
    before = {name: walk.get(name).clone() for name in names}
    deciding = torch.arange(held_out.start, held_out.stop)
    start = _error(walk, layer, inputs_BTD, goals, deciding)
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
    draw, batch = torch.Generator().manual_seed(seed), _batch(inputs_BTD.shape[1])
    for number in range(steps):
        windows = torch.randint(whole, (batch,), generator=draw) - first
        windows = windows[(windows >= 0) & (windows < fit)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        if len(windows):
            with torch.enable_grad(), _repeatable(walk.device):
                loss = _losses(walk, layer, inputs_BTD, goals, windows).sum() / batch
                loss.backward()  # type: ignore[no-untyped-call]
        for parameter in parameters:
            assert parameter.grad is not None
            sum_over_processes(parameter.grad)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress("refining", number + 1, steps)
    for name in names:
        walk.put(name, walk.get(name).clone())
    after = _error(walk, layer, inputs_BTD, goals, deciding)
    if not after < start:
        for name, values in before.items():
            walk.put(name, values)
    return start, min(start, after)


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    """Where fast attention adds its gradients in any order, the plain one runs."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def _losses(
    walk: Walk, layer: int, inputs_BTD: Tensor, goals: Callable[[Tensor], Tensor], windows: Tensor
) -> Tensor:
    """Relative squared error of each of some windows, ``[windows]``."""
    goal_BTD = goals(windows).to(walk.device)
    scale = goal_BTD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)
    out_BTD = walk.forward(layer, inputs_BTD[windows].to(walk.device))
    return ((out_BTD - goal_BTD).square() / scale).mean(dim=(1, 2))


@torch.no_grad()
def _error(
    walk: Walk, layer: int, inputs_BTD: Tensor, goals: Callable[[Tensor], Tensor], windows: Tensor
) -> float:
    """Mean over the windows of all processes."""
    total = sum(
        float(_losses(walk, layer, inputs_BTD, goals, some).sum())
        for some in torch.split(windows, 4)
        if len(some)
    )
    total, count = sum_over_processes(torch.tensor([total, len(windows)], dtype=torch.float64)).tolist()
    return float(total / count)
