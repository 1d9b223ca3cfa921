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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dslm.shrink.solve import processes, sum_over_processes
from dslm.shrink.walk import Walk

STEP, FAR = 0.003, 0.01
"""Largest step, relative to the root mean square of each tensor: at first, and once layers have been dropped."""
TOKENS = 2048
"""Tokens in one step, over all processes of a distributed run."""


def refine(
    walk: Walk,
    layer: int,
    inputs_BTD: Tensor,
    goals: Callable[[Tensor], Tensor],
    fit: int,
    held_out: Sequence[int],
    *,
    steps: int,
    step: float = STEP,
    seed: int = 0,
) -> tuple[float, float]:
    """Train a loaded block for a few steps, and keep the result if it does better on held-out windows.

    Adam with a step proportional to each tensor's own size, falling to zero along a half cosine.

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

    Returns:
        Relative squared error on held-out windows before and after.
    """
    names = [name for name, place in walk.places.items() if place.line.layer == layer]
    before = {name: walk.get(name).clone() for name in names}
    generator = torch.Generator().manual_seed(seed)
    start = _error(walk, layer, inputs_BTD, goals, torch.tensor(list(held_out)))
    parameters: list[nn.Parameter] = []
    rates = []
    for name in names:
        module, attribute = walk.places[name].owners[0]
        parameter = getattr(module, attribute).requires_grad_(True)
        size = float(parameter.detach().square().mean().sqrt())
        parameters.append(parameter)
        rates.append({"params": [parameter], "lr": step * size})
    optimiser = torch.optim.Adam(rates, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    batch = max(1, TOKENS // inputs_BTD.shape[1] // processes())
    with torch.enable_grad():
        for _ in range(steps):
            windows = torch.randint(fit, (batch,), generator=generator)
            optimiser.zero_grad()
            _loss(walk, layer, inputs_BTD, goals, windows).backward()  # type: ignore[no-untyped-call]
            for parameter in parameters:
                if parameter.grad is not None:
                    sum_over_processes(parameter.grad)
            optimiser.step()
            schedule.step()
    for name in names:
        walk.put(name, walk.get(name).clone())
    after = _error(walk, layer, inputs_BTD, goals, torch.tensor(list(held_out)))
    if not after < start:
        for name, values in before.items():
            walk.put(name, values)
    return start, min(start, after)


def _loss(
    walk: Walk, layer: int, inputs_BTD: Tensor, goals: Callable[[Tensor], Tensor], windows: Tensor
) -> Tensor:
    goal_BTD = goals(windows).to(walk.device)
    scale = goal_BTD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)
    out_BTD = walk.forward(layer, inputs_BTD[windows].to(walk.device))
    loss: Tensor = ((out_BTD - goal_BTD).square() / scale).mean()
    return loss


@torch.no_grad()
def _error(
    walk: Walk, layer: int, inputs_BTD: Tensor, goals: Callable[[Tensor], Tensor], windows: Tensor
) -> float:
    losses = [float(_loss(walk, layer, inputs_BTD, goals, one)) * len(one) for one in torch.split(windows, 4)]
    total, count = sum_over_processes(torch.tensor([sum(losses), len(windows)], dtype=torch.float64))
    return float(total / count)
