"""Where the numbers of a model come from while it shrinks: a checkpoint, or another model seen through folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from dslm.checkpoint.config import listed_config, resized_config
from dslm.checkpoint.reader import Checkpoint
from dslm.errors import VerificationError
from dslm.families import Family
from dslm.families import Tensor as TableTensor
from dslm.families.axes import Role
from dslm.families.family import Config
from dslm.shrink.fold import Encoder, Fold, Key, fold_tensor
from dslm.sizes import Sizes

ROWS = 4096
"""Rows of a table that are rounded, or summed in float64, at once: beside it there are few copies of them."""


class Weights(Protocol):
    """Named tensors of one model, read one at a time."""

    @property
    def family(self) -> Family:
        """The model's family."""

    @property
    def config(self) -> Config:
        """The model's config."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, in float32 or wider."""


@dataclass(frozen=True)  # no slots: the config is read once
class Stored:
    """The weights of a checkpoint on disk."""

    checkpoint: Checkpoint

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.checkpoint.family

    @cached_property
    def config(self) -> Config:
        """The model's config, in which what differs between layers is listed by layer."""
        return listed_config(self.checkpoint.family, self.checkpoint.config)

    def read(self, name: str) -> Tensor:
        """A whole tensor, in float32, or float64 if it is stored so.

        Raises:
            CheckpointError: it holds NaN or infinite numbers.
        """
        stored = self.checkpoint.read_finite_rows(name, 0, self.checkpoint.entries[name].shape[0])
        return stored if stored.dtype is torch.float64 else stored.float()


@dataclass(frozen=True, eq=False)  # no slots: what follows from the sizes is computed once
class Folded:
    """Weights seen through folds: a smaller model, computed a tensor at a time.

    Attributes:
        base: the weights they come from.
        sizes: the smaller model's sizes.
        layers: the source layer of each target layer.
        folds: space -> its fold, by the *source's* layer; a space that is absent stays as it is.
        stream: what becomes of the residual stream; None if it stays.
    """

    base: Weights
    sizes: Sizes
    layers: tuple[int, ...]
    folds: Mapping[Key, Fold]
    stream: Encoder | None = None

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.base.family

    @cached_property
    def config(self) -> Config:
        """The smaller model's config."""
        return resized_config(self.family, self.base.config, self.sizes, self.layers)

    @cached_property
    def _layout(self) -> dict[str, TableTensor]:
        return self.family.layout(self.config)

    @cached_property
    def _prepared(self) -> Weights:
        weights = self.base if self.sizes.tied else TwoTables(self.base)
        return weights if self.stream is None else self.stream.prepared(weights)

    def origin(self, name: str) -> str:
        """The name that a tensor has in the base."""
        line = self._layout[name]
        return name if line.layer is None else line.in_layer(self.layers[line.layer])

    def read(self, name: str) -> Tensor:
        """A whole tensor of the smaller model."""
        family, config = self.family, self.base.config
        line, origin = self._layout[name], self.origin(name)
        layer = None if line.layer is None else self.layers[line.layer]
        weight = self._prepared.read(origin)
        weight = fold_tensor(family, line, weight, layer, self.folds, self.stream, family.dimensions(config))
        before, after = Sizes.from_config(family, config), self.sizes
        if name == family.embedding:
            factor = table_factor(family, before, after)
            return weight if factor == 1 else weight * factor
        stream = self.stream
        if (
            stream is not None
            and family.is_final_norm(name)
            and after.tied
            and table_on_stream(family, config)
        ):
            is_gain = line.spec.axes[0].role is Role.GAIN
            offset = family.gain_offset if is_gain else 0
            balanced = stream.balanced(self._prepared.read(origin) + offset, is_gain=is_gain)
            return balanced / table_factor(family, before, after) - offset
        return weight


@dataclass(frozen=True, slots=True)
class Changed:
    """Weights of which some are read as other numbers, under the same config.

    Attributes:
        base: the weights.
    """

    base: Weights

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.base.family

    @property
    def config(self) -> Config:
        """The config of the weights it is made from."""
        return self.base.config


@dataclass(frozen=True, slots=True)
class TwoTables(Changed):
    """Weights in which the output has a table of its own, made from the input's where there is only one."""

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        made = name == self.family.head and self.family.is_tied(self.config)
        return self.base.read(self.family.embedding if made else name)


@dataclass(frozen=True, slots=True)
class Kept(Changed):
    """Weights as a file will hold them.

    Attributes:
        dtypes: tensor name -> what it is kept in.
    """

    dtypes: Mapping[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """A whole tensor, rounded to its dtype.

        Raises:
            VerificationError: some of its numbers are too large for that.
        """
        return as_kept(name, self.base.read(name), self.dtypes)


def stored(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor as a dtype keeps them.

    Raises:
        VerificationError: some are too large for it.
    """
    kept = values.to(dtype)
    if not torch.isfinite(kept).all():
        raise VerificationError(
            f"{name!r} has numbers too large for {str(dtype).removeprefix('torch.')}, the dtype of the output",
            "convert the source to bfloat16 or float32 first",
        )
    return kept


def as_kept(name: str, values: Tensor, dtypes: Mapping[str, torch.dtype]) -> Tensor:
    """The numbers of a tensor after they were put into the dtype of that name, and back; unchanged if there is none.

    Raises:
        VerificationError: some are too large for it.
    """
    if name not in dtypes or dtypes[name] == values.dtype:
        return values
    kept = torch.empty_like(values)
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        kept[rows] = stored(name, values[rows], dtypes[name])
    return kept


def table_on_stream(family: Family, config: Config) -> bool:
    """Whether the input table writes the residual stream itself (some OPT models project in between)."""
    return "hidden" in family.layout(config)[family.embedding].spec.dimensions


def table_factor(family: Family, before: Sizes, after: Sizes) -> float:
    """Scale of the input table that makes up for a multiplier of ``sqrt(hidden)``."""
    if family.embedding_multiplier != "sqrt(hidden)":
        return 1.0
    return sqrt(before.hidden_size) / sqrt(after.hidden_size)
