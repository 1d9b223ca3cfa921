"""The loss of a language model, a piece of the logits at a time, with a teacher's distribution mixed in.

A model's own loss needs tokens times vocabulary numbers at once, several times over. Here the states before the head
are cut into pieces; the logits of a piece are computed, used, and computed again for the gradient.

Distillation is ``(1 - w) CE + w t^2 KL(teacher || student)``, both distributions at temperature ``t``
(Hinton et al. 2015, arXiv 1503.02531; forward KL on logits as in Minitron, arXiv 2407.14679).

Shape letters: B rows, T tokens, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from dslm.logits import divergence, head_logits

IGNORED = -100
"""Label of a token that is not to be predicted, as everywhere in transformers."""
PIECE = 2**24
"""Logits that exist at once, as numbers; a few copies of them are made on the way."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """What a student learns from.

    Attributes:
        teacher: a transformers model in evaluation mode, on the student's device.
        temperature: of both distributions.
        weight: share of the distillation in the loss.
    """

    teacher: Any
    temperature: float
    weight: float


@dataclass
class Loss(ModelOutput):  # type: ignore[misc]
    """What a training forward pass returns.

    Attributes:
        loss: what is minimised, a mean over the predicted tokens.
        row_nats: ``[B]``, cross-entropy of each row, summed over its predicted tokens.
        row_tokens: ``[B]``, how many those are.
    """

    loss: Tensor | None = None
    row_nats: Tensor | None = None
    row_tokens: Tensor | None = None


def give_loss(model: Any, distillation: Distillation | None = None, piece: int = PIECE) -> None:
    """Let a model compute its loss piece by piece; without labels it works as before.

    The model's ``forward`` is replaced, not wrapped from outside, so that DistributedDataParallel, FSDP and
    adapters find what they expect: a module that is called and returns a loss.

    Args:
        model: a causal language model of transformers.
        distillation: what to learn from besides the labels, while training.
        piece: logits that exist at once.
    """
    original = model.forward

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        if labels is None:
            return original(input_ids=input_ids, **inputs)
        inputs = {"input_ids": input_ids, "use_cache": False, **inputs}
        return _loss(self, inputs, labels, num_items_in_batch, distillation if self.training else None, piece)

    model.forward = MethodType(forward, model)


def _loss(
    model: Any,
    inputs: dict[str, Any],
    labels_BT: Tensor,
    items: Tensor | int | None,
    distillation: Distillation | None,
    piece: int,
) -> Loss:
    states_BTD = model.base_model(**inputs).last_hidden_state
    next_BT = functional.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]
    wanted_BT = next_BT != IGNORED
    rows_N, labels_N = wanted_BT.nonzero()[:, 0], next_BT[wanted_BT]
    taught_ND = None
    if distillation is not None:
        with torch.no_grad():
            taught_ND = distillation.teacher.base_model(**inputs).last_hidden_state[wanted_BT]
    nats_N, kl = _pieces(model, states_BTD[wanted_BT], labels_N, taught_ND, distillation, piece)
    tokens = max(1, len(labels_N)) if items is None else items
    loss = nats_N.sum() / tokens
    if distillation is not None:
        share, heat = distillation.weight, distillation.temperature**2
        loss = (1 - share) * loss + share * heat * kl / tokens
    row_nats_B = torch.zeros(len(labels_BT), dtype=nats_N.dtype, device=nats_N.device)
    row_nats_B = row_nats_B.index_add(0, rows_N, nats_N.detach())
    return Loss(loss=loss, row_nats=row_nats_B, row_tokens=wanted_BT.sum(dim=1))


def _pieces(
    model: Any,
    states_ND: Tensor,
    labels_N: Tensor,
    taught_ND: Tensor | None,
    distillation: Distillation | None,
    piece: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, and the KL to the teacher summed over all."""
    step = max(1, piece // model.config.get_text_config().vocab_size)

    def one(states_CD: Tensor, labels_C: Tensor, taught_CD: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_CV = head_logits(model, states_CD)
        nats_C = functional.cross_entropy(logits_CV, labels_C, reduction="none")
        if distillation is None or taught_CD is None:
            return nats_C, nats_C.new_zeros(())
        with torch.no_grad():
            goal_CV = head_logits(distillation.teacher, taught_CD)
        return nats_C, divergence(goal_CV, logits_CV, distillation.temperature)

    run: Callable[..., Any] = one
    if torch.is_grad_enabled():
        run = lambda *args: checkpoint(one, *args, use_reentrant=False)  # noqa: E731
    found = [
        run(
            states_ND[i : i + step],
            labels_N[i : i + step],
            None if taught_ND is None else taught_ND[i : i + step],
        )
        for i in range(0, len(labels_N), step)
    ]
    if not found:  # a row of a conversation without an answer: a zero that still has a gradient
        nothing = states_ND.sum()
        return nothing[None][:0], nothing
    return torch.cat([nats_C for nats_C, _ in found]), torch.stack([kl for _, kl in found]).sum()
