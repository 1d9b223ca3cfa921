"""From a plan to the maps of every dimension, and from those to the maps of one tensor's axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch

from dslm.errors import RecipeError, SizeError
from dslm.families import Family, Tensor
from dslm.families.axes import Axis, Role
from dslm.families.family import Config
from dslm.grow import METHODS
from dslm.grow.axis_map import AxisMap, concatenated, identity, merged
from dslm.grow.blocks import new_blocks, origins, silences
from dslm.plan import Plan


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What growing does to one tensor.

    Attributes:
        axes: the map of each storage axis, None where it stays as it is.
        factor: scale of the whole tensor.
        gain_offset: what the model adds to a stored gain before it multiplies.
        silent: whether it becomes zero, so that its new block adds nothing.
    """

    axes: tuple[AxisMap | None, ...]
    factor: float = 1.0
    gain_offset: float = 0.0
    silent: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether the tensor's bytes stay as they are."""
        return all(axis is None for axis in self.axes) and self.factor == 1.0 and not self.silent


@dataclass(frozen=True, slots=True)
class Growth:
    """The maps of all dimensions of one plan.

    Attributes:
        family: the family's table.
        maps: dimension -> map, for those that grow; ``normed heads`` and ``normed kv_heads`` are those under a norm.
        sizes: source size of every dimension.
        table_factor: scale of the input table beyond its amplitudes (Gemma's multiplier).
        final_factor: scale of the last norm's output, which a tied table asks for.
        new_blocks: which target blocks the source did not have.
    """

    family: Family
    maps: Mapping[str, AxisMap]
    sizes: Mapping[str, int]
    table_factor: float
    final_factor: float
    new_blocks: frozenset[int]

    def tensor_map(self, tensor: Tensor) -> TensorMap:
        """The maps of one target tensor's storage axes."""
        axes = tuple(self._axis_map(axis) for axis in tensor.spec.axes)
        role, first = tensor.spec.axes[0].role, axes[0]
        factor, offset = 1.0, 0.0
        if tensor.name == self.family.embedding:
            factor = self.table_factor
        if self.family.final_norm and tensor.name.startswith(self.family.final_norm + "."):
            factor = self.final_factor
        if role is Role.GAIN:
            offset = float(self.family.gain_offset)
            if first is not None:
                axes = (_gain_map(first, over_heads="head_dim" in tensor.spec.dimensions),)
        silent = tensor.layer in self.new_blocks and silences(self.family, tensor)
        if tensor.layer in self.new_blocks and role is Role.WRITE and first is not None:
            if self.family.branch_norms:
                # What is written meets a gain of zero: if it were zero too, neither would ever get a gradient.
                first = replace(first, new_writes=True)
            elif len(axes) > 1 and not silent:
                # What could tell copies apart is zero: if they were equal too, they would stay so for ever.
                first = replace(first, new=first.added, new_writes=True)
            axes = (first, *axes[1:])
        return TensorMap(axes=axes, factor=factor, gain_offset=offset, silent=silent)

    def _axis_map(self, axis: Axis) -> AxisMap | None:
        normed = axis.normed or axis.role is Role.GAIN
        blocks = []
        for block in axis.blocks:
            factors = [
                identity(f) if isinstance(f, int) else self._dimension_map(f, normed=normed)
                for f in block.factors
            ]
            blocks.append(merged(factors))
        if not any(f in self.maps for block in axis.blocks for f in block.factors):
            return None
        return concatenated(blocks)

    def _dimension_map(self, dimension: str, *, normed: bool) -> AxisMap:
        found = self.maps.get(f"normed {dimension}") if normed else None
        return found or self.maps.get(dimension) or identity(self.sizes[dimension])


def _gain_map(axis: AxisMap, *, over_heads: bool) -> AxisMap:
    """A gain over the stream is copied as it is; one over all heads undoes the amplitude of what it scales.

    New channels take a gain like those they imitate.
    """
    amplitude = 1.0 / axis.amplitude if over_heads else np.ones(axis.target)
    return AxisMap(
        size=axis.size, source=axis.source, new=np.zeros(axis.target, dtype=bool), amplitude=amplitude
    )


def build_growth(family: Family, config: Config, plan: Plan, dtype: torch.dtype) -> Growth:
    """All maps of a plan.

    Args:
        family: the family's table.
        config: the source's config.
        plan: what to grow and how.
        dtype: dtype of the target's weights, in which a model rounds its embedding multiplier.

    Raises:
        SizeError: the target cannot hold the source exactly.
        RecipeError: a method cannot grow a dimension.
    """
    source, target = plan.source, plan.target
    maps: dict[str, AxisMap] = {}
    if target.hidden_size != source.hidden_size:
        maps["hidden"] = METHODS[plan.methods["hidden_size"]].hidden(family, source, target, plan.seed)
        _check_stream(family, config, plan, maps["hidden"])
    if target.intermediate_size != source.intermediate_size:
        method = METHODS[plan.methods["intermediate_size"]]
        maps["intermediate"] = method.intermediate(family, source, target, plan.seed)
    heads = (source.num_attention_heads, source.num_key_value_heads)
    if heads != (target.num_attention_heads, target.num_key_value_heads):
        maps.update(METHODS[plan.methods["num_attention_heads"]].heads(family, source, target, plan.seed))
    table_factor, final_factor = _table_factors(family, config, plan, dtype)
    return Growth(
        family=family,
        maps=maps,
        sizes=family.dimensions(config),
        table_factor=table_factor,
        final_factor=final_factor,
        new_blocks=new_blocks(origins(source.num_hidden_layers, target.num_hidden_layers)),
    )


def _table_is_on_stream(family: Family, config: Config) -> bool:
    return "hidden" in family.layout(config)[family.embedding].spec.dimensions


def _check_stream(family: Family, config: Config, plan: Plan, stream: AxisMap) -> None:
    """Refuse growth of the stream where no exact one exists."""
    source, target = plan.source.hidden_size, plan.target.hidden_size
    whole = [n for n in (target // source * source, (target // source + 1) * source) if n > source]
    multiples = f"take --method hypercloning and a whole multiple, hidden_size {' or '.join(map(str, whole))}"
    on_stream = _table_is_on_stream(family, config)
    if stream.new.any() and not family.holds(family.norm_on_read, config):
        raise SizeError(
            f"this {family.name} reads its stream outside a norm, so hidden_size {source} grows by whole copies only",
            multiples,
        )
    if not (plan.target.tied and on_stream):
        return
    if f"{family.final_norm}.weight" not in family.layout(config):
        raise RecipeError(
            f"this {family.name} has a tied table and no gain before it that could balance a wider stream",
            "separate the tables with --untie",
        )
    if stream.centred:
        raise RecipeError(
            f"a tied {family.name} table cannot lose its mean, which hidden_size {source} -> {target} needs",
            f"separate the tables with --untie, or {multiples}",
        )


def _table_factors(family: Family, config: Config, plan: Plan, dtype: torch.dtype) -> tuple[float, float]:
    """Scale of the input table, and of the last norm where the table is tied (``docs/how-it-works.md``)."""
    source, target = plan.source.hidden_size, plan.target.hidden_size
    table = 1.0
    if family.embedding_multiplier == "sqrt(hidden)":
        before, after = (torch.tensor(sqrt(size)).to(dtype).item() for size in (source, target))
        table = before / after
    if not plan.target.tied or not _table_is_on_stream(family, config):
        return table, 1.0
    return table, source / target / table
