"""Finding what a model computes twice, or not at all, whatever its input.

Twins of the stream hide twins of the units that read it, and the reverse: copies share what reads them unevenly, so
rows are equal only after their columns are merged. So the largest partition is assumed and refined until it bears
itself out: channels that are multiples of one another in the table are taken for twins; under that assumption each
layer's units and heads are compared, and twins among them merged; then every writer of the stream is asked whether
its rows agree; where they do not, classes split and the walk starts again. What is left holds by induction over the
layers (``docs/how-it-works.md``, "Shrinking").

Shape letters: C channels, M units, H query heads, K key-value heads, U units, E entries per unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dslm.families import Tensor as TableTensor
from dslm.families.axes import Role
from dslm.families.units import unit_parts
from dslm.progress import Progress
from dslm.shrink.twins import Classes, Mark, find_classes, mark, random_mix
from dslm.shrink.units import Units, find_head_twins, find_unit_twins
from dslm.shrink.weights import Weights

_SILENT_AT_ZERO = frozenset(
    {
        "silu",
        "swish",
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "relu",
        "relu2",
        "tanh",
    }
)
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")


@dataclass(frozen=True, slots=True, eq=False)
class LayerTwins:
    """What is redundant in one layer.

    Attributes:
        unit_M: the first of each FFN unit's twins; -1 where the unit does nothing.
        head_H: the same for query heads.
        kv_head_K: the first of each key-value head's twins.
        spare_kv_K: which key-value heads may go altogether.
        normed: whether a norm runs over all heads together.
        silent: whether the layer writes nothing.
    """

    unit_M: Tensor
    head_H: Tensor
    kv_head_K: Tensor
    spare_kv_K: Tensor
    normed: bool
    silent: bool


@dataclass(frozen=True, slots=True, eq=False)
class Twins:
    """What is redundant in a model.

    Attributes:
        stream: the channels' classes.
        whole: whether every channel must keep equally many copies, as a LayerNorm's mean demands.
        layers: what is redundant in each layer.
    """

    stream: Classes
    whole: bool
    layers: tuple[LayerTwins, ...]


def find_twins(weights: Weights, progress: Progress | None = None) -> Twins:
    """Find all that is redundant in a model; one layer and the table are in memory at a time.

    Args:
        weights: the model.
        progress: called with a label, layers done and layers in all, anew for every walk.
    """
    family, config = weights.family, weights.config
    # A LayerNorm takes the mean off, so multiples are no twins to it, and zero is only zero where the mean is.
    behind_norms = family.holds(family.norm_on_read, config)
    whole = family.norm == "layer" or not behind_norms
    walk = _Walk(weights)
    stream = find_classes(walk.table, scaled=not whole, zeros=behind_norms)
    while True:
        refined, layers, centred = walk.once(stream, progress)
        if torch.equal(refined.leader_N, stream.leader_N):
            zero_C = stream.leader_N < 0
            if not whole or centred or not zero_C.any():
                return Twins(stream, whole, tuple(layers))
            # Off a mean of zero, a LayerNorm makes these channels all the same, but not zero.
            first = int(zero_C.nonzero()[0])
            refined = replace(stream, leader_N=stream.leader_N.masked_fill(zero_C, first))
        stream = refined


@dataclass(slots=True)
class _Stream:
    """The assumption about the stream while writers are asked about it."""

    classes: Classes
    centred: bool = True

    def ask(self, found: Mark) -> None:
        """Refine the classes by what a norm does to the channels."""
        self.classes = self.classes.refined(found)

    def ask_writer(self, found: Mark) -> bool:
        """Refine them by what is written; returns whether anything is."""
        self.ask(found)
        values_CK = found.values_NK
        if values_CK.sum(dim=0).norm() > 4 * found.tolerance * values_CK.norm():
            self.centred = False
        return not bool(found.zero_N.all())


@dataclass(frozen=True, slots=True)
class _Walk:
    """One model, to be walked layer by layer.

    Attributes:
        weights: the model.
        lines: its tensors by layer.
        table: marks of all that writes the stream outside the layers.
    """

    weights: Weights
    lines: dict[int | None, list[TableTensor]] = field(default_factory=lambda: defaultdict(list))
    table: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        for line in self.weights.family.layout(self.weights.config).values():
            self.lines[line.layer].append(line)
        self.table.extend(self._table_marks())

    def _table_marks(self) -> Iterator[Mark]:
        for line in self.lines[None]:
            for position, axis in enumerate(line.spec.axes):
                if axis.role is Role.WRITE and axis.dimensions == ("hidden",):
                    weight = self.weights.read(line.name)
                    yield mark(weight, position, random_mix(weight.shape[1 - position]))

    def once(self, assumed: Classes, progress: Progress | None) -> tuple[Classes, list[LayerTwins], bool]:
        """Under one assumption: the assumption refined, the layers' twins, whether the stream's mean is zero."""
        stream, found = _Stream(assumed), []
        for writer in self.table:
            stream.ask_writer(writer)
        count = len(self.lines) - 1
        for layer in range(count):
            found.append(self._layer(layer, assumed, stream))
            if progress is not None:
                progress("looking for copies", layer + 1, count)
        self._ask_norms(None, stream)
        return stream.classes, found, stream.centred

    def _layer(self, layer: int, assumed: Classes, stream: _Stream) -> LayerTwins:
        family = self.weights.family
        writers = {
            line: self.weights.read(line.name)
            for line in self.lines[layer]
            if any(a.role in (Role.WRITE, Role.BIAS) and a.dimensions == ("hidden",) for a in line.spec.axes)
        }
        units = self._unit_marks(layer, assumed.mix().squeeze(1))
        unread = {d: self._unread(writers, d) for d in ("intermediate", "heads")}
        kv_name = "kv_heads" if "kv_heads" in family.size_keys else "heads"
        unit_M = find_unit_twins(
            units["intermediate"], unread["intermediate"], silent_at_zero=self._silent_at_zero
        )
        head_H, kv_head_K, spare_kv_K = find_head_twins(units["heads"], units[kv_name], unread["heads"])
        merged = {"intermediate": _copies(unit_M), "heads": _copies(head_H)}
        muted = self._is_muted(layer)
        # What is multiplied by zero may be anything.
        written = [
            stream.ask_writer(found)
            for line, weight in ({} if muted else writers).items()
            for found in self._written(line, weight, merged)
        ]
        if not muted:
            self._ask_norms(layer, stream)
        return LayerTwins(
            unit_M=unit_M,
            head_H=head_H,
            kv_head_K=kv_head_K,
            spare_kv_K=spare_kv_K,
            normed=units["heads"].normed,
            silent=not any(written),
        )

    def _is_muted(self, layer: int) -> bool:
        """Whether every norm between a writer and the stream multiplies by zero."""
        family = self.weights.family
        norms = [line for line in self.lines[layer] if family.is_branch_norm(line)]
        return bool(norms) and not any(
            (self.weights.read(line.name) + family.gain_offset).any() for line in norms
        )

    @property
    def _silent_at_zero(self) -> bool:
        names = [self.weights.config.get(key) for key in _ACTIVATION_KEYS]
        return all(name is None or name in _SILENT_AT_ZERO for name in names)

    @property
    def _sizes(self) -> Mapping[str, int]:
        return self.weights.family.dimensions(self.weights.config)

    def _ask_norms(self, layer: int | None, stream: _Stream) -> None:
        for line in self.lines[layer]:
            axis = line.spec.axes[0]
            if axis.dimensions == ("hidden",) and axis.role in (Role.GAIN, Role.SHIFT):
                is_gain = axis.role is Role.GAIN
                vector = self.weights.read(line.name) + (self.weights.family.gain_offset if is_gain else 0)
                stream.ask(replace(mark(vector, 0), scaled=not is_gain))

    def _written(self, line: TableTensor, weight: Tensor, merged: Mapping[str, Classes]) -> list[Mark]:
        """Marks of the channels in a tensor that writes the stream, with twins among what it reads merged."""
        if weight.dim() == 1:
            return [mark(weight, 0)]
        position = next(p for p, axis in enumerate(line.spec.axes) if axis.role is Role.WRITE)
        mix = random_mix(weight.shape[1 - position])
        for dimension, classes in merged.items():
            for where_UE in unit_parts(line.spec.axes[1 - position], dimension, self._sizes):
                mix[where_UE] = classes.mix(where_UE.shape[1])
        return [mark(weight, position, mix)]

    def _unit_marks(self, layer: int, stream_CK: Tensor) -> dict[str, Units]:
        """Marks of all FFN units and heads of a layer, by dimension."""
        found = {dimension: Units() for dimension in ("intermediate", "heads", "kv_heads")}
        for line in self.lines[layer]:
            position = next((p for p, a in enumerate(line.spec.axes) if a.role is not Role.READ), 0)
            axis = line.spec.axes[position]
            used = [d for d in found if d in axis.dimensions]
            if not used:
                continue
            mix_CK = stream_CK if len(line.spec.axes) == 2 else None
            whole = mark(self.weights.read(line.name), position, mix_CK)
            for dimension in used:
                found[dimension].add(line.name, axis, unit_parts(axis, dimension, self._sizes), whole)
        return found

    def _unread(self, writers: Mapping[TableTensor, Tensor], dimension: str) -> Tensor:
        """Which units no writer of the stream reads."""
        unread = torch.ones(self._sizes[dimension], dtype=torch.bool)
        for line, weight in writers.items():
            for position, axis in enumerate(line.spec.axes):
                for where_UE in unit_parts(axis, dimension, self._sizes) if axis.role is Role.READ else ():
                    unread &= (weight == 0).all(dim=1 - position)[where_UE].all(dim=1)
        return unread


def _copies(leader_N: Tensor) -> Classes:
    return Classes(leader_N, torch.ones(len(leader_N), dtype=torch.float64), scaled=False)
