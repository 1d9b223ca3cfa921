"""How the copies of one entry share what is read from it: the weights always sum to the source's.

A weight ``w`` is divided over ``c`` copies by halving the copies again and again: of ``c`` copies the first
``h = ceil(c / 2)`` take a share of at least ``h / c >= 1/2``, rounded to the weights' dtype, and the rest take what
is left. Taking at least half makes the subtraction exact (Sterbenz's lemma), so the parts of a bf16 weight
sum to that weight bit for bit, for any number of copies and any split.

Shape letters: O output rows, I source entries, D target entries.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from dslm.errors import RecipeError
from dslm.grow.axis_map import AxisMap, Columns
from dslm.plan import SPLIT_NAMES


class Split(Protocol):
    """Chooses how much of ``w_OI`` the first of two sets of copies takes."""

    def __call__(self, w_OI: torch.Tensor, share: float, random: np.random.Generator) -> torch.Tensor:
        """The first set's part, before rounding; ``share`` is its share of the copies, at least 1/2."""
        ...


def even(w_OI: torch.Tensor, share: float, random: np.random.Generator) -> torch.Tensor:
    """Every copy the same: the symmetric cloning of HyperCloning (arXiv 2409.12903). Such copies stay equal."""
    return w_OI * share


def uneven(w_OI: torch.Tensor, share: float, random: np.random.Generator) -> torch.Tensor:
    """A random share between ``share`` and 1, element by element, so that copies get different gradients."""
    buffer = bytearray(random.bytes(w_OI.numel()))
    u_OI = torch.frombuffer(buffer, dtype=torch.uint8).view(w_OI.shape).to(w_OI.dtype)
    return u_OI.mul_((1.0 - share) / 256.0).add_(share).mul_(w_OI)


def noise(snr_db: float) -> Split:
    """Even shares with noise added on one side and taken off the other: HyperCloning's noisy cloning.

    Args:
        snr_db: power of a row's shares over power of the noise, in decibels.

    Raises:
        RecipeError: the ratio is not a finite number.
    """
    if not np.isfinite(snr_db):
        raise RecipeError(f"--snr-db {snr_db} is not a number of decibels", "the paper uses values around 10")
    ratio = 10.0 ** (-snr_db / 20.0)

    def split(w_OI: torch.Tensor, share: float, random: np.random.Generator) -> torch.Tensor:
        part_OI = w_OI * share
        scale_O1 = part_OI.square().mean(dim=1, keepdim=True).sqrt_().mul_(ratio)
        noise_OI = torch.from_numpy(random.standard_normal(part_OI.shape, dtype=np.float32))
        return part_OI.add_(noise_OI.to(part_OI.dtype).mul_(scale_O1))

    return split


def split_named(name: str, snr_db: float | None = None) -> Split:
    """The split called ``name``.

    Raises:
        RecipeError: there is no such split, or noise was asked for without its level.
    """
    if name == "noise":
        if snr_db is None:
            raise RecipeError("the noise split needs its level", "give --snr-db, for example 10")
        return noise(snr_db)
    if name not in SPLIT_NAMES:
        raise RecipeError(f"unknown split {name!r}", f"known are {', '.join(SPLIT_NAMES)}")
    return even if name == "even" else uneven


def split_columns(
    w_OI: torch.Tensor, axis: AxisMap, split: Split, dtype: torch.dtype, random: np.random.Generator
) -> torch.Tensor:
    """Spread the columns that read a dimension over the copies of its entries.

    Args:
        w_OI: ``[rows, source]`` in the dtype to compute in, already divided by the amplitudes.
        axis: the map of the dimension.
        split: how copies share.
        dtype: dtype of the result; parts are rounded to it one after the other.
        random: source of all randomness.

    Returns:
        ``[rows, target]`` in ``dtype``; columns of new entries are zero.
    """
    out_OD = torch.zeros((len(w_OI), axis.target), dtype=dtype)
    for group in axis.groups:
        _share(w_OI[:, _index(group.source)], out_OD, group.targets, split, random)
    return out_OD


def _share(
    w_OI: torch.Tensor,
    out_OD: torch.Tensor,
    targets: tuple[Columns, ...],
    split: Split,
    random: np.random.Generator,
) -> None:
    if len(targets) == 1:
        out_OD[:, _index(targets[0])] = w_OI.to(out_OD.dtype)
        return
    half = (len(targets) + 1) // 2
    first_OI = split(w_OI, half / len(targets), random).to(out_OD.dtype).to(w_OI.dtype)
    _share(first_OI, out_OD, targets[:half], split, random)
    _share(w_OI - first_OI, out_OD, targets[half:], split, random)


def _index(columns: Columns) -> slice | torch.Tensor:
    return columns if isinstance(columns, slice) else torch.from_numpy(columns)
