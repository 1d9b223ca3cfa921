"""A text to score models on, and its windows as the tokenizer of each model reads them.

Every token of a document is predicted once, as in lm-eval's rolling log-likelihood: windows do not overlap, but
each begins with the last token of the one before. The tokenizer's start token, where it puts one, opens every
window; the first token of a document follows the start token or else the end token, whether it puts them or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import RecipeError
from dslm.load import check_token_ids, load_tokenizer
from dslm.texts import ROWS, file_documents
from dslm.verify.text import PASSAGE

SHORTEST = 8
"""Tokens of the shortest window: below that a model sees next to nothing."""


def read_documents(text: Path | str | None) -> tuple[list[str], str]:
    """The documents of a text, and in words what it is.

    Args:
        text: a file: a JSON-lines file has a document on each line, any other text file is one document; or the
            text itself; or None for the built-in passage.

    Raises:
        RecipeError: the file is missing, unreadable, empty, or not text.
    """
    if text is None:
        return [PASSAGE], "the built-in passage"
    if isinstance(text, str):
        return [text], "the given text"
    if not text.exists():
        raise RecipeError(f"there is no file {text}", "give a text file or a JSON-lines file")
    documents = file_documents(text)
    return documents if text.suffix.lower() in ROWS else ["".join(documents)], f"the file {text}"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to predict, after some that are only context.

    Attributes:
        ids: token ids.
        context: how many of them, from the first on, are not predicted; at least one.
        nbytes: UTF-8 bytes of the text that the others stand for.
    """

    ids: tuple[int, ...]
    context: int
    nbytes: int

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.context


@dataclass(frozen=True, slots=True)
class Reader:
    """A model's tokenizer: ``start`` opens each window, ``first`` is what the first token of a document follows."""

    name: str
    tokenizer: Any
    vocab: int
    start: tuple[int, ...]
    first: tuple[int, ...]

    def windows(self, documents: list[str], length: int) -> list[Window]:
        """The windows of all documents in reading order, each of up to ``length`` tokens.

        Raises:
            CheckpointError: the tokenizer gives tokens that the model does not have.
            RecipeError: fewer than two tokens can be predicted.
        """
        found = [window for document in documents for window in self._cut(document, length)]
        check_token_ids(self.name, self.vocab, (max(window.ids) for window in found))
        if sum(window.tokens for window in found) < 2:
            raise RecipeError(
                f"to {self.name} the text has fewer than two tokens to predict", "give a longer text"
            )
        return found

    def _cut(self, document: str, length: int) -> Iterator[Window]:
        ids, begins = self._read(document)
        step = self._step(length)
        for begin in range(0 if self.first else 1, len(ids), step):
            piece = ids[begin : begin + step]
            context = (*self.start, ids[begin - 1]) if begin else self.first
            till = begins[begin + step] if begin + step < len(ids) else len(document)
            nbytes = len(document[begins[begin] if begin else 0 : till].encode())
            yield Window((*context, *piece), len(context), nbytes)

    def head(self, documents: list[str], windows: int, length: int) -> list[str]:
        """So much of the documents, from the first on, as makes at most so many windows."""
        kept: list[str] = []
        for document in documents:
            if windows < 1:
                break
            ids, begins = self._read(document)
            end = windows * self._step(length)
            kept.append(whole_words(document, begins[end]) if end < len(ids) else document)
            windows -= -(-len(ids) // self._step(length))
        return kept

    def _step(self, length: int) -> int:
        return length - len(self.start) - 1

    def _read(self, document: str) -> tuple[list[int], list[int]]:
        """Token ids, and for each the character where it begins; spread evenly where the tokenizer cannot tell."""
        fast = bool(self.tokenizer.is_fast)
        # verbose=False: a text longer than the context is meant to be cut into windows.
        read = self.tokenizer(document, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
        ids: list[int] = read["input_ids"]
        if fast:
            return ids, list(accumulate((begin for begin, _ in read["offset_mapping"]), max))
        return ids, [len(document) * i // len(ids) for i in range(len(ids))]


def reader_of(checkpoint: Checkpoint) -> Reader:
    """The tokenizer of a model, ready to cut a text into windows.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    tokenizer = load_tokenizer(checkpoint)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    opens = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    first = next(((token,) for token in (bos, eos) if token is not None), ())
    return Reader(checkpoint.name, tokenizer, checkpoint.sizes.vocab_size, (bos,) if opens else (), first)


def window_length(checkpoints: list[Checkpoint], wanted: int) -> int:
    """Tokens in a window: as wanted, but never longer than the context of a model.

    Raises:
        RecipeError: that is too short.
    """
    contexts = [checkpoint.context for checkpoint in checkpoints]
    length = min([wanted, *(context for context in contexts if context is not None)])
    if length < SHORTEST:
        raise RecipeError(f"windows of {length} tokens are too short", f"at least {SHORTEST}")
    return length


def whole_words(document: str, end: int) -> str:
    """The document up to a character, or to the last word that ends before it: half a word reads differently."""
    head = document[:end]
    if not (document[end].isspace() or head[-1:].isspace()):
        head = head[: head.rfind(" ") + 1] or head
    return head.rstrip()
