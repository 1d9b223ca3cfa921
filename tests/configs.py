"""Configs in a test: those of four real models, written down, and those of the tiny ones."""

from __future__ import annotations

import copy

import pico
from dslm.families import load_family
from dslm.sizes import Sizes, count_parameters

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
PYTHIA = {
    "model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_attention_heads": 8, "vocab_size": 50304, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
}  # fmt: skip
REAL = {"smollm2": SMOLLM2, "qwen3": QWEN3, "pythia": PYTHIA, "gemma3": GEMMA3}


def pico_config(name: str, variant: str) -> dict:
    return {"model_type": name, **copy.deepcopy(pico.PICO[name][variant])}


def total(config: dict) -> int:
    return count_parameters(load_family(config["model_type"]), config)["total"]


def sizes_of(config: dict) -> Sizes:
    return Sizes.from_config(load_family(config["model_type"]), config)
