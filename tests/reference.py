"""A transformer in plain float64 NumPy, for checking maps without anybody's float32 norms: nothing of dslm is used.

It covers what the mathematics is about: RMSNorm and LayerNorm, before or after a branch, sequential and parallel
blocks, grouped queries, a norm over all heads, rotary positions, gated and plain FFN, tied tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


def rms_norm(x, gain, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def layer_norm(x, gain, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + bias


def silu(x):
    return x / (1.0 + np.exp(-x))


def rotate(x, theta=10000.0):
    """Rotary positions on ``[tokens, heads, head_dim]``."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q, k, v, shape):
    """Causal grouped-query attention; all ``[tokens, heads, head_dim]``."""
    group = shape.heads // shape.kv_heads
    tokens = len(q)
    out = np.empty_like(q)
    for head in range(shape.heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(shape.head_dim)
        scores[np.triu_indices(tokens, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
    return out.reshape(tokens, -1)


def llama_logits(w, ids, shape, *, layers):
    """Logits of a Llama (pre-norm, gated, tied when there is no head)."""
    x = w["model.embed_tokens.weight"][ids]
    for i in range(layers):
        p = f"model.layers.{i}."
        n = rms_norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (n @ w[p + f"self_attn.{m}_proj.weight"].T for m in "qkv")
        split = (len(ids), -1, shape.head_dim)
        q, k, v = rotate(q.reshape(split)), rotate(k.reshape(split)), v.reshape(split)
        x = x + attend(q, k, v, shape) @ w[p + "self_attn.o_proj.weight"].T
        x = x + gated(rms_norm(x, w[p + "post_attention_layernorm.weight"]), w, p)
    x = rms_norm(x, w["model.norm.weight"])
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def olmo2_logits(w, ids, shape, *, layers):
    """Logits of an OLMo-2: norms after the branches, and over all queries and all keys."""
    x = w["model.embed_tokens.weight"][ids]
    for i in range(layers):
        p = f"model.layers.{i}."
        q, k, v = (x @ w[p + f"self_attn.{m}_proj.weight"].T for m in "qkv")
        q, k = rms_norm(q, w[p + "self_attn.q_norm.weight"]), rms_norm(k, w[p + "self_attn.k_norm.weight"])
        split = (len(ids), -1, shape.head_dim)
        q, k, v = rotate(q.reshape(split)), rotate(k.reshape(split)), v.reshape(split)
        branch = attend(q, k, v, shape) @ w[p + "self_attn.o_proj.weight"].T
        x = x + rms_norm(branch, w[p + "post_attention_layernorm.weight"])
        x = x + rms_norm(gated(x, w, p), w[p + "post_feedforward_layernorm.weight"])
    x = rms_norm(x, w["model.norm.weight"])
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def phi_logits(w, ids, shape, *, layers):
    """Logits of a Phi without rotary positions: LayerNorm, biases, both branches on one norm."""
    x = w["model.embed_tokens.weight"][ids]
    for i in range(layers):
        p = f"model.layers.{i}."
        n = layer_norm(x, w[p + "input_layernorm.weight"], w[p + "input_layernorm.bias"])
        split = (len(ids), -1, shape.head_dim)
        q, k, v = (
            (n @ w[p + f"self_attn.{m}_proj.weight"].T + w[p + f"self_attn.{m}_proj.bias"]).reshape(split)
            for m in "qkv"
        )
        attention = attend(q, k, v, shape) @ w[p + "self_attn.dense.weight"].T + w[p + "self_attn.dense.bias"]
        units = np.tanh(n @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"])
        x = x + attention + units @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"]
    x = layer_norm(x, w["model.final_layernorm.weight"], w["model.final_layernorm.bias"])
    return x @ w["lm_head.weight"].T + w["lm_head.bias"]


def gated(x, w, p):
    gate, up = x @ w[p + "mlp.gate_proj.weight"].T, x @ w[p + "mlp.up_proj.weight"].T
    return (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T


LOGITS = {"llama": llama_logits, "olmo2": olmo2_logits, "phi": phi_logits}
