"""Rotating the residual stream into fewer directions, for models whose norms follow a rotation.

Where every reader sits behind an RMSNorm and every writer adds to the stream, the stream may be carried in any
orthonormal basis: a norm's gain goes into the matrices behind it, and what is left of the norm commutes with a rotation
(SliceGPT, https://arxiv.org/abs/2401.15024). One basis serves the whole model, so no matrix is added anywhere, and a
plain checkpoint comes out. The last gain cannot go into a tied table; the basis is the one in which it stays diagonal.

Shape letters: N tokens, S the stream's channels, T the directions that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dslm.families import Family
from dslm.families.axes import Role
from dslm.families.family import Config
from dslm.shrink.tap import anatomy
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The stream as its coordinates along some directions, ``x' = amplitude basis x``.

    Attributes:
        basis_TS: float64, orthonormal rows.
        amplitude: scale that keeps the stream's mean square.
        gains: weight of a reader -> gain of the norm in front of it, which goes into the reader.
    """

    basis_TS: Tensor
    amplitude: float
    gains: Mapping[str, str]

    def prepared(self, weights: Weights) -> Weights:
        """The same function with weights that may be rotated."""
        return Absorbed(weights, self.gains)

    def write(self, weight: Tensor, axis: int) -> Tensor:
        """Rotate the axis of a weight that writes the stream, or of an activation."""
        return _along(weight, axis, (self.amplitude * self.basis_TS).to(weight))

    def read(self, weight: Tensor, axis: int) -> Tensor:
        """Rotate the axis of a weight that reads the stream."""
        return _along(weight, axis, (self.basis_TS / self.amplitude).to(weight))

    def gain(self, gain: Tensor, *, over_heads: bool) -> Tensor:
        """The diagonal of a gain in the new basis; a gain of ones stays one."""
        assert not over_heads, "heads are not rotated"
        return (self.basis_TS.square() @ gain.double().cpu()).to(gain)

    def balanced(self, stored: Tensor, *, is_gain: bool) -> Tensor:
        """The last norm's gain before a tied table, whose columns are both written and read with the amplitude."""
        assert is_gain, "an RMSNorm has no shift"
        return self.gain(stored, over_heads=False) / self.amplitude**2


def _along(weight: Tensor, axis: int, map_TS: Tensor) -> Tensor:
    return (weight.transpose(axis, -1) @ map_TS.T).transpose(axis, -1).contiguous()


def rotation(gram_SS: Tensor, last_gain_S: Tensor, count: int, gains: Mapping[str, str]) -> Rotation:
    """The directions that hold most of the stream, in the basis in which the last gain is diagonal.

    Args:
        gram_SS: float64, sum of ``x x^T`` over a stream whose tokens are scaled to a mean square of one.
        last_gain_S: gain of the model's last norm.
        count: directions to keep.
        gains: weight of a reader -> gain of the norm in front of it.
    """
    directions_ST = torch.linalg.eigh(gram_SS).eigenvectors[:, -count:]
    gain_TT = directions_ST.T @ (last_gain_S.double()[:, None] * directions_ST)
    basis_TS = torch.linalg.eigh(gain_TT).eigenvectors.T @ directions_ST.T
    kept = (basis_TS @ gram_SS * basis_TS).sum() / gram_SS.trace()
    amplitude = (count / len(gram_SS) / kept).sqrt()
    return Rotation(basis_TS, float(amplitude), gains)


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Weights of a model in which the norms' gains are one and the matrices behind them carry what they were."""

    base: Weights
    gains: Mapping[str, str]

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.base.family

    @property
    def config(self) -> Config:
        """The model's config."""
        return self.base.config

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        weight = self.base.read(name)
        offset = self.family.gain_offset
        if name in self.gains:
            return weight * (self.base.read(self.gains[name]) + offset)
        return torch.full_like(weight, 1 - offset) if name in self.gains.values() else weight


def read_norms(walk: Walk, layer: int, hidden_BTS: Tensor) -> tuple[dict[str, str], list[Tensor]] | None:
    """Which norm sits in front of each reader of a loaded block, and what the norms read.

    Args:
        walk: the model.
        layer: the block.
        hidden_BTS: the stream before it.

    Returns:
        Weight of each reader -> the norm's gain, and the input of each norm, ``[N, S]``, every token scaled to a mean
        square of one; None if the block cannot be rotated: no RMSNorm, a reader without one in front, a norm elsewhere.
    """
    if not walk.weights.family.rotates:
        return None
    norms = {
        place.owners[0][0]: name
        for name, place in walk.places.items()
        if place.line.layer == layer and _is_gain(place.line.spec.axes)
    }
    readers = {m: n for m, n in walk.linears(layer).items() if _reads_stream(walk, n)}
    given: dict[str, tuple[Tensor, Tensor]] = {}
    reads: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if module in norms:
            given[norms[module]] = args[0], out
        else:
            reads[readers[module]] = args[0]

    handles = [module.register_forward_hook(hook) for module in (*norms, *readers)]
    try:
        walk.run(layer, hidden_BTS)
    finally:
        for handle in handles:
            handle.remove()
    before = {reader: [n for n, (_, out) in given.items() if out is x] for reader, x in reads.items()}
    found = {reader: names[0] for reader, names in before.items() if names}
    if set(found) != set(readers.values()) or set(found.values()) != set(norms.values()):
        return None
    if not anatomy(walk, layer, hidden_BTS[:1]).adds:
        return None
    return found, [scaled(x) for x, _ in given.values()]


def scaled(hidden: Tensor) -> Tensor:
    """Every token of a stream with a mean square of one, ``[N, S]``."""
    hidden_NS = hidden.flatten(0, -2)
    return hidden_NS * hidden_NS.square().mean(dim=1, keepdim=True).clamp_min(1e-12).rsqrt()


def _is_gain(axes: tuple[Any, ...]) -> bool:
    return len(axes) == 1 and axes[0].role is Role.GAIN and axes[0].dimensions == ("hidden",)


def _reads_stream(walk: Walk, name: str) -> bool:
    axis = walk.places[name].line.spec.axes[1]
    return axis.role is Role.READ and axis.dimensions == ("hidden",)
