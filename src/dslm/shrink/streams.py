"""The residual streams of all calibration windows, in memory or, above a limit, in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

IN_MEMORY = 400_000_000
"""Bytes of a stream, or of several that are needed at once, above which they lie in a file instead. A shrink has five
such things, its three streams and what attention made of them in both models, so they take 2 GB of memory at most."""
BATCH_TOKENS = 4096


@dataclass(slots=True, eq=False)
class Streams:
    """What flows through both models, and which windows serve for what.

    Attributes:
        teacher: ``[B, T, D]``, the teacher's stream before the next block.
        ahead: the teacher's stream after the next block, and after those behind it that are dropped.
        student: ``[B, T, D']``, the student's.
        fit: windows to fit on: the first so many.
        held_out: windows that choose the ridge: the next so many. All others only flow.
    """

    teacher: Tensor
    ahead: Tensor
    student: Tensor
    fit: int
    held_out: int

    @property
    def behind(self) -> Tensor:
        """The student's stream before the block it has passed last, in the room of ``ahead`` until that moves on."""
        return self.ahead[..., : self.student.shape[2]]

    @property
    def deciding(self) -> range:
        """Numbers of the held-out windows."""
        return range(self.fit, self.fit + self.held_out)

    def batches(self) -> Iterator[slice]:
        """All windows, never two kinds in one batch."""
        length, ends = self.teacher.shape[1], [0, self.fit, self.fit + self.held_out, len(self.teacher)]
        for start, stop in pairwise(ends):
            yield from batches(start, stop, length)

    def used(self) -> Iterator[tuple[slice, bool]]:
        """The windows that solving uses, and whether they are for fitting."""
        length = self.teacher.shape[1]
        for one in batches(0, self.fit, length):
            yield one, True
        for one in batches(self.fit, self.fit + self.held_out, length):
            yield one, False


def empty_stream(shape: tuple[int, ...], folder: Path, name: str, *, most: float = math.inf) -> Tensor:
    """Room for a stream, or for several, in float32.

    Args:
        shape: ``[windows, tokens, hidden size]``, and what may be before that.
        folder: where a file may go.
        name: the file's name.
        most: bytes above which it goes there, even below `IN_MEMORY`.
    """
    count = math.prod(shape)
    if count * 4 <= min(IN_MEMORY, most):
        return torch.empty(shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here; later it would kill the process
        with (folder / name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * 4)
    flat = torch.from_file(str(folder / name), shared=True, size=count, dtype=torch.float32)
    return flat.view(shape)


def batches(start: int, stop: int, length: int) -> Iterator[slice]:
    """Windows ``start`` to ``stop`` in runs of about `BATCH_TOKENS` tokens."""
    step = max(1, BATCH_TOKENS // length)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def token_weights(stream_ND: Tensor) -> Tensor:
    """One over each token's mean square, so that tokens whose stream is hundreds of times larger count no more."""
    return 1.0 / stream_ND.square().mean(dim=1).clamp_min(1e-12)
