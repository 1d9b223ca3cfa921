"""The dial: which shape loses least at a given size, predicted from measured cuts, and measured where it is built.

Every shape gets a predicted loss from what single cuts cost (`dslm.shrink.capture`); the most promising are rebuilt on
a few windows.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.progress import Progress
from dslm.shrink.approximate import approximate
from dslm.shrink.calibrate import calibration
from dslm.shrink.capture import Capture, captured, damage, shares_cut
from dslm.shrink.rebuild import Windows, importance_for
from dslm.shrink.recipe import Recipe
from dslm.shrink.redundancy import exact_stage
from dslm.shrink.survey import walked_loss
from dslm.shrink.walk import Walk, walking_device
from dslm.shrink.weights import Stored
from dslm.shrink_plan import check_groups
from dslm.sizes import Sizes
from dslm.targets_down import shrink_candidates

LEFT = {"layers": 0.5, "units": 0.8, "kv_groups": 0.75, "group_heads": 0.85, "stream": 0.7}
"""Share of an axis's damage that is left after re-reading, from cuts of SmolLM2-135M (``benchmarks/shrink_cuts.py``);
it only matters for ranking cuts of one axis against cuts of another."""

FIT, HELD_OUT = 16, 4
"""Windows at most on which is chosen what goes and a candidate is rebuilt, and on which its loss is measured."""

_ENOUGH = 32  # windows of calibration text, an eighth of them held out
_CANDIDATES, _NEAR, _NEARER = 512, 0.02, 0.01


@dataclass(frozen=True, slots=True)
class Scored:
    """A legal shape and its loss, in nats per token on held-out windows.

    Attributes:
        sizes: the shape.
        parameters: exactly how many it has.
        predicted: its loss as the capture predicts it.
        measured: its loss after it was built; None where it was not.
        layers: the layers that were kept when it was built, of what the exact stage left.
    """

    sizes: Sizes
    parameters: int
    predicted: float
    measured: float | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        known: what single cuts cost.
        shapes: legal shapes near the size, those that were built by what was measured, then the rest by prediction.
    """

    known: Capture
    shapes: list[Scored]


def read_windows(
    source: Checkpoint,
    texts: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Windows:
    """The few windows of calibration texts that a search needs; arguments as of `calibration`."""
    samples = min(samples, max(_ENOUGH, 2 * len(texts)))
    found = calibration(
        source, texts, samples=samples, length=length, seed=seed, device=device, progress=progress
    )
    return Windows(found.train[:FIT], found.held_out[:HELD_OUT], {})


def search(
    weights: Stored,
    parameters: int,
    windows: Windows,
    *,
    build: int = 3,
    untie: bool = False,
    recipe: Recipe | None = None,
    device: str = "auto",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Legal shapes near a number of parameters, best first.

    Args:
        weights: the model to shrink.
        parameters: how many the result should have.
        windows: calibration tokens; few are used (`FIT`, `HELD_OUT`).
        build: how many shapes to build; of shapes that differ only in their FFN the best is.
        untie: the result has two tables.
        recipe: how they are built.
        device: one of `dslm.load.DEVICES`.
        folder: where blocks that are built lie for the time being, float32, and what the loss feels, if that is large;
            None: where temporary files go.
        progress: called with a label, what is done and what there is in all.

    Raises:
        SizeError: the target is not below the source, or below the smallest shape there is.
        VerificationError: the model's loss is not finite.
    """
    recipe = recipe or Recipe()
    windows = Windows(windows.fit[:FIT], windows.held_out[:HELD_OUT], {})
    with tempfile.TemporaryDirectory(prefix=".dslm.", dir=folder) as room:
        builder = _Builder(weights, windows, recipe, device, Path(room), progress)
        known = captured(weights, windows, recipe, builder.felt_anywhere, device=device, progress=progress)
        shapes = ranked(known, weights, parameters, untie=untie, recipe=recipe)
        best: dict[Sizes, Scored] = {}
        for shape in shapes:
            best.setdefault(shape.sizes.replace(intermediate_size=0), shape)
        chosen = list(best.values())[:build]
        built = [builder.built(shape) for shape in chosen]
    built.sort(key=lambda s: math.inf if s.measured is None or math.isnan(s.measured) else s.measured)
    return Found(known, built + [shape for shape in shapes if shape not in chosen])


def ranked(
    known: Capture, weights: Stored, parameters: int, *, untie: bool = False, recipe: Recipe | None = None
) -> list[Scored]:
    """Legal shapes within 2 % of a number of parameters by predicted loss, those within 1 % first.

    Where there is none, the nearest there is. Arguments and errors as of `search`.
    """
    solve = (recipe or Recipe()).solve
    found = shrink_candidates(weights.family, weights.config, parameters, count=_CANDIDATES, untie=untie)
    near = [c for c in found if abs(c.off) <= _NEAR] or [min(found, key=lambda c: abs(c.off))]
    off = {c.sizes: abs(c.off) for c in near}
    scored = [Scored(c.sizes, c.parameters, predict(known, c.sizes, solve=solve)) for c in near]
    return sorted(scored, key=lambda s: (off[s.sizes] > _NEARER, s.predicted, s.parameters))


def predict(known: Capture, sizes: Sizes, *, solve: bool = True) -> float:
    """Loss of a shape in nats per token: the damages of its cuts add up, less what re-reading makes up for."""
    cut = shares_cut(known.sizes, sizes)
    damages = {axis: damage(known.damages[axis], share) for axis, share in cut.items()}
    return known.base + sum((LEFT[axis] if solve else 1.0) * nats for axis, nats in damages.items())


@dataclass(slots=True)
class _Builder:
    """Builds shapes as ``down`` does, on few windows, and measures their loss.

    Attributes as the arguments of `search`, and:
        felt: what the loss feels in the model, once it was asked.
    """

    weights: Stored
    windows: Windows
    recipe: Recipe
    device: str
    folder: Path
    progress: Progress | None
    felt: Mapping[str, Tensor] = field(default_factory=dict)

    def built(self, shape: Scored) -> Scored:
        """A shape with its loss."""
        reduced = exact_stage(self.weights, shape.sizes, progress=self.progress).weights
        before, target = Sizes.from_config(reduced.family, reduced.config), shape.sizes
        if before == target:
            walk = Walk(reduced, walking_device(self.device))
            loss = walked_loss(walk, self.windows.held_out)
            return replace(shape, measured=loss, layers=tuple(range(before.num_hidden_layers)))
        check_groups(before, target, reduced.family, reduced.config)
        felt = self._felt(target) if reduced is self.weights else None
        with tempfile.TemporaryDirectory(dir=self.folder) as room:
            found = approximate(
                reduced, target, self.windows, Path(room), recipe=self.recipe, felt=felt, device=self.device,
                progress=self.progress,
            )  # fmt: skip
        return replace(shape, measured=found.losses["held-out"][1], layers=found.base.layers)

    def felt_anywhere(self) -> Mapping[str, Tensor]:
        """What the loss feels in the model, for whatever may go."""
        sizes = Sizes.from_config(self.weights.family, self.weights.config)
        return self._felt(sizes.replace(intermediate_size=0))

    def _felt(self, target: Sizes) -> Mapping[str, Tensor]:
        if not self.felt:  # a shape that only loses layers does not ask
            walk = Walk(self.weights, walking_device(self.device))
            self.felt = importance_for(walk, target, self.windows, self.folder, self.recipe, self.progress)
        return self.felt
