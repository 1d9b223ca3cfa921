"""How well models predict a text: perplexity, bits per byte, and the difference of two models with its error.

Shapes: T tokens of a window, N positions of one piece of it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import VerificationError
from dslm.load import load_model
from dslm.logits import head_logits
from dslm.progress import Progress
from dslm.verify.measured import Measured, apart, ratio
from dslm.verify.reading import Window, read_documents, reader_of, window_length

SEQUENCE_LENGTH = 1024
"""Tokens in a window, unless another number is asked for."""

_PIECE = 2**23  # logits at once: 64 MiB in float64, whatever the vocabulary
_LARGEST = 700.0  # nats; a perplexity beyond that is no number


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well one model predicts a text; standard errors are over windows.

    Attributes:
        model: its name.
        nats: negative log-likelihood of each window's predicted tokens, in nats.
        tokens: predicted tokens of each window.
        nbytes: UTF-8 bytes that they stand for.
        device: where it was computed.
        dtype: of the numbers it was computed with; losses are added in float64.
    """

    model: str
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    nbytes: tuple[int, ...]
    device: str
    dtype: str

    @property
    def loss(self) -> Measured:
        """Nats per token; two models can be compared by it only if they have the same tokenizer."""
        return ratio(self.nats, self.tokens)

    @property
    def perplexity(self) -> Measured:
        """``exp(loss)``, its error by the slope."""
        return _exponential(self.loss)

    @property
    def bits_per_byte(self) -> Measured:
        """``nats / ln 2 / bytes``: comparable between all models that read the same text."""
        return ratio(self.nats, self.nbytes).times(1 / log(2))

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {
            "name": self.model,
            "perplexity": self.perplexity.as_dict(),
            "bits_per_byte": self.bits_per_byte.as_dict(),
            "loss": self.loss.as_dict(),
            "tokens": sum(self.tokens),
            "bytes": sum(self.nbytes),
            "windows": len(self.nats),
            "device": self.device,
            "dtype": self.dtype,
        }


@dataclass(frozen=True, slots=True)
class TextReport:
    """One model or two on the same text.

    Attributes:
        text: what they were scored on, in words.
        documents: how many documents that are.
        sequence_length: most tokens in a window.
        model: the score of the model.
        against: the score of another, if it was asked for.
        same_tokenizer: whether both read the text as the same tokens; then their windows are compared in pairs.
    """

    text: str
    documents: int
    sequence_length: int
    model: TextScore
    against: TextScore | None
    same_tokenizer: bool

    @property
    def loss_difference(self) -> Measured | None:
        """Nats per token, model minus other; None where tokens are not the same."""
        if self.against is None or not self.same_tokenizer:
            return None
        return ratio(self._pairs(self.against), self.model.tokens)

    @property
    def perplexity_ratio(self) -> Measured | None:
        """Perplexity of the model divided by that of the other; None where tokens are not the same."""
        return None if self.loss_difference is None else _exponential(self.loss_difference)

    @property
    def bits_difference(self) -> Measured | None:
        """Bits per byte, model minus other; paired by window where tokens are the same."""
        if self.against is None:
            return None
        if not self.same_tokenizer:
            return apart(self.model.bits_per_byte, self.against.bits_per_byte)
        return ratio(self._pairs(self.against), self.model.nbytes).times(1 / log(2))

    def _pairs(self, other: TextScore) -> list[float]:
        return [a - b for a, b in zip(self.model.nats, other.nats, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Everything by name; ``difference`` is model minus other."""
        found: dict[str, Any] = {
            "text": self.text,
            "documents": self.documents,
            "sequence_length": self.sequence_length,
            "model": self.model.as_dict(),
            "against": None if self.against is None else self.against.as_dict(),
            "difference": None,
        }
        if self.against is not None:
            figures = {
                "bits_per_byte": self.bits_difference,
                "loss": self.loss_difference,
                "perplexity_ratio": self.perplexity_ratio,
            }
            found["difference"] = {"same_tokenizer": self.same_tokenizer} | {
                name: None if figure is None else figure.as_dict() for name, figure in figures.items()
            }
        return found


def evaluate_text(
    model: Checkpoint,
    text: Path | str | None = None,
    *,
    against: Checkpoint | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> TextReport:
    """Score a model, or two, on a text. One model and one window's states are in memory at a time.

    Args:
        model: the model, opened with its weights.
        text: a file (each line of a JSON-lines file is a document, any other text file is one), or the text
            itself; the built-in passage if None. Each document is read by itself.
        against: another model to score on the same text.
        sequence_length: tokens in a window, cut to the shortest context of the models.
        limit: windows at most, from the beginning of the text, as the model's tokenizer counts them.
        device: one of `dslm.load.DEVICES`.
        dtype: one of `dslm.load.DTYPES`.
        progress: called with a label, windows done and windows in all.

    Raises:
        RecipeError: the text is missing, unreadable, not text or too short, or windows are.
        CheckpointError: a model cannot be loaded, or has no tokenizer, or not one that fits.
        VerificationError: a model gives NaN or infinite numbers.
        DslmError: there is no such device.
    """
    models = [model] if against is None else [model, against]
    documents, described = read_documents(text)
    length = window_length(models, sequence_length)
    readers = [reader_of(one) for one in models]
    if limit is not None:
        whole, documents = documents, readers[0].head(documents, limit, length)
        described += "" if documents == whole else ", its beginning"
    windows = [reader.windows(documents, length) for reader in readers]
    scores = [_score(one, cut, device, dtype, progress) for one, cut in zip(models, windows, strict=True)]
    return TextReport(
        text=described,
        documents=len(documents),
        sequence_length=length,
        model=scores[0],
        against=scores[1] if against is not None else None,
        same_tokenizer=windows[0] == windows[-1],
    )


def _score(
    checkpoint: Checkpoint, windows: list[Window], device: str, dtype: str, progress: Progress | None
) -> TextScore:
    model = load_model(checkpoint, dtype=dtype, device=device)
    label, nats = f"reading with {checkpoint.name}", []
    for done, window in enumerate(windows):
        if progress is not None:
            progress(label, done, len(windows))
        nats.append(_nats(model, window))
        if not isfinite(nats[-1]):
            raise VerificationError(
                f"{checkpoint.name} gives logits that are NaN or infinite, in window {done + 1} of {len(windows)}",
                "its weights are damaged, or overflow in this dtype: try --dtype float32",
            )
    if progress is not None:
        progress(label, len(windows), len(windows))
    return TextScore(
        model=checkpoint.name,
        nats=tuple(nats),
        tokens=tuple(window.tokens for window in windows),
        nbytes=tuple(window.nbytes for window in windows),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


@torch.inference_mode()
def _nats(model: Any, window: Window) -> float:
    """Negative log-likelihood of a window's predicted tokens, added in float64 where the device can."""
    ids_T = torch.tensor(window.ids, device=model.device)
    numbers = torch.float32 if model.device.type == "mps" else torch.float64
    total = 0.0
    for start, logits_NV in logits_of(model, ids_T, window.context - 1):
        goal_N = ids_T[start + 1 : start + 1 + len(logits_NV)]
        total += float(cross_entropy(logits_NV.to(numbers), goal_N, reduction="sum"))
    return total


def logits_of(model: Any, ids_T: Tensor, first: int, *, piece: int = _PIECE) -> Iterator[tuple[int, Tensor]]:
    """Logits of a window but for its last position, a few positions at a time, so that memory stays small.

    Args:
        model: a stock transformers model.
        ids_T: the window, ``[T]`` int64, on the model's device.
        first: the first position wanted.
        piece: logits at once.

    Yields:
        The first position of a piece and its logits ``[N, V]``.
    """
    rows = max(1, piece // model.config.vocab_size)
    states_TD = model.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state[0, :-1]
    for start in range(first, len(states_TD), rows):
        yield start, head_logits(model, states_TD[start : start + rows])


def _exponential(figure: Measured) -> Measured:
    value = exp(figure.value) if figure.value < _LARGEST else inf
    return Measured(value, None if figure.error is None else value * figure.error)
