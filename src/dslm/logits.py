"""The end of a model by itself: logits of a few states at a time, where all of them would not fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def head_logits(model: Any, states_ND: Tensor) -> Tensor:
    """Logits of what the body of a stock model gave, in float32 at least.

    Args:
        model: a causal language model of transformers.
        states_ND: ``[N, D]``, some of the last hidden states of ``model.base_model``.

    Returns:
        ``[N, V]``.
    """
    import torch

    logits_NV: Tensor = model.get_output_embeddings()(states_ND)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()


def divergence(goal_NV: Tensor, logits_NV: Tensor, temperature: float) -> Tensor:
    """``sum_N KL(softmax(goal / t) || softmax(logits / t))`` in nats, over the tokens that both models have."""
    from torch.nn import functional

    vocab = min(goal_NV.shape[1], logits_NV.shape[1])
    goal_NV, logits_NV = (x[:, :vocab].to(logits_NV.dtype) / temperature for x in (goal_NV, logits_NV))
    log_p_NV, log_q_NV = goal_NV.log_softmax(dim=1), logits_NV.log_softmax(dim=1)
    return functional.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)
