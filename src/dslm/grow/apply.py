"""Applying maps to one tensor, a few rows at a time.

Shape letters: R rows of the target in hand, I source entries of the second axis, D target entries of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from math import prod

import numpy as np
import torch

from dslm.errors import RecipeError
from dslm.families import Tensor
from dslm.families.axes import Role
from dslm.grow.axis_map import AxisMap
from dslm.grow.maps import TensorMap
from dslm.grow.split import Split, split_columns

CHUNK_BYTES = 16 << 20
"""Target bytes worked on at once; with the copies that arithmetic makes, a few times this is all the memory used.

Randomness is drawn anew for each piece, so another value gives other (equally good) bytes for the same plan."""

ReadRows = Callable[[int, int], torch.Tensor]


def random_for(seed: int, name: str, start: int) -> np.random.Generator:
    """The randomness of one piece of one tensor, the same wherever and in whatever order it is made."""
    digest = hashlib.blake2b(f"{seed}/{name}/{start}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def grown_rows(
    tensor: Tensor, what: TensorMap, rows: int, read: ReadRows, dtype: torch.dtype, split: Split, seed: int
) -> Iterator[torch.Tensor]:
    """The target tensor as consecutive runs of rows.

    Args:
        tensor: the target tensor.
        what: the maps of its axes.
        rows: number of rows of the source tensor.
        read: reads source rows ``start`` to ``stop`` in the source's dtype.
        dtype: dtype of the result.
        split: how copies share what they are read with.
        seed: the plan's seed.
    """
    row_map = what.axes[0]
    step = max(1, CHUNK_BYTES // (prod(tensor.shape[1:]) * dtype.itemsize))
    centred = not what.silent and row_map is not None and row_map.centred
    centred = centred and tensor.spec.axes[0].role in (Role.WRITE, Role.BIAS)
    mean = _mean_row(read, rows, step) if centred else None
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        if what.silent:
            yield torch.full((stop - start, *tensor.shape[1:]), -what.gain_offset, dtype=dtype)
            continue
        piece = _gather(row_map, start, stop, read)
        if not what.is_identity:
            piece = _mapped(tensor, what, piece, mean, slice(start, stop), dtype, split, seed)
        yield _cast(piece, dtype, tensor.name)


def _cast(piece: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``piece`` in the target's dtype; float16 alone can overflow."""
    cast = piece.to(dtype)
    if dtype is torch.float16 and not torch.isfinite(cast).all():
        raise RecipeError(f"{name!r} has numbers too large for float16", "take --dtype bfloat16 or float32")
    return cast


def _gather(row_map: AxisMap | None, start: int, stop: int, read: ReadRows) -> torch.Tensor:
    """The source row of each target row, read in runs."""
    if row_map is None:
        return read(start, stop)
    wanted = row_map.source[start:stop]
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    runs = [read(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _mean_row(read: ReadRows, rows: int, step: int) -> torch.Tensor:
    """Mean over the rows of the source, in float64: what a LayerNorm downstream takes off anyway."""
    total = sum(
        (read(i, min(i + step, rows)).double().sum(dim=0) for i in range(0, rows, step)), torch.zeros(())
    )
    return torch.as_tensor(total) / rows


def _mapped(
    tensor: Tensor,
    what: TensorMap,
    piece: torch.Tensor,
    mean: torch.Tensor | None,
    rows: slice,
    dtype: torch.dtype,
    split: Split,
    seed: int,
) -> torch.Tensor:
    random = random_for(seed, tensor.name, rows.start)
    row_map = what.axes[0]
    if _only_copies(tensor, what):
        return piece
    compute = torch.float64 if torch.float64 in (dtype, piece.dtype) else torch.float32
    exact_RI = piece.to(compute)
    scale_R1 = _row_scale(exact_RI, what)
    if mean is not None:
        exact_RI = exact_RI - mean.to(compute)
    if what.gain_offset:
        exact_RI = exact_RI + what.gain_offset
    if row_map is not None and row_map.scaled:
        amplitude = torch.from_numpy(row_map.amplitude[rows]).to(compute)
        exact_RI = exact_RI * amplitude.view(-1, *[1] * (exact_RI.dim() - 1))
    if what.factor != 1.0:
        exact_RI = exact_RI * what.factor
    if what.gain_offset:
        exact_RI = exact_RI - what.gain_offset
    result = exact_RI
    if len(what.axes) == 2 and (column_map := what.axes[1]) is not None:
        if tensor.spec.axes[1].role is Role.READ:
            result = _read_columns(exact_RI, column_map, scale_R1, dtype, split, random)
        else:
            result = _write_columns(exact_RI, column_map)
    if row_map is not None and (new := torch.from_numpy(row_map.new[rows])).any():
        _fill_new_rows(result, new, row_map, scale_R1, what, random)
    return result


def _row_scale(exact_RI: torch.Tensor, what: TensorMap) -> torch.Tensor | None:
    """Root mean square of each source row, where something random is to be drawn at its scale."""
    if exact_RI.dim() == 1 or not any(axis is not None and axis.new.any() for axis in what.axes):
        return None
    return exact_RI.square().mean(dim=1, keepdim=True).sqrt()


def _only_copies(tensor: Tensor, what: TensorMap) -> bool:
    """Whether the rows, as gathered, are already the result."""
    row_map = what.axes[0]
    columns_stay = len(what.axes) == 1 or what.axes[1] is None
    return (
        columns_stay
        and what.factor == 1.0
        and row_map is not None
        and not (row_map.scaled or row_map.new.any())
    )


def _write_columns(exact_RI: torch.Tensor, axis: AxisMap) -> torch.Tensor:
    """Columns that write a dimension: an input table."""
    if axis.centred:
        exact_RI = exact_RI - exact_RI.mean(dim=1, keepdim=True)
    result_RD = exact_RI[:, torch.from_numpy(axis.source)]
    if axis.scaled:
        result_RD *= torch.from_numpy(axis.amplitude).to(result_RD.dtype)
    if axis.new.any():
        result_RD[:, torch.from_numpy(axis.new)] = 0.0
    return result_RD


def _read_columns(
    exact_RI: torch.Tensor,
    axis: AxisMap,
    scale_R1: torch.Tensor | None,
    dtype: torch.dtype,
    split: Split,
    random: np.random.Generator,
) -> torch.Tensor:
    """Columns that read a dimension: shared among copies, random or zero for what is new."""
    if np.any(axis.amplitude != 1.0):
        inverse = np.ones(axis.size)
        inverse[axis.source] = 1.0 / axis.amplitude
        exact_RI = exact_RI * torch.from_numpy(inverse).to(exact_RI.dtype)
    result_RD = split_columns(exact_RI, axis, split, dtype, random)
    new = torch.from_numpy(axis.new)
    if axis.new.any() and not axis.new_writes and scale_R1 is not None:
        drawn = _normal(random, (len(result_RD), int(new.sum())), exact_RI.dtype)
        result_RD[:, new] = (drawn * scale_R1 * (axis.size / axis.target) ** 0.5).to(dtype)
    return result_RD


def _fill_new_rows(
    result: torch.Tensor,
    new: torch.Tensor,
    axis: AxisMap,
    scale_R1: torch.Tensor | None,
    what: TensorMap,
    random: np.random.Generator,
) -> None:
    """New rows: zero, or random at the scale of the row they imitate; a new bias starts at zero either way."""
    if not axis.new_writes or scale_R1 is None:
        result[new] = 0.0
        return
    columns = what.axes[1]
    narrower = 1.0 if columns is None else (columns.size / columns.target) ** 0.5
    drawn = _normal(random, (int(new.sum()), result.shape[1]), scale_R1.dtype)
    result[new] = (drawn * scale_R1[new] * narrower).to(result.dtype)


def _normal(random: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).to(dtype)
