"""What any in-memory implementation of HyperCloning must at least do: load, clone by 2 x 2 in float32, save untied.

This is the comparison for ``grow_smollm2.py``. It is written from the paper (arXiv 2409.12903, section 3), does
nothing twice and prints nothing. The published implementations do at least this much.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

FACTOR = 2


def main(source: str, out: str) -> None:
    """Clone a Llama-like model by two in width and FFN."""
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = small.config.__class__.from_dict(small.config.to_dict())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, key, FACTOR * getattr(config, key))
    config.tie_word_embeddings = False
    large = AutoModelForCausalLM.from_config(config)
    state = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            value = state[name]
            rows, columns = parameter.shape[0] // value.shape[0], parameter.shape[-1] // value.shape[-1]
            if value.dim() == 1:
                parameter.copy_(value.repeat(rows))
            elif name == "model.embed_tokens.weight":
                parameter.copy_(value.repeat(1, columns))
            else:
                parameter.copy_((value / columns).repeat(rows, columns))
    large.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
