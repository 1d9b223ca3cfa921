"""Verifying in a test: a tiny model, and copies of it that are changed on purpose."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dslm.checkpoint.reader import open_folder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = 2


def build(folder, family="llama", seed=0, **changes):
    """A tiny random model of a family, saved; `changes` go into its config."""
    sizes = dict(SIZES)
    if family == "opt":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
        sizes["word_embed_proj_dim"] = 32
    if family in ("opt", "gpt_neox"):
        sizes.pop("num_key_value_heads")
    if family in ("gemma", "gemma2", "gemma3_text", "qwen3", "llama"):
        sizes["head_dim"] = 8
    config = CONFIG_MAPPING[family](**{**sizes, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def rewrite(source, out, change, **config):
    """Save a copy of a model with its state changed by `change(state)` and config keys replaced."""
    model = AutoModelForCausalLM.from_pretrained(source)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    target = AutoModelForCausalLM.from_config(
        type(model.config).from_dict({**model.config.to_dict(), **config})
    )
    target.load_state_dict(state)
    target.save_pretrained(out)
    return open_folder(out)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_folder(build(tmp_path_factory.mktemp("models") / "source"))


def ffn_copies(state, share):
    """Double every FFN; `share` of each original's down column goes to the original, the rest to the copy."""
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj"):
            state[f"{mlp}.{name}.weight"] = state[f"{mlp}.{name}.weight"].repeat(2, 1)
        down = state[f"{mlp}.down_proj.weight"]
        state[f"{mlp}.down_proj.weight"] = torch.cat([share * down, (1 - share) * down], dim=1)
