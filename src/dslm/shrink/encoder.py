"""The encoder of the residual stream, one for the whole model: rotated where its norms allow it, selected elsewhere.

A rotation keeps the directions that hold most of the stream; where a norm's gain or centring sits between a writer and
the stream (OLMo-2, Gemma 2 and 3, LayerNorms) only whole channels can be kept (``docs/how-it-works.md``).

Shape letters: B windows, T tokens, N tokens of all windows, S the stream's channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.fold import Encoder
from dslm.shrink.rotate import read_norms, rotation, scaled
from dslm.shrink.select import choose_channels
from dslm.shrink.tap import anatomy, tap
from dslm.shrink.walk import Walk
from dslm.shrink.weights import table_on_stream


@dataclass(slots=True, eq=False)
class _Seen:
    """What one pass over the teacher shows of its stream.

    Attributes:
        scores_S: each channel's share of what the readers make of the stream, summed over readers.
        power_S: sum of each channel's mean square before each block and after the last.
        gram_SS: sum of the second moments of what the norms read.
        gains: weight of a reader -> gain of the norm in front of it; None once a block cannot be rotated.
    """

    scores_S: Tensor
    power_S: Tensor
    gram_SS: Tensor
    gains: dict[str, str] | None = field(default_factory=dict)

    def look(self, walk: Walk, layer: int, stream_BTS: Tensor) -> None:
        """Take in a loaded block and the stream before it."""
        readers = [s.names for s in anatomy(walk, layer, stream_BTS[:1]).stages if not s.writes]
        seen = tap(walk, layer, stream_BTS, inputs=[names[0] for names in readers])
        for names in readers:
            mean_S = seen[names[0]].square().mean(dim=0).double()
            for name in names:
                self.scores_S += _share(mean_S, walk.get(name))
        self.power_S += scaled(stream_BTS).square().mean(dim=0).double().cpu()
        found = None if self.gains is None else read_norms(walk, layer, stream_BTS)
        if self.gains is None or found is None:
            self.gains = None
            return
        self.gains |= found[0]
        for x_NS in found[1]:
            self.add(x_NS)

    def add(self, x_NS: Tensor) -> None:
        """Count some tokens, scaled to a mean square of one, for the rotation."""
        self.gram_SS += (x_NS.T @ x_NS).double().cpu() / len(x_NS)


def choose_stream(
    walk: Walk, ids_BT: Tensor, count: int, progress: Progress | None = None, *, rotate: bool = True
) -> Encoder:
    """The encoder that makes the stream narrower.

    A rotation keeps the leading directions of the second moment of what the norms read, tokens scaled to equal size.
    Counting the table's rows too, or weighing by what readers make of the stream, was tried and was worse.
    A selection keeps the channels with the largest share of the power of what the readers compute,
    ``E[u_j^2] |W_.j|^2`` with ``u`` the reader's input, summed over readers and the output table.

    Args:
        walk: the model.
        ids_BT: windows to measure on, int64.
        count: channels or directions to keep.
        progress: called with a label, blocks done and blocks in all.
        rotate: rotate where that is possible.
    """
    family, config = walk.weights.family, walk.weights.config
    stream = walk.embed(ids_BT)
    width = stream.shape[-1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    seen = _Seen(zeros(width), zeros(width), zeros(width, width), gains={} if rotate else None)
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            seen.look(walk, layer, stream)
            stream = walk.run(layer, stream)
        if progress is not None:
            progress("ranking channels", layer + 1, len(walk.blocks))
    seen.power_S += scaled(stream).square().mean(dim=0).double().cpu()
    with walk.head():
        inputs = walk.before_head(stream)
        table = walk.model.get_output_embeddings().weight
        if table.shape[1] == width:
            seen.scores_S += _share(inputs.square().mean(dim=0).double(), table)
    last_gain = f"{family.final_norm}.weight"
    if seen.gains is None or last_gain not in walk.places or not table_on_stream(family, config):
        return choose_channels(seen.scores_S, seen.power_S, count)
    seen.add(scaled(stream))
    gains = dict(seen.gains)
    if not family.is_tied(config):
        gains[family.head] = last_gain
    return rotation(seen.gram_SS, walk.weights.read(last_gain) + family.gain_offset, count, gains)


def _share(mean_S: Tensor, weight_YS: Tensor) -> Tensor:
    contribution_S = (mean_S * weight_YS.double().square().sum(dim=0)).cpu()
    return contribution_S / contribution_S.sum().clamp_min(1e-300)
