"""GGUF files in a test, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

MODEL_TYPE = {"gemma3": "gemma3_text"}
ADDS_ONE = ("gemma2", "gemma3")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
THETA = 50_000.0
HEAD_DIM = {"llama": 8, "qwen2": 8, "qwen3": 16, "gemma2": 16, "gemma3": 16}


def vocabulary() -> list[str]:
    """Three control tokens, the byte alphabet, and one merge."""
    alphabet = bytes_to_unicode()
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(alphabet[byte] for byte in range(256)), "12"]


def pico(architecture: str, **changes) -> torch.nn.Module:
    """A random model whose weights are exact in bf16."""
    model_type = MODEL_TYPE.get(architecture, architecture)
    rope = {"rope_type": "default", "rope_theta": THETA}
    if architecture == "gemma3":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    sizes = SIZES | {"vocab_size": len(vocabulary()), "rope_parameters": rope} | changes
    if architecture != "qwen2":
        sizes["head_dim"] = HEAD_DIM[architecture]
    if architecture in ADDS_ONE:
        sizes |= {"query_pre_attn_scalar": HEAD_DIM[architecture], "sliding_window": 16}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Multiples of 1/64 below 2 stay exact in bf16 when Gemma's 1 is added and taken off again.
            parameter.copy_((torch.randn_like(parameter) * 16).round().clamp(-40, 40) / 64)
    return model.float().eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp keeps query and key rows (`convert_hf_to_gguf.py`, `LlamaModel.permute`)."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model, architecture: str, *, tensors=None, keys=None, splitter="gpt-2", drop=()
) -> Path:
    """A GGUF file as llama.cpp's converter writes it, with `tensors` and `keys` added and `drop` left out."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Pico")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    writer.add_key_length(HEAD_DIM[architecture])
    writer.add_value_length(HEAD_DIM[architecture])
    if architecture in ADDS_ONE:
        writer.add_sliding_window(config.sliding_window)
    for key, value in (keys or {}).items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    write_tokenizer(writer, splitter)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy().astype(np.float32)
        if architecture == "llama" and "q_proj" in name:
            data = permuted(data, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            data = permuted(data, config.num_key_value_heads)
        if architecture in ADDS_ONE and name.endswith("norm.weight"):
            data = data + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored not in drop:
            writer.add_tensor(stored, np.ascontiguousarray(data))
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer, splitter: str) -> None:
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
