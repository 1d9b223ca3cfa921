"""What single cuts cost a model: runs of layers left out, units and heads silenced in every block, a narrower stream.

What goes is chosen on other tokens than its loss is measured on, except for layers. Shape letters: B windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dslm.errors import VerificationError
from dslm.progress import Progress
from dslm.shrink.cache import keep, place_of, read_kept
from dslm.shrink.encoder import survey_stream
from dslm.shrink.rebuild import Windows
from dslm.shrink.recipe import Recipe
from dslm.shrink.silence import silenced_losses
from dslm.shrink.survey import few, removal_losses, walked_loss
from dslm.shrink.walk import Walk, walking_device
from dslm.shrink.weights import Folded, Stored
from dslm.shrink_plan import stream_can_shrink
from dslm.sizes import Sizes, is_legal
from dslm.targets_down import STREAM, STREAM_AT_ONCE

AXES = ("layers", "units", "kv_groups", "group_heads", "stream")
"""What can be cut."""

Points = tuple[tuple[float, float], ...]
"""Shares of an axis that are cut, rising, and what each costs in nats per token."""

_WINDOWS, _TOKENS = 2, 256  # of the held-out ones: damages are differences on the same tokens, which need few
_LEAST, _MOST = 1e-4, 100.0  # nats: a cut that seems to do good is noise; one that overflows is hopeless
_DEPTHS = (0.0, 0.1, 0.2, 1 / 3, 0.5, 0.75)  # shares of the layers that are left out; at least one layer
_KEPT = {
    "units": (0.875, 0.5, 0.25),
    "heads": (0.9, 0.75, 0.5, 0.25),
    "stream": (0.9, 0.75, 0.5, 0.25),
}
_FORMAT = 4  # of what is kept; raised when a capture measures something else


@dataclass(frozen=True, slots=True)
class Capture:
    """What cuts cost a model, of which a shrink can make up for more.

    Attributes:
        sizes: the model's sizes.
        base: its loss in nats per token.
        damages: axis -> measured points; an axis that cannot be cut has none.
    """

    sizes: Sizes
    base: float
    damages: Mapping[str, Points]


def shares_cut(before: Sizes, after: Sizes) -> dict[str, float]:
    """The share of each axis that is gone between two sizes."""
    groups = [sizes.num_attention_heads / sizes.num_key_value_heads for sizes in (before, after)]
    return {
        "layers": 1 - after.num_hidden_layers / before.num_hidden_layers,
        "units": 1 - after.intermediate_size / before.intermediate_size,
        "kv_groups": 1 - after.num_key_value_heads / before.num_key_value_heads,
        "group_heads": 1 - groups[1] / groups[0],
        "stream": 1 - after.hidden_size / before.hidden_size,
    }


def damage(points: Points, share: float) -> float:
    """Damage of cutting a share of an axis: a power law of ``-log`` of what is kept, at least linear beyond the points.

    So it went on SmolLM2-135M, whose FFN without a quarter, a half and five sixths lost 0.34, 0.87 and 2.87 nats.
    """
    if share <= 0:
        return 0.0
    if not points:
        return math.inf
    depth, depths = -math.log1p(-share), [-math.log1p(-x) for x, _ in points]
    above = min(max(1, sum(x < depth for x in depths)), len(points) - 1)
    slope = 2.0  # of a single point
    if len(points) > 1:
        slope = math.log(points[above][1] / points[above - 1][1]) / math.log(
            depths[above] / depths[above - 1]
        )
    if not depths[0] <= depth <= depths[-1]:
        slope = max(1.0, slope)
    near = len(points) - 1 if depth > depths[-1] else max(0, above - 1)
    return points[near][1] * float((depth / depths[near]) ** slope)


def _rising(cuts: Mapping[float, float]) -> Points:
    """Points in order, in which a deeper cut never costs less."""
    points: list[tuple[float, float]] = []
    for share in sorted(cuts):
        nats = min(cuts[share], _MOST) if math.isfinite(cuts[share]) else _MOST
        points.append((share, max(_LEAST, nats, points[-1][1] if points else 0.0)))
    return tuple(points)


def capture(
    walk: Walk,
    fit_BT: Tensor,
    ids_BT: Tensor,
    sizes: Sizes,
    recipe: Recipe,
    felt: Mapping[str, Tensor],
    progress: Progress | None = None,
) -> Capture:
    """Measure what single cuts cost a model.

    Args:
        walk: the model.
        fit_BT: the windows on which is chosen what goes, int64.
        ids_BT: the windows that losses are reported on, int64; damages are measured on the first of them.
        sizes: the model's sizes.
        recipe: how is chosen what goes, and whether what stays stands in for it.
        felt: what `dslm.shrink.importance` gave; nothing where norms choose.
        progress: called with a label, blocks done and blocks in all.

    Raises:
        VerificationError: the model's loss is not finite.
    """
    nothing, some_BT = frozenset[int](), ids_BT[:_WINDOWS, :_TOKENS]
    base = walked_loss(walk, ids_BT)
    if not math.isfinite(base):
        raise VerificationError(
            "the model's loss is not finite", "the checkpoint is broken, or not a language model"
        )
    runs = _runs(sizes.num_hidden_layers)
    whole, *losses = removal_losses(walk, some_BT, [nothing, *runs], progress)
    cuts: dict[str, dict[float, float]] = {axis: {} for axis in AXES}
    for run, loss in zip(runs, losses, strict=True):
        share = len(run) / sizes.num_hidden_layers
        cuts["layers"][share] = min(loss - whole, cuts["layers"].get(share, math.inf))
    targets = _single_cuts(sizes)
    shapes = [target for _, target in targets]
    silenced = silenced_losses(walk, fit_BT, some_BT, shapes, recipe, felt, progress)
    streams = _stream_losses(walk, fit_BT, some_BT, sizes, progress)
    for (axis, target), loss in [*zip(targets, silenced, strict=True), *streams]:
        cuts[axis][shares_cut(sizes, target)[axis]] = loss - whole
    damages = {axis: _rising(found) for axis, found in cuts.items()}
    return Capture(sizes, base, damages | {"stream": damages["stream"] or _static(damages["units"])})


def _runs(layers: int) -> list[frozenset[int]]:
    """Runs of neighbours of several lengths; not every beginning of long ones, whose neighbours cost much the same."""
    lengths = sorted({max(1, round(share * layers)) for share in _DEPTHS} & set(range(1, layers)))
    return [
        frozenset(range(start, start + count))
        for count in lengths
        for start in range(1, layers - count + 1, max(1, count // 2))
    ]


def _single_cuts(sizes: Sizes) -> list[tuple[str, Sizes]]:
    """Shapes with fewer FFN units, key-value groups or query heads in a group."""
    units, kv_heads = sizes.intermediate_size, sizes.num_key_value_heads
    group = sizes.num_attention_heads // kv_heads
    found = [("units", sizes.replace(intermediate_size=n)) for n in _counts(units, _KEPT["units"])]
    for kv in _counts(kv_heads, _KEPT["heads"]):
        found.append(("kv_groups", sizes.replace(num_key_value_heads=kv, num_attention_heads=kv * group)))
    for n in _counts(group, _KEPT["heads"]):
        found.append(("group_heads", sizes.replace(num_attention_heads=kv_heads * n)))
    return found


def _counts(size: int, shares: Sequence[float]) -> list[int]:
    return sorted({min(size - 1, max(1, round(share * size))) for share in shares} - {0})


def _stream_losses(
    walk: Walk, fit_BT: Tensor, ids_BT: Tensor, sizes: Sizes, progress: Progress | None
) -> list[tuple[tuple[str, Sizes], float]]:
    """Losses with narrower streams; none where the stream cannot become narrower with everything else as it is."""
    family, config, layers = walk.weights.family, walk.weights.config, tuple(range(sizes.num_hidden_layers))
    found: list[tuple[tuple[str, Sizes], float]] = []
    if not stream_can_shrink(family, config, sizes.tied):
        return found
    survey = None
    for least in _counts(sizes.hidden_size, _KEPT["stream"]):
        wider = (sizes.replace(hidden_size=width) for width in range(least, sizes.hidden_size))
        target = next((shape for shape in wider if is_legal(family, config, shape)), None)
        if target is not None:
            survey = survey or survey_stream(walk, few(fit_BT), tied=sizes.tied, progress=progress)
            stream = survey.encoder(target.hidden_size)
            narrow = Walk(Folded(walk.weights, target, layers, {}, stream), walk.device)
            found.append((("stream", target), walked_loss(narrow, ids_BT)))
    return found


def _static(units: Points) -> Points:
    """What a narrower stream may cost where only heads and stream can shrink together: much, against FFN units."""
    nats = damage(units, 0.5) / math.log(2) ** 2
    depths = {1 - kept: -math.log(kept) for kept in _KEPT["stream"]}
    return _rising(
        {share: nats * (STREAM_AT_ONCE["selected"] * d + STREAM * d * d) for share, d in depths.items()}
    )


def captured(
    weights: Stored,
    windows: Windows,
    recipe: Recipe,
    felt: Callable[[], Mapping[str, Tensor]],
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> Capture:
    """The capture of a model, in one process, from the user's cache where it was made before.

    A cache that cannot be read is made anew, and one that cannot be written is done without.

    Args:
        weights: the model.
        windows: on which is chosen what goes, and of the held-out ones a few to measure on.
        recipe: as of `capture`.
        felt: gives what `dslm.shrink.importance` does; it is called where nothing is in the cache.
        device: one of `dslm.load.DEVICES`.
        progress: called with a label, what is done and what there is in all.

    Raises:
        VerificationError: the model's loss is not finite.
    """
    ids_BT = few(windows.held_out)
    settings = [recipe.solve, recipe.asks_loss, recipe.solve and recipe.weigh_tokens]
    tokens = [windows.fit.tolist(), ids_BT.tolist()]
    place = place_of("captures", weights.checkpoint, [_FORMAT, settings, tokens])
    sizes = Sizes.from_config(weights.family, weights.config)
    found = _whole(read_kept(place), sizes)
    if found is None:
        walk = Walk(weights, walking_device(device))
        found = capture(walk, windows.fit, ids_BT, sizes, recipe, felt(), progress)
        keep(place, {"base": found.base, "damages": found.damages})
    return found


def _whole(held: Any, sizes: Sizes) -> Capture | None:
    """The capture that was kept, if it is whole."""
    try:
        damages = {axis: tuple((float(x), float(y)) for x, y in held["damages"][axis]) for axis in AXES}
        found = Capture(sizes, float(held["base"]), damages)
    except (ValueError, KeyError, TypeError):
        return None
    numbers = [found.base, *(number for points in damages.values() for point in points for number in point)]
    sound = all(math.isfinite(n) and n > 0 for n in numbers)
    return found if sound and all(points == _rising(dict(points)) for points in damages.values()) else None
