"""From what the exact stage left to smaller sizes: the stream's encoder, the layers that stay, the rebuilding."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dslm.errors import enough_memory
from dslm.progress import Progress
from dslm.shrink.depth import likely_layers
from dslm.shrink.encoder import survey_stream
from dslm.shrink.fold import Encoder
from dslm.shrink.rebuild import Rebuilt, Windows, importance_for, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.survey import few
from dslm.shrink.walk import Walk, walking_device
from dslm.shrink.weights import Weights
from dslm.sizes import Sizes

_TOKENS = 4096
"""Likely choices of layers are built on windows of so many tokens or one, and measured on as many others."""


def approximate(
    weights: Weights,
    target: Sizes,
    windows: Windows,
    folder: Path,
    *,
    recipe: Recipe,
    felt: Mapping[str, Tensor] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Rebuilt:
    """Choose what stays, and rebuild every block of it.

    Args:
        weights: the model.
        target: sizes to reach, which `dslm.shrink_plan` lets pass.
        windows: calibration and check tokens, all of one length.
        folder: where finished blocks go, and streams too large for memory.
        recipe: how blocks are rebuilt.
        felt: what `importance_for` gave, where that is already in hand.
        dtypes: what each of the model's tensors is kept in, by name; None for float32.
        device: one of `dslm.load.DEVICES`.
        progress: called with a label, what is done and what there is in all.

    Raises:
        OutOfMemoryError: the memory was not enough.
        VerificationError: activations are not finite.
    """
    before, where = Sizes.from_config(weights.family, weights.config), walking_device(device)
    count, length = windows.all.shape
    other = ", or let dslm down --refine 0 take no steps" if recipe.takes_steps else ""
    with enough_memory(
        f"to shrink block by block on {count} windows of {length} tokens",
        f"lower --samples or --sequence-length{other}",
    ):
        stream = None
        if before.hidden_size != target.hidden_size:
            survey = survey_stream(
                Walk(weights, where), few(windows.fit), tied=target.tied, progress=progress
            )
            stream = survey.encoder(target.hidden_size)
        if felt is None:
            felt = importance_for(Walk(weights, where), target, windows, folder, recipe, progress)
        layers = choose_layers(
            weights, target, stream, windows, folder, recipe=recipe, felt=felt, device=where,
            progress=progress,
        )  # fmt: skip
        return rebuild(
            weights, target, layers, stream, windows, folder, recipe=recipe, felt=felt, dtypes=dtypes,
            device=where, progress=progress,
        )  # fmt: skip


def choose_layers(
    weights: Weights,
    target: Sizes,
    stream: Encoder | None,
    windows: Windows,
    folder: Path,
    *,
    recipe: Recipe,
    felt: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """The layers that stay: of the likely choices the one whose model is best after it was rebuilt on few tokens.

    Arguments as of `rebuild`.
    """
    count = target.num_hidden_layers
    bridge = recipe.solve and recipe.drift
    likely = likely_layers(Walk(weights, device), windows.fit, count, bridge=bridge, progress=progress)
    if not recipe.solve or len(likely) == 1:
        return likely[0]
    most = max(1, _TOKENS // windows.fit.shape[1])
    some = Windows(windows.fit[:most], windows.held_out[:most], {})
    losses = []
    for number, layers in enumerate(likely):

        def part(label: str, done: int, whole: int, number: int = number) -> None:
            if progress is not None:
                progress("comparing layers", number * whole + done, len(likely) * whole)

        with tempfile.TemporaryDirectory(dir=folder) as room:
            built = rebuild(
                weights, target, layers, stream, some, Path(room), recipe=recipe.closed(),
                felt=felt, device=device, progress=part,
            )  # fmt: skip
        losses.append(built.losses["held-out"][1])
    return likely[min(range(len(likely)), key=losses.__getitem__)]
