"""The one table of tiny models: every family, every switch it has. Tests draw all their models from here."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, POSITIONS = 96, 64
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
_OPT = {k: v for k, v in _BASE.items() if k != "intermediate_size"} | {"ffn_dim": 48, "dropout": 0.0}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8}
_WINDOWED_GEMMA = _GEMMA | {"query_pre_attn_scalar": 16, "sliding_window": 5}
_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 5000.0}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 5000.0,
}  # fmt: skip

_LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
    "rope_theta": 5000.0,
}  # fmt: skip

# family -> variant -> config keys, over those of `_BASE`
_TABLE: dict[str, dict[str, dict[str, Any]]] = {
    "gemma": {
        "mqa": {"num_key_value_heads": 1, "head_dim": 8},
        "wide-heads": {"num_key_value_heads": 2, "head_dim": 12},
        "mha-untied": {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False},
        "biases": _GEMMA | {"attention_bias": True},
        "odd-heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
    },
    "gemma2": {
        "windows-softcaps": _WINDOWED_GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        "no-softcaps": _WINDOWED_GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "wide-heads-untied": _WINDOWED_GEMMA | {"head_dim": 12, "tie_word_embeddings": False},
        "biases": _WINDOWED_GEMMA | {"attention_bias": True},
    },
    "gemma3_text": {
        "windows": _WINDOWED_GEMMA
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "all-sliding": _WINDOWED_GEMMA | {"num_key_value_heads": 1},
        "wide-heads-untied": _WINDOWED_GEMMA | {"head_dim": 12, "tie_word_embeddings": False},
        "biases-softcaps": _WINDOWED_GEMMA
        | {"attention_bias": True, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    },
    "gpt_neox": {
        "parallel": {"use_parallel_residual": True},
        "sequential": {"use_parallel_residual": False},
        "no-attention-bias": {"attention_bias": False, "rotary_pct": 0.5},
        "tied-full-rotary": {"tie_word_embeddings": True, "rotary_pct": 1.0},
    },
    "llama": {
        "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "mha": {},
        "mqa": {"num_key_value_heads": 1},
        "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        "wide-heads": {"num_key_value_heads": 2, "head_dim": 12, "rope_parameters": _LLAMA3},
    },
    "mistral": {
        "window": {"num_key_value_heads": 2, "sliding_window": 5},
        "no-window": {"num_key_value_heads": 4, "sliding_window": None},
        "narrow-heads-tied": {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True},
        "odd-heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
    },
    "olmo": {
        "mha": {},
        "clip": {"num_key_value_heads": 2, "clip_qkv": 0.7},
        "tied-biases": {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
        "wide-heads": {"num_key_value_heads": 2, "head_dim": 12},
    },
    "olmo2": {
        "mha": {},
        "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "biases": {"num_key_value_heads": 2, "attention_bias": True},
        "mqa-wide-heads": {"num_key_value_heads": 1, "head_dim": 12},
    },
    "opt": {
        "pre-norm": {},
        "post-norm": {"do_layer_norm_before": False},
        "projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "projected-pre-norm": {"word_embed_proj_dim": 16},
        "projected-untied": {"word_embed_proj_dim": 16, "tie_word_embeddings": False},
        "untied": {"tie_word_embeddings": False},
        "no-bias": {"enable_bias": False},
        "plain-norms": {"layer_norm_elementwise_affine": False},
        "no-final-norm": {"_remove_final_layer_norm": True},
    },
    "phi": {
        "mha": {},
        "gqa": {"num_key_value_heads": 2, "partial_rotary_factor": 1.0},
        "qk-layernorm": {"num_key_value_heads": 2, "qk_layernorm": True},
        "tied": {"tie_word_embeddings": True, "partial_rotary_factor": 0.25},
        "wide-heads": {"num_key_value_heads": 1, "head_dim": 12},
    },
    "phi3": {
        "mha": {},
        "gqa-partial-rotary": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
        "window": {"num_key_value_heads": 1, "sliding_window": 5},
        "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "wide-heads": {"num_key_value_heads": 2, "head_dim": 12},
        "longrope": {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 32,
            "rope_parameters": _LONGROPE,
        },
    },
    "qwen2": {
        "gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "mha": {"num_key_value_heads": 4},
        "windows": {"num_key_value_heads": 2} | _SLIDING,
        "wide-heads": {"num_key_value_heads": 1, "head_dim": 12},
    },
    "qwen3": {
        "gqa-tied": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
        "mha": {"num_key_value_heads": 4, "head_dim": 8},
        "biases": {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True},
        "windows-yarn": {"num_key_value_heads": 1, "head_dim": 8, "rope_parameters": _YARN} | _SLIDING,
    },
    "smollm3": {
        "nope-tied": {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
        "nope-interval": {"num_key_value_heads": 1, "no_rope_layer_interval": 2},
        "windows-untied": {
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "no_rope_layer_interval": 2,
        },
        "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        "wide-heads": {"num_key_value_heads": 2, "head_dim": 12},
    },
}
PICO: dict[str, dict[str, dict[str, Any]]] = {
    family: {name: (_OPT if family == "opt" else _BASE) | keys for name, keys in variants.items()}
    for family, variants in _TABLE.items()
}
CASES: list[tuple[str, str]] = [(family, variant) for family in PICO for variant in PICO[family]]
IDS: list[str] = [f"{family}-{variant}" for family, variant in CASES]


def make_config(family: str, variant: str) -> Any:
    """The transformers config of one variant."""
    return AutoConfig.for_model(family, **copy.deepcopy(PICO[family][variant]))


def make_model(
    family: str, variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A tiny model with weights in which nothing is near zero or one by accident."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about hardware, not about the model
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, variant), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model.to(dtype).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model as transformers does; returns the folder."""
    model.save_pretrained(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def tokens(seed: int = 0, *, rows: int = 2, length: int = 24) -> torch.Tensor:
    """Random token ids, longer than every sliding window of the table."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
