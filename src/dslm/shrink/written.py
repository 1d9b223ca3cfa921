"""Calibration text that a model writes itself (Williams et al. 2024, https://arxiv.org/abs/2410.17170).

It is written in batches that do not depend on each other, each kept in the user's cache, so that the next shrink of the
same model does not write them again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
import transformers
from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import CheckpointError, OutOfMemoryError, enough_memory
from dslm.load import load_model, pick_device
from dslm.progress import Progress
from dslm.shrink.cache import keep, place_of, read_kept
from dslm.shrink.survey import walked_loss
from dslm.shrink.walk import Walk, walking_device
from dslm.shrink.weights import Stored

_FROM_A_TEXT = "give --calibration TEXT, which is read block by block, in float32"
_BATCH = 16  # windows written at once
_FORMAT = 1  # of what is kept; raised when something else is written


def write_windows(
    checkpoint: Checkpoint,
    starts: Sequence[list[int]],
    samples: int,
    length: int,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> Tensor:
    """What a model writes at temperature 1, int64 ``[samples, length]``.

    Args:
        checkpoint: the model, opened with its weights.
        starts: token ids that windows begin with, by turns.
        samples: windows.
        length: tokens in a window, at most the model's positions.
        seed: of what is drawn.
        device: one of `dslm.load.DEVICES`.
        progress: called with a label, tokens written and tokens in all.

    Raises:
        CheckpointError: the model cannot be run, or its logits are not numbers.
        VerificationError: the same, and a block is to blame, which is named.
        OutOfMemoryError: the memory is not enough for the whole model.
    """
    where = str(pick_device(device))
    model: Any = None
    with enough_memory(f"for {samples} windows of {length} tokens", "lower --samples"):
        written = torch.zeros(samples, length, dtype=torch.int64)
    for begin in range(0, samples, _BATCH):
        rows = written[begin : begin + _BATCH]
        given = [starts[(begin + i) % len(starts)] for i in range(len(rows))]
        facts = [_FORMAT, torch.__version__, transformers.__version__, where, begin, given, length, seed]
        place = place_of("written", checkpoint, facts)
        if not _fill(rows, read_kept(place), checkpoint.sizes.vocab_size):
            draw = torch.Generator().manual_seed(random.Random(f"{seed} {begin}").getrandbits(63))
            with _telling(checkpoint, rows, device):
                model = _writer(checkpoint, device) if model is None else model
                for position in write(model, rows, given, draw):
                    if progress is not None:
                        done = begin * length + len(rows) * position
                        progress("writing calibration text", done, samples * length)
            keep(place, rows.tolist())
        if progress is not None:
            progress("writing calibration text", (begin + len(rows)) * length, samples * length)
    return written


class _NotNumbersError(Exception):
    """The logits of a model are NaN or infinite.

    Args:
        position: which they were for.
    """

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@contextmanager
def _telling(checkpoint: Checkpoint, rows: Tensor, device: str) -> Iterator[None]:
    """Say of a failure to write where the model is broken, or what needs less memory."""
    try:
        with enough_memory("for the model to write its calibration text", _FROM_A_TEXT):
            yield
    except _NotNumbersError as error:
        # The same tokens again, block by block: the one that breaks is told by its number.
        with enough_memory("to look for the block that writes no numbers", "get the model's weights again"):
            some_BT = rows[:, : error.position + 1]
            loss = walked_loss(Walk(Stored(checkpoint), walking_device(device)), some_BT)
        if isfinite(loss):
            told = "the model's logits are not numbers in its dtype, and are in float32", _FROM_A_TEXT
        else:
            told = "the model's logits are not numbers", "get its weights again"
        raise CheckpointError(*told) from error


def _fill(rows: Tensor, kept: Any, vocab: int) -> bool:
    """Take what was kept, if it is whole."""
    try:
        found = torch.tensor(kept, dtype=torch.int64)
    except (ValueError, TypeError, RuntimeError):
        return False
    if found.shape != rows.shape or not ((found >= 0) & (found < vocab)).all():
        return False
    rows.copy_(found)
    return True


def _writer(checkpoint: Checkpoint, device: str) -> Any:
    try:
        model = load_model(checkpoint, device=device)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(error.message, _FROM_A_TEXT) from error
    if model.device.type == "cpu" and model.dtype is torch.bfloat16:
        # torch's fused attention takes up to twice as long there for one token after many (SmolLM2, 16 windows).
        model.set_attn_implementation("eager")
    return model


def write(model: Any, rows: Tensor, given: list[list[int]], generator: torch.Generator) -> Iterator[int]:
    """Fill some windows, token by token.

    Not ``generate``: openings of different lengths need no padding here, an end token does not end a window,
    no setting of the model bends the distribution, and the random numbers are the generator's alone.

    Args:
        model: a transformers model.
        rows: int64 ``[windows, length]``, which is filled.
        given: token ids that each window begins with.
        generator: draws the others.

    Yields:
        The position that has been filled in every window.

    Raises:
        _NotNumbersError: the model's logits are not numbers.
    """
    for row, start in zip(rows, given, strict=True):
        row[: len(start)] = torch.tensor(start)
    fixed = torch.tensor([len(start) for start in given])
    cache = None
    for position in range(1, rows.shape[1]):
        with torch.no_grad():
            last = rows[:, position - 1 : position].to(model.device)
            out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        odds = torch.softmax(out.logits[:, -1].float().cpu(), dim=-1)
        if not torch.isfinite(odds).all():
            raise _NotNumbersError(position)
        drawn = torch.multinomial(odds, 1, generator=generator).squeeze(1)
        rows[:, position] = torch.where(fixed > position, rows[:, position], drawn)
        yield position
