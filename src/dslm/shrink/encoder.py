"""The encoder of the residual stream, one for the whole model: rotated where its norms allow it, selected elsewhere.

A rotation keeps the directions that hold most of the stream; where a norm's gain or centring sits between a writer and
the stream (OLMo-2, Gemma 2 and 3, LayerNorms) only whole channels can be kept (``docs/how-it-works.md``).

Shape letters: B windows, T tokens, N tokens of all windows, S the stream's channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.fold import Encoder
from dslm.shrink.rotate import rotation, scaled, watch_norms
from dslm.shrink.select import choose_channels
from dslm.shrink.solve import sum_over_processes
from dslm.shrink.tap import reads_stream, watch
from dslm.shrink.walk import Walk
from dslm.shrink.weights import ROWS


class Survey(Protocol):
    """What one pass over a model shows of its stream."""

    def encoder(self, count: int) -> Encoder:
        """The encoder that keeps so many channels or directions."""


def survey_stream(
    walk: Walk, ids_BT: Tensor, *, tied: bool, rotate: bool = True, progress: Progress | None = None
) -> Survey:
    """See what of the stream matters. All processes of a distributed run get the same.

    Args:
        walk: the model.
        ids_BT: windows to measure on, int64.
        tied: whether the smaller model has one table.
        rotate: rotate where that is possible.
        progress: called with a label, blocks done and blocks in all.
    """
    stream = walk.embed(ids_BT)
    seen = (_Directions if rotate and walk.weights.family.rotates else _Channels).empty(stream.shape[-1])
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            stream = seen.block(walk, layer, stream)
        if progress is not None:
            progress("ranking channels", layer + 1, len(walk.blocks))
    seen.end(walk, stream, tied=tied)
    return seen


@dataclass(slots=True, eq=False)
class _Directions:
    """The leading directions of the second moment of what the norms read, tokens scaled to equal size.

    Counting the table's rows too, weighing by what readers make of the stream, or adding the second moment of the
    loss's gradient, was tried and was worse.

    Attributes:
        gram_SS: sum of the second moments.
        last_gain_S: gain of the last norm where it stays one.
        gains: weight of a reader -> gain of the norm in front of it.
    """

    gram_SS: Tensor
    last_gain_S: Tensor | None = None
    gains: dict[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, width: int) -> _Directions:
        return cls(torch.zeros(width, width, dtype=torch.float64))

    def block(self, walk: Walk, layer: int, stream_BTS: Tensor) -> Tensor:
        found = watch_norms(walk, layer, stream_BTS)
        self.gains |= found.gains
        for x_NS in found.inputs:
            self._add(x_NS)
        return found.out_BTS

    def end(self, walk: Walk, stream_BTS: Tensor, *, tied: bool) -> None:
        family, name = walk.weights.family, f"{walk.weights.family.final_norm}.weight"
        self._add(scaled(stream_BTS))
        sum_over_processes(self.gram_SS)
        if tied:
            self.last_gain_S = walk.weights.read(name) + family.gain_offset
        else:
            self.gains[family.head] = name

    def _add(self, x_NS: Tensor) -> None:
        self.gram_SS += (x_NS.T @ x_NS).double().cpu()

    def encoder(self, count: int) -> Encoder:
        return rotation(self.gram_SS, self.last_gain_S, count, self.gains)


@dataclass(slots=True, eq=False)
class _Channels:
    """The channels with the largest share of the power of what the readers, the output table among them, compute.

    Attributes:
        scores_S: ``E[u_j^2] |W_.j|^2`` with ``u`` the reader's input, as a share, summed over readers.
        power_S: sum of each channel's square, tokens scaled to equal size, before each block and after the last.
    """

    scores_S: Tensor
    power_S: Tensor

    @classmethod
    def empty(cls, width: int) -> _Channels:
        return cls(torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def block(self, walk: Walk, layer: int, stream_BTS: Tensor) -> Tensor:
        readers = [name for name in walk.linears(layer).values() if reads_stream(walk, name)]
        out_BTS, seen = watch(walk, layer, stream_BTS, readers)
        for name, u_NS in seen.items():
            self.scores_S += _share(u_NS, walk.get(name))
        self._add_power(stream_BTS)
        return out_BTS

    def end(self, walk: Walk, stream_BTS: Tensor, *, tied: bool) -> None:
        self._add_power(stream_BTS)
        with walk.head():
            u_NS, table = walk.before_head(stream_BTS), walk.model.get_output_embeddings().weight
            if table.shape[1] == len(self.scores_S):  # some OPT models project in between
                self.scores_S += _share(u_NS, table)
        sum_over_processes(self.power_S)

    def _add_power(self, stream_BTS: Tensor) -> None:
        self.power_S += scaled(stream_BTS).square().sum(dim=0).double().cpu()

    def encoder(self, count: int) -> Encoder:
        return choose_channels(self.scores_S, self.power_S, count)


def _share(u_NS: Tensor, weight_YS: Tensor) -> Tensor:
    """Each channel's share of the power of what a matrix computes, over the tokens of all processes."""
    sums_S = sum_over_processes(u_NS.square().sum(dim=0).double())
    power_S = torch.zeros_like(sums_S)
    for some_YS in torch.split(weight_YS, ROWS):
        power_S += some_YS.double().square().sum(dim=0)
    power_S *= sums_S
    return (power_S / power_S.sum().clamp_min(1e-300)).cpu()
