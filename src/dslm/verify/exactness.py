"""Are two models the same function? Differences of their logits, next to what rounding alone does.

Shapes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp, inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.load import load_model
from dslm.progress import Progress
from dslm.verify.units import Shuffle, parts_of

_CHUNK = 2**22
_IRRATIONAL = 1.5**0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far model B is from model A on the same tokens.

    Attributes:
        tokens: tokens compared.
        max_difference: largest ``|logit_A - logit_B|``; infinite where a logit is not finite.
        max_logit: largest ``|logit_A|``.
        relative_difference: ``max_difference / max_logit``.
        kl: mean ``KL(A || B)`` in nats per token.
        agreement: share of the tokens where both give the same most likely next token, 0 to 1.
        perplexity_a: perplexity of A on the tokens.
        perplexity_b: perplexity of B on the tokens.
    """

    tokens: int
    max_difference: float
    max_logit: float
    relative_difference: float
    kl: float
    agreement: float
    perplexity_a: float
    perplexity_b: float

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


class _Totals:
    """Running sums over windows, so that only one window's logits are in memory."""

    def __init__(self) -> None:
        self.tokens = self.predicted = self.agreeing = 0
        self.difference = self.largest = self.kl = self.loss_a = self.loss_b = 0.0

    def add(self, a_TV: Tensor, b_TV: Tensor, ids_T: Tensor) -> None:
        """Add one window, a few rows at a time: float64 log-probabilities of the float32 logits."""
        rows = max(1, _CHUNK // a_TV.shape[1])
        for start in range(0, len(ids_T), rows):
            a, b = a_TV[start : start + rows].float(), b_TV[start : start + rows].float()
            self.difference = max(self.difference, _finite((a - b).abs().max()))
            self.largest = max(self.largest, _finite(a.abs().max()))
            self.agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
            log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
            self.kl += float((log_a.exp() * (log_a - log_b)).sum())
            following = ids_T[start + 1 : start + 1 + len(a), None]
            self.loss_a -= float(log_a[: len(following)].gather(1, following).sum())
            self.loss_b -= float(log_b[: len(following)].gather(1, following).sum())
            self.predicted += len(following)
        self.tokens += len(ids_T)

    def comparison(self) -> Comparison:
        return Comparison(
            tokens=self.tokens,
            max_difference=self.difference,
            max_logit=self.largest,
            relative_difference=self.difference / self.largest if self.largest else self.difference,
            kl=max(0.0, self.kl / self.tokens) if isfinite(self.kl) else inf,
            agreement=self.agreeing / self.tokens,
            perplexity_a=_perplexity(self.loss_a, self.predicted),
            perplexity_b=_perplexity(self.loss_b, self.predicted),
        )


def _finite(value: Tensor) -> float:
    return float(value) if bool(torch.isfinite(value)) else inf


def _perplexity(loss: float, count: int) -> float:
    mean = loss / count if count else nan
    return exp(mean) if mean < 700 else inf


def compare_models(
    a: Checkpoint,
    b: Checkpoint,
    windows: list[Tensor],
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> tuple[Comparison, Comparison]:
    """Compare the logits of two models, and find the rounding floor of the first.

    The floor is model A against itself with its residual channels, FFN units and heads in another order
    (`Shuffle`): mathematically the same function, with every sum over them taken in another order. A grown model
    cannot be expected to come closer to A than that. Both models and one window's logits are in memory.

    Args:
        a: the reference.
        b: the model to judge.
        windows: token ids, each ``[1, T]``.
        dtype: of the computation, whatever the weights are stored in.
        progress: called with a label, the windows done, and all windows.

    Returns:
        B against A, and A reordered against A.

    Raises:
        CheckpointError: a model cannot be loaded.
    """
    model_a, model_b = (load_model(checkpoint, dtype=dtype, attention="eager") for checkpoint in (a, b))
    shuffle = Shuffle(parts_of(model_a, a), a.family.dimensions(a.config))
    pair, floor = _Totals(), _Totals()
    for done, ids in enumerate(windows):
        if progress:
            progress("comparing logits", done, len(windows))
        logits_TV = _logits(model_a, ids)
        with shuffle.applied():
            again_TV = _logits(model_a, ids)
        floor.add(logits_TV, again_TV, ids[0])
        del again_TV
        pair.add(logits_TV, _logits(model_b, ids), ids[0])
    if progress:
        progress("comparing logits", len(windows), len(windows))
    return pair.comparison(), floor.comparison()


def storage_floor(
    a: Checkpoint, stored: torch.dtype, windows: list[Tensor], *, dtype: str = "float32"
) -> Comparison | None:
    """What one more rounding of every weight to the dtype it is stored in does to a model.

    A growth that scales weights by irrational amplitudes has to round them once more, and cannot be expected to
    come closer than this. Each matrix is scaled, rounded, and scaled back.

    Args:
        a: the model.
        stored: the dtype to round to.
        windows: token ids, each ``[1, T]``.
        dtype: of the computation.

    Returns:
        The rounded model against the model, or None where the weights are stored as finely as is computed.
    """
    if stored.itemsize >= getattr(torch, dtype).itemsize:
        return None
    model, rounded = (load_model(a, dtype=dtype, attention="eager") for _ in range(2))
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() > 1:
                parameter.copy_((parameter * _IRRATIONAL).to(stored).to(parameter.dtype) / _IRRATIONAL)
    totals = _Totals()
    for ids in windows:
        totals.add(_logits(model, ids), _logits(rounded, ids), ids[0])
    return totals.comparison()


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0]
