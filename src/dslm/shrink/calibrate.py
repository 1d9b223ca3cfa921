"""Where calibration tokens come from: a text file, a data set on the hub, or the model's own writing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import CheckpointError, RecipeError
from dslm.load import check_token_ids, has_tokenizer, load_tokenizer
from dslm.progress import Progress
from dslm.shrink.written import write_windows
from dslm.shrink_plan import SELF, WRITTEN, check_texts
from dslm.texts import CHARACTERS, file_documents, read_documents

OPENINGS = (
    "The history of the city begins", "In mathematics, a", "Photosynthesis is the process by which",
    "Chapter 1\n\nIt was late when", "Once upon a time there was", "She opened the letter and",
    '"Where have you been?" he asked.', "Interviewer: What made you decide to", "Dear Sir or Madam,\n\n",
    "Hi all,\n\nJust a quick note", "def main():\n", "#include <stdio.h>\n\nint ", "<html>\n<head>\n",
    "SELECT name, ", "Ingredients:\n- ", "1. First, ", "Question: Why do", "Q: How many", "The patient was",
    "The committee said on Monday that", "Abstract. We study", "According to the law, ", "Solve for x: ",
    "I bought this product because",
)  # fmt: skip
"""Beginnings of texts of many kinds, for a model that writes its own calibration text."""

_SHORTEST = 16  # tokens in a window: below that attention has nothing to attend to
_SHARE = 8  # one window in so many is held out


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Token windows to fit on, and others to judge the fit by.

    Attributes:
        train: int64 ``[windows, length]``.
        held_out: int64 ``[windows, length]``, never used for fitting; about an eighth, at least one window.
        origin: in words, where the text is from.
    """

    train: Tensor
    held_out: Tensor
    origin: str


def calibration(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> Calibration:
    """Windows of calibration tokens, of several texts by turns; the same for the same seed.

    Of a text that is given, windows come from as many places of as many documents as there are, in an order drawn from
    the seed; what is shorter than a window is packed with the end token between. The held-out windows are of other
    documents than the rest where there are enough documents; otherwise they are the last windows.

    Args:
        checkpoint: the model, opened with its weights.
        texts: each a text file (documents start at lines like `` = Title = ``), a JSON-lines file with ``text`` or
            ``messages``, a hub data set ``owner/name[:configuration]`` (the head of its split ``train``), or ``self``:
            the model writes the text, at temperature 1 (Williams et al. 2024, https://arxiv.org/abs/2410.17170).
        samples: windows in all, held-out ones included, of each text an equal share; fewer where a text is short.
        length: tokens in a window, cut to the model's positions.
        seed: of the order of documents and of what the model writes.
        device: where the model runs if it writes a text; one of `dslm.load.DEVICES`.
        progress: called with a label, what is done and what there is in all: characters read, tokens written.

    Raises:
        RecipeError: the sizes are too small, or a text is missing, unreadable, too short or named twice.
        CheckpointError: the model has no tokenizer to read a text, not one that fits, or cannot be run.
        VerificationError: a block of the model writes no numbers.
        OutOfMemoryError: the memory is not enough for the model to write a text.
        MissingExtraError: a hub data set needs a package that is not installed.
    """
    check_texts(texts, samples)
    length = _window_length(checkpoint, length)
    shares = {text: samples // len(texts) + (i < samples % len(texts)) for i, text in enumerate(texts)}
    found = {
        text: _given(checkpoint, text, share, length, seed, progress)
        for text, share in shares.items()
        if text != SELF
    }
    if SELF in shares:  # it takes longest, and the others may turn out to be of no use
        written = _self_written(checkpoint, shares[SELF], length, seed, device, progress)
        found[SELF] = Calibration(*_cut(written), WRITTEN)
    return Calibration(
        _by_turns([found[text].train for text in texts]),
        _by_turns([found[text].held_out for text in texts]),
        " and ".join(found[text].origin for text in texts),
    )


def check_windows(checkpoint: Checkpoint, path: Path, *, length: int, limit: int) -> Tensor:
    """Windows of a text file in reading order, to report on.

    Args:
        checkpoint: the model whose tokenizer reads it.
        path: a text or JSON-lines file.
        length: tokens in a window, cut to the model's positions.
        limit: windows at most.

    Returns:
        int64 ``[windows, length]``, at least one window.

    Raises:
        RecipeError: the sizes are too small, or the text is missing, unreadable or too short.
        CheckpointError: the model has no tokenizer, or not one that fits.
    """
    if limit < 1:
        raise RecipeError(f"{limit} windows are too few", "ask for at least one")
    reader = _reader(checkpoint, _window_length(checkpoint, length))
    documents = file_documents(path)
    windows = reader.pack(iter(documents), limit)
    if len(windows) < 1:
        raise _too_short(reader, documents, f"the file {path}", 1)
    return windows


def _given(
    checkpoint: Checkpoint, text: str, samples: int, length: int, seed: int, progress: Progress | None
) -> Calibration:
    """Windows of a text that is there."""
    reader = _reader(checkpoint, length)
    documents, origin = read_documents(text, CHARACTERS * samples * length, progress)
    draw = random.Random(seed)
    draw.shuffle(documents)
    return Calibration(*_split(reader, documents, samples, origin, draw), origin)


def _by_turns(parts: list[Tensor]) -> Tensor:
    """The windows of some texts, of each text one before any gives a second."""
    return torch.stack([window for turn in zip_longest(*parts) for window in turn if window is not None])


@dataclass(frozen=True, slots=True)
class _Reader:
    """A tokenizer that packs documents: ``start`` opens each window, ``joint`` stands between documents."""

    name: str
    tokenizer: Any
    vocab: int
    length: int
    start: list[int]
    joint: list[int]

    def ids(self, document: str, limit: int) -> list[int]:
        """Token ids of a document, or of enough of its beginning to give ``limit`` tokens."""
        cut = CHARACTERS * limit
        while True:
            # verbose=False: a text longer than the context is meant to be cut into windows.
            read = self.tokenizer(document[:cut], add_special_tokens=False, verbose=False)
            found: list[int] = read["input_ids"]
            if cut >= len(document) or len(found) > limit:
                break
            cut *= 4
        check_token_ids(self.name, self.vocab, [*self.start, *self.joint, *found])
        return found

    def spread(self, documents: list[str], count: int, draw: random.Random) -> Tensor:
        """Up to ``count`` windows, int64 ``[windows, length]``, from each document before any gives a second."""
        step = self.length - len(self.start)
        cut = [_pieces(document, CHARACTERS * step) for document in documents]
        for pieces_of_one in cut:
            draw.shuffle(pieces_of_one)
        pieces = [piece for turn in zip_longest(*cut) for piece in turn if piece is not None]
        read: dict[int, list[int]] = {}
        windows: list[list[int]] = []
        short: list[int] = []
        for place in range(0, CHARACTERS * step, step):
            for number, piece in enumerate(pieces):
                if number not in read:
                    read[number] = self.ids(piece, CHARACTERS * step)
                found = read[number][place : place + step]
                if found and len(found) < step:
                    short += (self.joint if short else []) + found
                    found, short = (short[:step], short[step:]) if len(short) >= step else ([], short)
                if found:
                    windows.append(self.start + found)
                if len(windows) == count:
                    return torch.tensor(windows, dtype=torch.int64)
        whole = self.pack(iter(documents), count)  # nothing may be lost of a text that is hardly enough
        spread = torch.tensor(windows, dtype=torch.int64).view(len(windows), self.length)
        return whole if len(whole) > len(spread) else spread

    def pack(self, documents: Iterator[str], count: int) -> Tensor:
        """Up to ``count`` full windows, int64 ``[windows, length]``; takes no more documents than it needs."""
        step = self.length - len(self.start)
        ids: list[int] = []
        while len(ids) < count * step and (document := next(documents, None)) is not None:
            ids += (self.joint if ids else []) + self.ids(document, count * step)
        count = min(count, len(ids) // step)
        windows = [self.start + ids[i * step : (i + 1) * step] for i in range(count)]
        return torch.tensor(windows, dtype=torch.int64).view(count, self.length)


def _reader(checkpoint: Checkpoint, length: int) -> _Reader:
    if not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer to read a text with",
            "copy the files of the tokenizer into its folder, or calibrate on self, which the model writes",
        )
    tokenizer = load_tokenizer(checkpoint)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    opens = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    vocab = checkpoint.sizes.vocab_size
    joint = [] if eos is None else [eos]
    return _Reader(checkpoint.name, tokenizer, vocab, length, [bos] if opens else [], joint)


def _window_length(checkpoint: Checkpoint, length: int) -> int:
    positions = checkpoint.family.dimensions(checkpoint.config).get("positions", length)
    if min(length, positions) < _SHORTEST:
        raise RecipeError(
            f"windows of {min(length, positions)} tokens are too short to calibrate on",
            f"at least {_SHORTEST}; {checkpoint.name} takes up to {positions}",
        )
    return min(length, positions)


def _cut(windows: Tensor) -> tuple[Tensor, Tensor]:
    held = max(1, len(windows) // _SHARE)
    return windows[:-held], windows[-held:]


def _pieces(document: str, characters: int) -> list[str]:
    """A document cut at the ends of lines or words into pieces of about so many characters."""
    pieces, begin = [], 0
    while begin < len(document):
        end = begin + characters
        line, word = (document.find(mark, end) + 1 for mark in ("\n", " "))
        if 0 < line <= end + characters:
            end = line
        elif 0 < word <= end + characters:
            end = word
        pieces.append(document[begin:end])
        begin = end
    return pieces


def _split(
    reader: _Reader, documents: list[str], samples: int, origin: str, draw: random.Random
) -> tuple[Tensor, Tensor]:
    """Windows to fit on and windows held out."""
    together = reader.pack(iter(documents), samples)
    if len(together) < 2:
        raise _too_short(reader, documents, origin, 2)
    fit, held = _cut(together)
    rest = iter(documents)
    reader.pack(rest, len(held))
    needed = len(documents) - len(list(rest))
    apart = max(needed, min(len(held), len(documents) // _SHARE))
    if apart < len(documents):
        held_out = reader.spread(documents[:apart], len(held), draw)
        train = reader.spread(documents[apart:], len(fit), draw)
        # What else is in the held-out documents is lost; where that is much, only windows are kept apart.
        if 4 * len(train) >= 3 * len(fit):
            return train, held_out
    return _cut(reader.spread(documents, samples, draw))


def _too_short(reader: _Reader, documents: list[str], origin: str, windows: int) -> RecipeError:
    there = sum(len(reader.ids(document, reader.length * windows)) for document in documents)
    needed = windows * (reader.length - len(reader.start))
    need = (
        f"a window of {reader.length} needs" if windows == 1 else f"{windows} windows of {reader.length} need"
    )
    return RecipeError(
        f"{origin} has {there} tokens, and {need} {needed}", "give a longer text, or ask for shorter windows"
    )


def _self_written(
    checkpoint: Checkpoint, samples: int, length: int, seed: int, device: str, progress: Progress | None
) -> Tensor:
    """What the model writes, int64 ``[samples, length]``; every second window goes on from an opening."""
    reader = _reader(checkpoint, length) if has_tokenizer(checkpoint) else None
    alone = [_first_token(checkpoint, reader)]
    starts = [alone]
    if reader is not None:
        openings = random.Random(seed).sample(OPENINGS, len(OPENINGS))
        ids = [(reader.start + reader.ids(opening, length))[: length // 2] for opening in openings]
        starts = [start for opening in ids for start in (alone, opening)]
    return write_windows(checkpoint, starts, samples, length, seed, device, progress)


def _first_token(checkpoint: Checkpoint, reader: _Reader | None) -> int:
    """What a text begins after: the start token, else the end token."""
    config = checkpoint.config
    own = [] if reader is None else [reader.tokenizer.bos_token_id, reader.tokenizer.eos_token_id]
    for token in (*own, config.get("bos_token_id"), config.get("eos_token_id")):
        first = token[0] if isinstance(token, list) and token else token
        if isinstance(first, int) and 0 <= first < checkpoint.sizes.vocab_size:
            return first
    return 0
