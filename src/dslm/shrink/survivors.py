"""Choosing the FFN units and heads of one block that stay, on the way while the teacher's block runs.

Shape letters: N tokens, D hidden size, X what a writer reads, M FFN units, H query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dslm.shrink.fold import Fold
from dslm.shrink.select import choose_heads, head_scores, keep_units, less_constant, surviving_heads
from dslm.shrink.solve import Moments
from dslm.shrink.streams import token_weights
from dslm.shrink.tap import bias_of, reads_heads, with_one
from dslm.shrink.walk import Walk
from dslm.sizes import Sizes

ENOUGH = 2
"""Tokens for each FFN unit below which they are too few to tell what other units make up for; norms choose then."""


def enough(tokens: int, sizes: Sizes) -> bool:
    """Whether so many tokens tell what units and heads make up for of each other."""
    return tokens >= ENOUGH * sizes.intermediate_size


@dataclass(slots=True, eq=False)
class Survivors:
    """What is known about the units and heads of a block, of which fewer are to stay.

    Attributes:
        teacher: the model, with the block loaded.
        source: its sizes.
        target: the sizes to reach.
        writers: names of the block's matrices that write the stream.
        felt: what `dslm.shrink.importance` gave; nothing where norms choose.
        refitted: whether columns are refitted, on tokens enough to tell what the others make up for.
        weigh_tokens: whether tokens with a large stream count less in that.
    """

    teacher: Walk
    source: Sizes
    target: Sizes
    writers: list[str]
    felt: Mapping[str, Tensor]
    refitted: bool
    weigh_tokens: bool
    _moments: dict[str, Moments] = field(init=False)

    def __post_init__(self) -> None:
        self._moments = {}
        for name in self._cut():
            if self.refitted or not (reads_heads(self.teacher, name) and name in self.felt):
                features = self.teacher.get(name).shape[1] + int(self._with_bias(name))
                self._moments[name] = Moments.zero(features, 0, self.teacher.device)

    @property
    def watched(self) -> list[str]:
        """The writers whose inputs have to be seen."""
        return list(self._moments)

    def _cut(self) -> list[str]:
        """The writers that read fewer units or heads afterwards."""
        units_change = self.source.intermediate_size != self.target.intermediate_size
        heads = (self.source.num_attention_heads, self.source.num_key_value_heads)
        heads_change = heads != (self.target.num_attention_heads, self.target.num_key_value_heads)
        changes = {True: heads_change, False: units_change}
        return [name for name in self.writers if changes[reads_heads(self.teacher, name)]]

    def _with_bias(self, name: str) -> bool:
        return self.refitted and bias_of(self.teacher, name) is not None

    def see(self, seen: Mapping[str, Tensor], behind_ND: Tensor) -> None:
        """Take in some tokens.

        Args:
            seen: name of each watched writer -> what it reads, ``[N, X]``.
            behind_ND: the stream behind the block.
        """
        for name, x_NX in seen.items():
            if self._with_bias(name):
                x_NX = with_one(x_NX).double()  # what is left without the mean may be small
            weight_N = token_weights(behind_ND) if self.refitted and self.weigh_tokens else None
            self._moments[name].add(x_NX, x_NX[:, :0], weight_N)

    def second_moment(self, name: str) -> Tensor:
        """Of what a watched writer reads, and a one where a bias makes up for the mean; float64, of any scale."""
        return self._moments[name].gram_XX

    def towards(self, target: Sizes) -> Survivors:
        """What is known from the same tokens, for another target that has nothing less than this one."""
        other = replace(self, target=target)
        for name, moments in other._moments.items():
            moments.gram_XX.copy_(self._moments[name].gram_XX)
        return other

    def folds(self) -> dict[str, Fold]:
        """The choice, by dimension; all processes of a distributed run come to the same."""
        found: dict[str, Fold] = {}
        for name in self._cut():
            if reads_heads(self.teacher, name):
                found |= self._heads(name)
            else:
                gram_MM, count = self._gram(name), self.target.intermediate_size
                found["intermediate"] = keep_units(
                    gram_MM, self._columns(name), count, refitted=self.refitted
                )
        return found

    def _columns(self, name: str) -> Tensor:
        """What each unit writes, ``[D, M]``, as long as the loss feels it, where that is known."""
        columns_DM = self.teacher.get(name)
        if name not in self.felt:
            return columns_DM
        metric_DD = self.felt[name].to(columns_DM.device, torch.float64)
        root_DD: Tensor = torch.linalg.cholesky(metric_DD)
        return root_DD.T @ columns_DM.double()

    def _gram(self, name: str) -> Tensor:
        """The second moment of what a watched writer reads, less what its bias makes up for."""
        return self._less_bias(name, self._moments.pop(name).summed().gram_XX)

    def _less_bias(self, name: str, gram_XX: Tensor) -> Tensor:
        return less_constant(gram_XX) if self._with_bias(name) else gram_XX

    def _heads(self, name: str) -> dict[str, Fold]:
        writer_DX, heads = self.teacher.get(name), self.source.num_attention_heads
        numbers = (
            self.source.num_key_value_heads,
            self.target.num_attention_heads,
            self.target.num_key_value_heads,
        )
        if name not in self.felt:
            return choose_heads(head_scores(self._gram(name), writer_DX, heads).cpu(), *numbers)
        felt_H = self.felt[name]
        if not self.refitted:
            return choose_heads(felt_H.sqrt(), *numbers)
        gram_XX = self._moments.pop(name).summed().gram_XX
        features = writer_DX.shape[1]
        power_H = head_scores(gram_XX[:features, :features], writer_DX, heads).square().cpu()
        price_H = felt_H / power_H.clamp_min(torch.finfo(torch.float64).tiny)
        return surviving_heads(self._less_bias(name, gram_XX), writer_DX, price_H, *numbers)
