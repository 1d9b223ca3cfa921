"""What two models are compared on: a passage of text, cut into windows of token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import VerificationError
from dslm.load import check_token_ids, has_tokenizer, load_tokenizer

WINDOW = 512
RANDOM_TOKENS = 512
_WINDOW_LOGITS = 2**26

PASSAGE = """\
A river does not choose its bed once and for all. In a flood it carries gravel over its own banks, and when the \
water falls the main channel may lie somewhere else. Farmers along the lower valley used to mark the old course \
with willows; some of these rows now stand two miles from the nearest water. Geologists read such traces the way \
a historian reads letters: each bend that was cut off is dated by the mud that settled in it, about four \
millimetres a year, so that a core of 1.2 metres covers three centuries.

The same patience is needed in the kitchen. To make a simple bread, mix 500 g of flour, 350 g of water, 10 g of \
salt and 3 g of dry yeast. Leave the dough covered for eighteen hours, fold it twice, let it rise again, and bake \
it in a closed pot at 240 degrees for half an hour. Take the lid off and wait until the crust is as brown as you \
like. Most failures come from haste, not from the recipe.

Programs fail for other reasons. Consider this function, which finds a value in a sorted list:

def search(values, target):
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < target:
            low = middle + 1
        else:
            high = middle
    return low if low < len(values) and values[low] == target else -1

It looks obvious, and yet for years the published versions contained an error, because the sum of two large \
integers can overflow. "Beware of bugs in the above code," wrote Donald Knuth in 1977; "I have only proved it \
correct, not tried it."

In the autumn the council met to decide about the bridge. Mrs. Alvarez said that repairs would cost 84,000 euros \
and last ten years; a new one would cost 310,000 and last sixty. "Then the new one is cheaper," her neighbour \
answered, "if any of us is still here to cross it." They voted seven to five for the repair. Why do people so often \
prefer the smaller sum, even when they know that they will pay it again? Perhaps because a year is easier to \
imagine than a lifetime, and because every one of them had, at some time, watched a plan that was sensible on \
paper go down the river with the first high water of spring.
"""
"""The default text: written for dslm, so that no corpus has to be fetched."""


def token_windows(checkpoints: list[Checkpoint], text: str | None) -> tuple[list[Tensor], str]:
    """Cut a text into windows of token ids that all the models can read.

    Args:
        checkpoints: the models; they must agree on the vocabulary and, where they have one, on the tokenizer.
        text: what to cut; the built-in passage if None.

    Returns:
        Windows of shape ``[1, length]``, int64, and in words what they were made from. Where no model has a
        tokenizer the tokens are random, from a fixed seed.

    Raises:
        VerificationError: the models do not share vocabulary or tokenizer, or the text is too short.
        CheckpointError: a tokenizer gives tokens that the models do not have.
    """
    first, vocab = checkpoints[0], checkpoints[0].sizes.vocab_size
    for other in checkpoints[1:]:
        if other.sizes.vocab_size != vocab:
            raise VerificationError(
                f"{first.name} has {vocab} tokens and {other.name} {other.sizes.vocab_size}",
                "only models with the same vocabulary can be compared token by token",
            )
    length = _window_length(checkpoints, vocab)
    with_tokenizer = [checkpoint for checkpoint in checkpoints if has_tokenizer(checkpoint)]
    if not with_tokenizer:
        if text is not None:
            raise VerificationError(f"{first.name} has no tokenizer to read the text", "leave --text out")
        generator = torch.Generator().manual_seed(0)
        drawn: list[int] = torch.randint(vocab, (RANDOM_TOKENS,), generator=generator).tolist()
        return _cut(drawn, [], length), "random text"
    ids, start = _encode(with_tokenizer, PASSAGE if text is None else text, vocab)
    return _cut(ids, start, length), "the built-in passage" if text is None else "the given text"


def _window_length(checkpoints: list[Checkpoint], vocab: int) -> int:
    """Short enough for every context, and for the logits of one window to stay below 256 MiB in float32."""
    length = min(WINDOW, max(64, _WINDOW_LOGITS // vocab))
    for checkpoint in checkpoints:
        sizes = checkpoint.family.dimensions(checkpoint.config)
        length = min(length, sizes.get("positions", length))
    return length


def _encode(checkpoints: list[Checkpoint], text: str, vocab: int) -> tuple[list[int], list[int]]:
    """Token ids of the text, and the start token that the tokenizer puts in front, if it does."""
    first, *others = checkpoints
    tokenizer = load_tokenizer(first)
    ids = _ids(tokenizer, text)
    for other in others:
        if _ids(load_tokenizer(other), text) != ids:
            raise VerificationError(
                f"the tokenizers of {first.name} and {other.name} read the same text differently",
                "only models with the same tokenizer can be compared token by token",
            )
    check_token_ids(first.name, vocab, ids)
    start = [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
    body = ids[len(start) :]
    if len(body) < 2:
        raise VerificationError("the text has fewer than two tokens", "give a longer text")
    return body, start


def _ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text longer than the context is meant to be cut here.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _cut(ids: list[int], start: list[int], length: int) -> list[Tensor]:
    step = length - len(start)
    pieces = [ids[i : i + step] for i in range(0, len(ids), step)]
    if len(pieces) > 1 and len(pieces[-1]) < 2:
        pieces.pop()
    return [torch.tensor([start + piece]) for piece in pieces]
