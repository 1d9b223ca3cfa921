"""The one loop of growing: for each tensor of the target, read what it comes from, apply its maps, write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dslm.checkpoint.config import listed_config, resized_config, with_dtype
from dslm.checkpoint.reader import Checkpoint, torch_dtype
from dslm.checkpoint.writer import Planned
from dslm.errors import RecipeError
from dslm.families import Tensor
from dslm.grow import METHODS, blocks
from dslm.grow.apply import grown_rows
from dslm.grow.maps import build_growth
from dslm.grow.split import split_named
from dslm.output import Check, check_place, origin, planned, write_output
from dslm.plan import DEPTH_METHOD, Plan, check_plan
from dslm.progress import Progress
from dslm.sizes import count_parameters


@dataclass(frozen=True, slots=True)
class Resized:
    """What a resize made.

    Attributes:
        folder: the finished checkpoint.
        parameters: before and after.
        nbytes: bytes of weights written.
        measured: what the check that was asked for found.
    """

    folder: Path
    parameters: tuple[int, int]
    nbytes: int
    measured: Mapping[str, Any]


def target_config(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's config with the plan's sizes and dtype."""
    family, config = source.family, source.config
    before, after = plan.source.num_hidden_layers, plan.target.num_hidden_layers
    if before != after:
        config = listed_config(family, config)
    return with_dtype(resized_config(family, config, plan.target, blocks.origins(before, after)), plan.dtype)


def resize(
    source: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    check: Check | None = None,
    progress: Progress | None = None,
) -> Resized:
    """Write the grown checkpoint that a plan describes.

    Memory stays at a few pieces of one tensor (`dslm.grow.apply.CHUNK_BYTES`), whatever the model's size. The
    output appears whole or not at all, and is the same bytes for the same plan.

    Args:
        source: the model to grow.
        plan: what to make of it.
        out: folder to write.
        overwrite: replace an existing folder.
        check: given the finished checkpoint before it takes its place, returns what it measured; what it raises
            keeps the checkpoint from appearing.
        progress: called with a label, bytes done and bytes in all.

    Raises:
        SizeError, RecipeError: the plan has no exact solution, or transformers refuses the sizes.
        CheckpointError: the output place is not usable, or the source changed while it was read.
    """
    if plan.shrinks:
        raise RecipeError(
            "this plan shrinks", "carry it out with dslm down --plan, or dslm.shrink_checkpoint"
        )
    check_plan(plan, source.family, source.config)
    config = target_config(source, plan)
    layers = blocks.origins(plan.source.num_hidden_layers, plan.target.num_hidden_layers)
    tensors = planned(source, config, plan.dtype, layers)
    check_place(source, tensors, out, overwrite=overwrite)
    growth = build_growth(source.family, source.config, plan, torch_dtype(plan.dtype or source.dtype))
    split = split_named(plan.split, plan.snr_db)

    def rows(tensor: Tensor, target: Planned) -> Iterator[torch.Tensor]:
        name = origin(source, tensor, layers)
        return grown_rows(
            tensor,
            growth.tensor_map(tensor),
            source.entries[name].shape[0],
            partial(source.read_finite_rows, name),
            torch_dtype(target.dtype),
            split,
            plan.seed,
        )

    citations = {name: method.source for name, method in METHODS.items()} | {DEPTH_METHOD: blocks.SOURCE}
    measured = write_output(
        source,
        plan,
        config,
        out,
        rows,
        label="growing",
        methods=citations,
        layers=layers,
        overwrite=overwrite,
        check=check,
        progress=progress,
    )
    counts = (count_parameters(source.family, c)["total"] for c in (source.config, config))
    return Resized(out, (next(counts), next(counts)), sum(t.nbytes for t in tensors), measured)
