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

from dslm.errors import CheckpointError
from dslm.families.axes import Role
from dslm.shrink.tap import reads_stream
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Changed, Weights


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


def rotation(gram_SS: Tensor, last_gain_S: Tensor | None, count: int, gains: Mapping[str, str]) -> Rotation:
    """The directions that hold most of the stream.

    Args:
        gram_SS: float64, sum of ``x x^T`` over a stream whose tokens are scaled to a mean square of one.
        last_gain_S: gain of the last norm where it stays one, before a tied table; the basis is the one in which it is
            diagonal. None where it goes into the output table.
        count: directions to keep.
        gains: weight of a reader -> gain of the norm in front of it.
    """
    directions_ST = torch.linalg.eigh(gram_SS).eigenvectors[:, -count:]
    basis_TS = directions_ST.T
    if last_gain_S is not None:
        gain_TT = directions_ST.T @ (last_gain_S.double()[:, None] * directions_ST)
        basis_TS = torch.linalg.eigh(gain_TT).eigenvectors.T @ basis_TS
    kept = (basis_TS @ gram_SS * basis_TS).sum() / gram_SS.trace()
    amplitude = (count / len(gram_SS) / kept).sqrt()
    return Rotation(basis_TS, float(amplitude), gains)


@dataclass(frozen=True, slots=True)
class Absorbed(Changed):
    """Weights of a model in which the norms' gains are one and the matrices behind them carry what they were."""

    gains: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        weight = self.base.read(name)
        offset = self.family.gain_offset
        if name in self.gains:
            return weight * (self.base.read(self.gains[name]) + offset)
        return torch.full_like(weight, 1 - offset) if name in self.gains.values() else weight


@dataclass(frozen=True, slots=True, eq=False)
class Normed:
    """A block's readers and the norms in front of them.

    Attributes:
        out_BTS: the stream after the block.
        gains: weight of each reader -> gain of the norm whose output it reads.
        inputs: what each norm reads, ``[N, S]``, every token scaled to a mean square of one.
    """

    out_BTS: Tensor
    gains: Mapping[str, str]
    inputs: list[Tensor]


def watch_norms(walk: Walk, layer: int, hidden_BTS: Tensor) -> Normed:
    """Run a loaded block once, and see which norm each reader sits behind: the one whose output it is given.

    Raises:
        CheckpointError: a reader has no norm in front, or a norm no reader behind, though the family's table says so.
    """
    norms = {
        place.owners[0][0]: name
        for name, place in walk.places.items()
        if place.line.layer == layer and _is_gain(place.line.spec.axes)
    }
    readers = {m: n for m, n in walk.linears(layer).items() if reads_stream(walk, n)}
    given: dict[str, tuple[Tensor, Tensor]] = {}
    reads: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if module in norms:
            given[norms[module]] = args[0], out
        else:
            reads[readers[module]] = args[0]

    handles = [module.register_forward_hook(hook) for module in (*norms, *readers)]
    try:
        out_BTS = walk.run(layer, hidden_BTS)
    finally:
        for handle in handles:
            handle.remove()
    gains = {reader: name for reader, x in reads.items() for name, (_, out) in given.items() if out is x}
    if set(gains) != set(readers.values()) or set(gains.values()) != set(norms.values()):
        raise CheckpointError(
            f"the norms of block {layer} are not where the table of {walk.weights.family.name} says",
            "the installed transformers may have changed the model; please report it",
        )
    return Normed(out_BTS, gains, [scaled(x) for x, _ in given.values()])


def scaled(hidden: Tensor) -> Tensor:
    """Every token of a stream with a mean square of one, ``[N, S]``."""
    hidden_NS = hidden.flatten(0, -2)
    return hidden_NS * hidden_NS.square().mean(dim=1, keepdim=True).clamp_min(1e-12).rsqrt()


def _is_gain(axes: tuple[Any, ...]) -> bool:
    return len(axes) == 1 and axes[0].role is Role.GAIN and axes[0].dimensions == ("hidden",)
