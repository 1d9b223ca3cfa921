"""From documents and conversations to blocks of tokens of equal length.

Several documents share a block. Each restarts its positions at zero, which is how transformers' masks keep them apart;
whether a model really does is tried out, not looked up (`separates`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dslm.errors import RecipeError
from dslm.progress import Progress
from dslm.texts import Row
from dslm.train.loss import IGNORED

_LENGTH_OF_TRIAL = 4
_MARK = "\N{REFERENCE MARK}"


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Tokens of one document.

    Attributes:
        ids: int32 ``[T]``.
        learned: bool ``[T]``, the tokens that the model should learn to say.
        whole: it must not be cut (a conversation, unless it is longer than a block).
        joined: it is of the same conversation as the document before it.
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    whole: bool
    joined: bool = False

    def __getitem__(self, part: slice) -> Document:
        return Document(self.ids[part], self.learned[part], self.whole, self.joined)

    def __len__(self) -> int:
        return len(self.ids)


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks to train or evaluate on.

    Args:
        ids: int32 ``[N, T]``.
        labels: int32 ``[N, T]``, `IGNORED` where nothing is to be learned.
        positions: int32 ``[N, T]``, zero where a document begins; None for a model that does not keep them apart.
    """

    def __init__(
        self, ids: NDArray[np.int32], labels: NDArray[np.int32], positions: NDArray[np.int32] | None
    ) -> None:
        self.ids, self.labels, self.positions = ids, labels, positions

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        arrays = {"input_ids": self.ids, "labels": self.labels}
        if self.positions is not None:
            arrays["position_ids"] = self.positions
        return {name: torch.from_numpy(array[index].astype(np.int64)) for name, array in arrays.items()}

    def first(self, count: int) -> Blocks:
        """The first so many blocks."""
        positions = None if self.positions is None else self.positions[:count]
        return Blocks(self.ids[:count], self.labels[:count], positions)

    @property
    def learned(self) -> int:
        """Tokens that are learned in one pass."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def read_tokens(
    tokenizer: Any, rows: Sequence[Row], name: str, progress: Progress | None = None
) -> list[Document]:
    """Tokenise documents; of a conversation only the assistant's turns are learned.

    Some templates write earlier turns otherwise once there are later ones, as Qwen3's leaves thoughts out of them.
    There each turn of the assistant becomes a document with what it follows, as the model sees it when it is to answer.

    Args:
        tokenizer: a transformers tokenizer.
        rows: what was read.
        name: of the model, for the message.
        progress: called with a label, rows done and rows in all.

    Raises:
        RecipeError: there are conversations and the tokenizer has no chat template, or it refuses one.
    """
    if tokenizer.chat_template is None and any(row.messages for row in rows):
        raise RecipeError(
            f"the data has conversations, and {name} has no chat template",
            "train on rows with 'text', or on a model with a chat template",
        )
    documents = []
    for number, row in enumerate(rows, start=1):
        documents += _conversation(tokenizer, row) if row.messages else [_text(tokenizer, row.text)]
        if progress is not None and (number % 100 == 0 or number == len(rows)):
            progress("reading text", number, len(rows))
    return [document for document in documents if len(document) > 1]


def _text(tokenizer: Any, text: str) -> Document:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return Document(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), whole=False)


def _conversation(tokenizer: Any, row: Row) -> list[Document]:
    """A conversation by its template, or each turn of the assistant with what it follows."""
    from jinja2 import TemplateError

    if any(message.get("content") is None for message in row.messages):
        raise RecipeError(
            f"{row.where} has a turn that is not text", "leave out calls of tools, and pictures"
        )

    def written(messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=prompt, tokenize=False
        )
        return text

    said = row.messages
    turns = [end for end, message in enumerate(said) if message["role"] == "assistant"]
    try:
        asked = [written(said[:end], prompt=True) if end else "" for end in turns]
        answered = [written(said[: end + 1]) for end in turns]
        parts: list[tuple[str, bool]] = []
        for before, after in zip(asked, answered, strict=True):
            parts += [(before, False), (after, True)]
        parts.append((written(said), False))
        if all(longer.startswith(text) for (text, _), (longer, _) in pairwise(parts)):
            return [_grown(tokenizer, parts)]
        marked = [written([*said[:end], {**said[end], "content": _MARK}]) for end in turns]
        answers = [_answer(*texts) for texts in zip(asked, answered, marked, strict=True)]
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"the chat template refuses {row.where}: {why}", "mend that row") from error
    documents = [
        _grown(tokenizer, [(text, False), (text + answer, True)])
        for text, answer in zip(asked, answers, strict=True)
    ]
    return [replace(document, joined=number > 0) for number, document in enumerate(documents)]


def _answer(asked: str, answered: str, marked: str) -> str:
    """What a template adds for an answer, behind what it writes to ask for it.

    Mistral's writes the system's text only while a question is the last turn. Then one with another answer, ``marked``,
    tells where answers begin.

    Raises:
        ValueError: the template does not write the answer.
    """
    if answered.startswith(asked):
        return answered[len(asked) :]
    if answered == marked:
        raise ValueError("it does not write what the assistant says")
    return answered[len(answered[: _same(answered, marked)].rstrip()) :]


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How far two sequences are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _grown(tokenizer: Any, parts: Sequence[tuple[str, bool]]) -> Document:
    """A text of which longer and longer parts are given, and whether what each has more is learned."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, said in parts:
        longer: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        same = _same(ids, longer)
        ids, learned = longer, [*learned[:same], *[said] * (len(longer) - same)]
    return Document(np.array(ids, dtype=np.int32), np.array(learned, dtype=bool), whole=True)


def hold_out(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on and a share of the tokens to evaluate on, drawn by documents.

    The document where the share is full is cut in two, so that a single long one can be divided as well; a
    conversation is not, and all documents of one are on the same side.
    """
    order: list[list[Document]] = []
    for document in documents:
        if document.joined and order and order[-1][-1].whole:
            order[-1].append(document)
        else:
            order.append([document])
    random.Random(seed).shuffle(order)
    wanted = round(share * sum(map(len, documents)))
    kept: list[Document] = []
    while order and wanted > 0:
        last = order.pop()
        size = sum(map(len, last))
        if size > wanted and not last[0].whole:
            (text,) = last
            order.append([text[: size - wanted]])
            last = [text[size - wanted :]]
        wanted -= sum(map(len, last))
        kept += last
    return [document for some in order for document in some], kept


def pack(documents: Sequence[Document], length: int, *, filler: int, apart: bool) -> Blocks:
    """Lay documents end to end into blocks.

    Text is cut where a block ends, and a last block that is not full is left out. A conversation that does not fit
    into the rest of a block begins the next one; one longer than a block loses its end. A block in which nothing is
    learned is left out too.

    Args:
        documents: what to pack, in order.
        length: tokens in a block.
        filler: token id for what stays empty.
        apart: the model keeps documents apart by their positions.
    """
    rows: list[_Row] = []
    row = _Row(length, filler)
    for document in documents:
        for piece in _fitting(document, row, length):
            if row.room < (len(piece) if document.whole else 1):
                rows.append(row)
                row = _Row(length, filler)
            row.add(piece)
    if row.room == 0 or row.whole:
        rows.append(row)
    rows = [one for one in rows if (one.labels != IGNORED).any()]
    arrays = [np.stack([getattr(r, name) for r in rows] or [np.zeros(length, np.int32)]) for name in _ARRAYS]
    ids, labels, positions = (array[: len(rows)] for array in arrays)
    return Blocks(ids, labels, positions if apart else None)


_ARRAYS = ("ids", "labels", "positions")


def _fitting(document: Document, row: _Row, length: int) -> Iterator[Document]:
    """A document in pieces: the first fills the row, the others a row each."""
    if document.whole:
        yield document[:length]
        return
    start = row.room if row.room > 0 else length
    yield document[:start]
    for begin in range(start, len(document), length):
        yield document[begin : begin + length]


class _Row:
    """A block that is being filled."""

    def __init__(self, length: int, filler: int) -> None:
        self.ids = np.full(length, filler, dtype=np.int32)
        self.labels = np.full(length, IGNORED, dtype=np.int32)
        self.positions = np.arange(length, dtype=np.int32)
        self.room = length
        self.whole = False

    def add(self, piece: Document) -> None:
        begin = len(self.ids) - self.room
        end = begin + len(piece)
        self.ids[begin:end] = piece.ids
        self.labels[begin:end] = np.where(piece.learned, piece.ids, IGNORED)
        self.labels[begin] = IGNORED  # nothing in the block foretells it
        self.positions[begin:] = np.arange(len(self.ids) - begin)
        self.room -= len(piece)
        self.whole = self.whole or piece.whole


def read_blocks(
    documents: tuple[Sequence[Document], Sequence[Document]],
    length: int,
    *,
    filler: int,
    apart: bool,
    what: tuple[str, str | None],
) -> tuple[Blocks, Blocks]:
    """Blocks to train on and blocks to evaluate on.

    Args:
        documents: to train on, and to evaluate on.
        length: tokens in a block.
        filler: token behind the last document.
        apart: whether the model keeps documents apart.
        what: where both are from; None where what to evaluate on is a share of the other.

    Raises:
        RecipeError: there is not a block of each.
    """
    train, held_out = (pack(part, length, filler=filler, apart=apart) for part in documents)
    both = zip((train, held_out), documents, what, ("train", "evaluate"), strict=True)
    for blocks, part, origin, use in both:
        tokens = sum(map(len, part))
        if blocks.learned == 0 and (tokens >= length or any(document.whole for document in part)):
            raise RecipeError(
                f"no block of {length} has anything to learn in {tokens:,} tokens to {use} on of {origin or what[0]}",
                "give conversations in which the assistant speaks, or a larger --block-size",
            )
        if len(blocks) == 0 or blocks.learned == 0:
            raise RecipeError(
                f"{origin or what[0]} has {tokens:,} tokens to {use} on, fewer than a block of {length}",
                "give more text, a smaller --block-size" + ", or a larger --held-out" * (origin is None),
            )
    return train, held_out


@torch.no_grad()
def separates(model: Any) -> bool:
    """Whether a model keeps documents in a block apart when their positions restart.

    It reads the same document twice, after two others; where it keeps them apart the logits are the same.
    """
    count = _LENGTH_OF_TRIAL
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(2 * count, device=model.device)[None] % vocab
    others = torch.cat([(ids[:, :count] + count + 1) % vocab, ids[:, count:]], dim=1)
    positions = torch.arange(count, device=model.device).repeat(2)[None]
    try:
        seen = [
            model.base_model(input_ids=x, position_ids=positions, use_cache=False).last_hidden_state[
                :, count:
            ]
            for x in (ids, others)
        ]
    except TypeError:  # the model knows no positions
        return False
    # Not equal to the bit: some devices add in another order each time.
    return torch.allclose(seen[0], seen[1], rtol=1e-3, atol=1e-4)
