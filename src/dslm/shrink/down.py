"""``down`` from end to end: the exact stage, calibration, the survey, the rebuilding, the output."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dslm.checkpoint.config import with_dtype
from dslm.checkpoint.reader import Checkpoint, torch_dtype
from dslm.checkpoint.writer import Planned, folder_above
from dslm.errors import enough_memory
from dslm.families import Family, Tensor
from dslm.families.family import Config
from dslm.output import check_place, planned, write_output
from dslm.plan import Plan, check_plan
from dslm.progress import Progress
from dslm.shrink.approximate import approximate
from dslm.shrink.calibrate import calibration, check_windows
from dslm.shrink.rebuild import Windows
from dslm.shrink.recipe import Recipe
from dslm.shrink.redundancy import exact_stage
from dslm.shrink.survey import walked_loss
from dslm.shrink.walk import Walk, walking_device
from dslm.shrink.weights import Folded, Kept, Stored, Weights, stored
from dslm.shrink_plan import check_groups
from dslm.sizes import Sizes, count_parameters

CHECK_WINDOWS = 32
"""Windows of a check text that are read for the report."""
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What a shrink made.

    Attributes:
        folder: the finished checkpoint.
        parameters: before and after.
        nbytes: bytes of weights written.
        removed: size word -> how much of it was redundant and went without loss.
        layers: the source's layers that were kept.
        losses: ``held-out`` and ``check`` -> mean nats per token before and after; no ``held-out`` where all went
            without loss.
        errors: relative squared error of the stream after each block, on held-out windows; empty where all went
            without loss.
        tokens: tokens that were calibrated on.
        origin: where the calibration text came from, in words.
        seconds: how long it took.
    """

    folder: Path
    parameters: tuple[int, int]
    nbytes: int
    removed: Mapping[str, int]
    layers: tuple[int, ...]
    losses: Mapping[str, tuple[float, float]]
    errors: tuple[float, ...]
    tokens: int
    origin: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Smaller:
    """The weights to write, and how they came about."""

    weights: Weights
    layers: tuple[int, ...]
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    errors: tuple[float, ...] = ()
    tokens: int = 0
    origin: str = ""


def shrink_checkpoint(
    source: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    check: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Shrunk:
    """Write the smaller checkpoint that a plan describes.

    What is redundant goes first, without loss; what is still over is chosen, cut and re-read by least squares. One
    block of the model is in memory at a time, with its moments and the streams of the calibration windows. The
    output appears whole or not at all, and is the same bytes for the same plan on the same machine.

    Args:
        source: the model to shrink, opened with its weights.
        plan: sizes to reach, method and calibration.
        out: folder to write.
        check: a second text, which is only reported.
        overwrite: replace an existing folder.
        device: one of `dslm.load.DEVICES`.
        progress: called with a label, what is done and what there is in all.

    Raises:
        SizeError, RecipeError: the sizes cannot be reached, or the calibration text cannot be used.
        CheckpointError: the output place is not usable, or the source is broken.
        VerificationError: activations are not finite, or a number is too large for the output's dtype.
        OutOfMemoryError: the memory was not enough.
    """
    begin = time.monotonic()
    check_plan(plan, source.family, source.config)
    final = plan.target.into_config(source.family, source.config)
    tensors = planned(source, final, plan.dtype)
    check_place(source, tensors, out, overwrite=overwrite)
    checks = {}
    if check is not None:
        assert plan.calibration is not None, "a plan that shrinks says what to calibrate on"
        length = plan.calibration["length"]
        checks["check"] = check_windows(source, check, length=length, limit=CHECK_WINDOWS)
    reduced = exact_stage(Stored(source), plan.target, progress=progress)
    if Sizes.from_config(reduced.weights.family, reduced.weights.config) != plan.target:
        beside = _beside(source.family, final, tensors)
        check_place(source, tensors, out, overwrite=overwrite, beside=beside)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=folder_above(out)) as scratch:
        smaller = _smaller(source, reduced.weights, plan, checks, Path(scratch), device, progress)
        layers = smaller.layers
        if isinstance(reduced.weights, Folded):
            layers = tuple(reduced.weights.layers[number] for number in layers)
        config = with_dtype(smaller.weights.config, plan.dtype)
        measured = _figures(reduced.removed, smaller)

        def rows(tensor: Tensor, target: Planned) -> Iterator[torch.Tensor]:
            whole = smaller.weights.read(tensor.name)
            step = max(1, _CHUNK_BYTES * len(whole) // max(1, target.nbytes))
            for i in range(0, len(whole), step):
                yield stored(tensor.name, whole[i : i + step], torch_dtype(target.dtype))

        write_output(
            source,
            plan,
            config,
            out,
            rows,
            label="writing",
            methods={},  # the card explains both itself
            layers=layers,
            overwrite=overwrite,
            measured=measured,
            progress=progress,
        )
    counts = [count_parameters(source.family, c)["total"] for c in (source.config, config)]
    return Shrunk(
        folder=out,
        parameters=(counts[0], counts[1]),
        nbytes=sum(t.nbytes for t in planned(source, config, plan.dtype, layers)),
        removed=reduced.removed,
        layers=layers,
        losses=smaller.losses,
        errors=smaller.errors,
        tokens=smaller.tokens,
        origin=smaller.origin,
        seconds=time.monotonic() - begin,
    )


def _beside(family: Family, config: Config, tensors: list[Planned]) -> int:
    """Bytes of the finished tensors that lie beside the output: blocks, the last one twice, and a head."""
    layout = family.layout(config)
    last = max(line.layer for line in layout.values() if line.layer is not None)
    times = {name: int(line.layer is not None) + int(line.layer == last) for name, line in layout.items()}
    times[family.head] = 1
    return sum(times[tensor.name] * tensor.nbytes for tensor in tensors)


def _smaller(
    source: Checkpoint,
    weights: Weights,
    plan: Plan,
    checks: Mapping[str, torch.Tensor],
    folder: Path,
    device: str,
    progress: Progress | None,
) -> _Smaller:
    """Bring what the exact stage left to the plan's sizes."""
    target = plan.target
    before = Sizes.from_config(weights.family, weights.config)
    everything = tuple(range(before.num_hidden_layers))
    origins = weights.layers if isinstance(weights, Folded) else None
    tensors = planned(source, weights.config, plan.dtype, origins)
    dtypes = {tensor.name: torch_dtype(tensor.dtype) for tensor in tensors}
    if before == target:
        were = _losses(Stored(source), checks, device, progress)
        are = _losses(Kept(weights, dtypes), checks, device, progress)
        return _Smaller(weights, everything, _pairs(were, are))
    check_groups(before, target, weights.family, weights.config)
    assert plan.calibration is not None, "a plan that shrinks says what to calibrate on"
    asked = plan.calibration
    text = calibration(
        source,
        asked["texts"],
        samples=asked["samples"],
        length=asked["length"],
        seed=plan.seed,
        device=device,
        progress=progress,
    )
    windows = Windows(text.train, text.held_out, checks)
    recipe = Recipe.with_steps(asked["refine"], solve="slice" not in plan.methods.values())
    found = approximate(
        weights, target, windows, folder, dtypes=dtypes, recipe=recipe, device=device, progress=progress
    )
    losses: Mapping[str, tuple[float, float]] = found.losses
    # What went without loss did so within a tolerance, and the source is what was before.
    if isinstance(weights, Folded):
        texts = {"held-out": windows.held_out, **checks}
        after = {label: pair[1] for label, pair in losses.items()}
        losses = _pairs(_losses(Stored(source), texts, device, progress), after)
    return _Smaller(found, found.base.layers, losses, found.errors, text.train.numel(), text.origin)


def _pairs(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {label: (before[label], after[label]) for label in after}


def _losses(
    weights: Weights, texts: Mapping[str, torch.Tensor], device: str, progress: Progress | None
) -> dict[str, float]:
    """Mean nats per token of a model on texts that are only reported."""
    found = {}
    for label, ids in texts.items():
        with enough_memory(f"to measure {len(ids)} windows block by block", "lower --sequence-length"):
            found[label] = walked_loss(Walk(weights, walking_device(device)), ids, progress)
    return found


def _figures(removed: Mapping[str, int], smaller: _Smaller) -> dict[str, float | int | str]:
    """What the card and the record say was measured."""
    figures: dict[str, float | int | str] = {f"{word} removed without loss": n for word, n in removed.items()}
    for text, (before, after) in smaller.losses.items():
        for when, loss in (("before", before), ("after", after)):
            figures[f"perplexity on the {text} text, {when}"] = math.exp(loss) if loss < 700 else "infinite"
    if smaller.tokens:
        figures["tokens calibrated on"] = smaller.tokens
    return figures
