"""From what the exact stage left to smaller sizes: the layers that stay, the stream's encoder, the rebuilding."""

from __future__ import annotations

from pathlib import Path

from dslm.progress import Progress
from dslm.shrink.depth import choose_layers
from dslm.shrink.encoder import survey_stream
from dslm.shrink.rebuild import Rebuilt, Windows, rebuild
from dslm.shrink.reconstruct import Recipe
from dslm.shrink.survey import few
from dslm.shrink.walk import Walk, walking_device
from dslm.shrink.weights import Weights
from dslm.sizes import Sizes


def approximate(
    weights: Weights,
    target: Sizes,
    windows: Windows,
    folder: Path,
    *,
    recipe: Recipe,
    device: str = "auto",
    progress: Progress | None = None,
) -> Rebuilt:
    """Choose what stays, and rebuild every block of it.

    Args:
        weights: the model.
        target: sizes to reach, which `dslm.plan_shrink` lets pass.
        windows: calibration and check tokens, all of one length.
        folder: where finished blocks go, and streams too large for memory.
        recipe: how blocks are rebuilt.
        device: one of `dslm.load.DEVICES`.
        progress: called with a label, what is done and what there is in all.
    """
    before, where = Sizes.from_config(weights.family, weights.config), walking_device(device)
    walk = Walk(weights, where)
    layers = choose_layers(
        walk, windows.fit, target.num_hidden_layers, bridge=recipe.solve, progress=progress
    )
    stream = None
    if before.hidden_size != target.hidden_size:
        survey = survey_stream(walk, few(windows.fit), tied=target.tied, progress=progress)
        stream = survey.encoder(target.hidden_size)
    return rebuild(
        weights, target, layers, stream, windows, folder, recipe=recipe, device=where, progress=progress
    )
