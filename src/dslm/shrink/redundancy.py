"""The exact stage of shrinking: remove what is redundant for every input, before anything is approximated.

It undoes every growth that keeps the function (weighted copies, padding, any split of the readers, cloned blocks,
identity blocks) without being told of it (``docs/how-it-works.md``, "Shrinking").
"""

from __future__ import annotations

from dataclasses import dataclass

from dslm.families import Family
from dslm.families.family import Config
from dslm.progress import Progress
from dslm.shrink.find_twins import LayerTwins, Twins, find_twins
from dslm.shrink.fold import Fold, Key
from dslm.shrink.packing import (
    distinct_units,
    fold_heads,
    fold_stream,
    fold_units,
    head_counts,
    stream_sizes,
)
from dslm.shrink.weights import Folded, Weights
from dslm.shrink_plan import SHRUNK, stream_can_shrink
from dslm.sizes import Sizes, count_parameters, differing, is_legal


@dataclass(frozen=True, slots=True)
class Reduced:
    """A model without its redundancy.

    Attributes:
        weights: the smaller model; the one that was given where nothing could go.
        removed: config word -> how much of it was removed without loss, where that is not zero.
    """

    weights: Weights
    removed: dict[str, int]


def exact_stage(weights: Weights, target: Sizes, *, progress: Progress | None = None) -> Reduced:
    """Remove channels, FFN units, heads and layers that are zero, write nothing or are copies of others.

    Args:
        weights: the model.
        target: sizes that the result does not go below; a dimension that is at its target is left alone.
        progress: called with a label, layers done and layers in all, anew for every walk through the model.

    Returns:
        The same function in the smallest legal sizes that were found, and what is gone.
    """
    family, config = weights.family, weights.config
    before = Sizes.from_config(family, config)
    if not any(old > target.as_dict()[word] for word, old in before.as_dict().items() if word in SHRUNK):
        return Reduced(weights, {})
    twins = find_twins(weights, progress)
    kept = _kept_layers(family, config, twins.layers, target.num_hidden_layers)
    after = _smallest(family, config, before, target, twins, kept)
    if after == before:
        return Reduced(weights, {})
    stream = None
    if after.hidden_size != before.hidden_size:
        stream = fold_stream(twins.stream, after.hidden_size, whole=twins.whole)
    removed = {word: int(old) - int(new) for word, (old, new) in differing(before, after).items()}
    folds = _folds(before, after, twins, kept)
    if after.replace(tied=False) == target:  # a second table that is the first costs nothing either
        after = target
    smaller = Folded(weights, after, kept, folds, stream)
    return Reduced(smaller, removed)


def _kept_layers(
    family: Family, config: Config, layers: tuple[LayerTwins, ...], floor: int
) -> tuple[int, ...]:
    """Layers that write something, and as many of the others as the floor asks for."""
    silent = [number for number, layer in enumerate(layers) if layer.silent]
    # Where a block ends in a norm of the stream it changes the stream even if it adds nothing to it.
    if not family.keeps_stream(config):
        silent = []
    gone = set(silent[max(0, len(silent) - (len(layers) - floor)) :]) if len(layers) > floor else set()
    return tuple(number for number in range(len(layers)) if number not in gone)


def _smallest(
    family: Family, config: Config, before: Sizes, target: Sizes, twins: Twins, kept: tuple[int, ...]
) -> Sizes:
    """The legal sizes with the fewest parameters that hold all that is distinct."""
    layers = [twins.layers[number] for number in kept]
    least = max(target.intermediate_size, distinct_units(layers))
    shape = before.replace(
        intermediate_size=min(before.intermediate_size, least), num_hidden_layers=len(kept)
    )
    widths = [before.hidden_size]
    if stream_can_shrink(family, config, before.tied):
        widths = stream_sizes(twins.stream, target.hidden_size, whole=twins.whole) or widths
    found = [shape]
    group = target.num_attention_heads // target.num_key_value_heads
    counts = head_counts(layers, (target.num_attention_heads, target.num_key_value_heads))
    # What is cut after this cannot make larger groups again.
    for heads, kv_heads in [pair for pair in counts if pair[0] // pair[1] >= group] or counts:
        with_heads = shape.replace(num_attention_heads=heads, num_key_value_heads=kv_heads)
        tried = (with_heads.replace(hidden_size=width) for width in widths)
        found += [sizes for sizes in tried if is_legal(family, config, sizes)][:1]
    return min(found, key=lambda sizes: count_parameters(family, sizes.into_config(family, config))["total"])


def _folds(before: Sizes, after: Sizes, twins: Twins, kept: tuple[int, ...]) -> dict[Key, Fold]:
    folds: dict[Key, Fold] = {}
    heads = after.num_attention_heads, after.num_key_value_heads
    for number in kept:
        layer = twins.layers[number]
        if after.intermediate_size != before.intermediate_size:
            folds["intermediate", number] = fold_units(layer.unit_M, after.intermediate_size)
        if heads != (before.num_attention_heads, before.num_key_value_heads):
            folds |= fold_heads(number, layer, *heads)
    return folds
