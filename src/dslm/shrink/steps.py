"""Which way a rebuilt block takes optimiser steps, and how many: what the closed form leaves to them.

Shape letters: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.recipe import Recipe
from dslm.shrink.refine import (
    FAR,
    STEP,
    Kept,
    batch_of,
    kl_loss,
    positions_at_once,
    refine,
    steps_for,
    stream_loss,
)
from dslm.shrink.solve import place_of_share
from dslm.shrink.streams import Streams
from dslm.shrink.walk import Walk

PASSES = 20
"""Times that a block beside dropped ones, or the last one, sees the tokens to fit on, at most."""


def steps_to_take(recipe: Recipe, streams: Streams, most: int) -> int:
    """Steps of a block: at most so many, as the text is long, and not fewer than every block takes.

    Args:
        recipe: how blocks are rebuilt; a plain cut takes only those of every block.
        streams: of the windows to fit on.
        most: steps that the block takes more than others, at most.
    """
    _, windows = place_of_share(streams.fit)
    own = min(most, steps_for(windows, streams.teacher.shape[1], PASSES)) if recipe.solve else 0
    return max(recipe.refine, own)


def step_towards_stream(
    student: Walk,
    layer: int,
    streams: Streams,
    encoded: Callable[[Tensor], Tensor],
    *,
    steps: int,
    astray: bool,
    kept: Kept,
    progress: Progress | None = None,
) -> None:
    """Train a loaded block towards where the teacher's stream goes.

    Args:
        student: the smaller model.
        layer: its block.
        streams: both streams before it, and the teacher's behind it.
        encoded: from the teacher's stream to what the student carries of it.
        steps: optimiser steps.
        astray: layers were dropped so far, and not only narrowed.
        kept: as of `refine`.
        progress: called with a label, steps done and steps in all.
    """
    refine(
        student,
        layer,
        streams.student,
        stream_loss(lambda windows: encoded(streams.ahead[windows].to(student.device))),
        streams.fit,
        streams.deciding,
        steps=steps,
        step=FAR if astray else STEP,
        seed=layer,
        kept=kept,
        progress=progress,
    )


def step_towards_logits(
    teacher: Walk,
    student: Walk,
    layer: int,
    streams: Streams,
    *,
    steps: int,
    kept: Kept,
    progress: Progress | None = None,
) -> list[str]:
    """Train the last block, and the norm behind it, towards the teacher's distribution; it and both heads are loaded.

    Args:
        teacher: the model to follow.
        student: the smaller model.
        layer: its last block.
        streams: both streams behind it, and the student's before it.
        steps: optimiser steps.
        kept: as of `refine`.
        progress: called with a label, steps done and steps in all.

    Returns:
        Names of the tensors that were trained; none if that did not help on held-out windows.
    """
    norm = [name for name in student.places if student.weights.family.is_final_norm(name)]
    before, after = refine(
        student,
        layer,
        streams.behind,
        kl_loss(teacher, student, lambda windows: streams.teacher[windows].to(teacher.device)),
        streams.fit,
        streams.deciding,
        steps=steps,
        positions=positions_at_once(student, batch_of(streams.teacher.shape[1])),
        beside=norm,
        seed=layer,
        kept=kept,
        progress=progress,
    )
    return [*student.names(layer), *norm] if after < before else []
