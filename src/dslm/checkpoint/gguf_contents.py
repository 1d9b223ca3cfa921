"""What a GGUF file says of itself, and the transformers config that says the same.

transformers keeps the metadata keys it knows and ignores the rest. Each ignored key would change the model
without a word, so here every key is put into the config or refused by name.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dslm.errors import CheckpointError, UnsupportedFamilyError

ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
"""GGUF architectures that are converted; for each, a test compares logits after a round trip."""

ORIGINAL = "give the model's original checkpoint instead"
"""The hint where a GGUF file holds less, or more, than can be converted."""

_CONFIG_KEY = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ROPE_BASE = "rope.freq_base"
_BIG_GEMMA = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        architecture: ``general.architecture``.
        sizes: the architecture's metadata, its prefix taken off.
        tokenizer: kind of tokenizer, empty where the file has none.
        splitter: the rule by which its tokenizer cuts text before merging, empty where none is named.
        parameters: number of weights, not counting `rope_factors`.
        rope_factors: what each rotary frequency is divided by, or None.
    """

    path: Path
    architecture: str
    sizes: Mapping[str, Any]
    tokenizer: str
    splitter: str
    parameters: int
    rope_factors: tuple[float, ...] | None


def read_contents(path: Path) -> Contents:
    """Read and check a GGUF file's metadata.

    Raises:
        CheckpointError: it is damaged or has no tokenizer.
        UnsupportedFamilyError: the architecture is not one of `ARCHITECTURES`.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated: {error}", "download or copy it again"
        ) from error
    values = {key: _scalar(field) for key, field in reader.fields.items()}
    architecture = str(values.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise UnsupportedFamilyError(
            f"{path.name} has GGUF architecture {architecture!r}",
            f"converted are {', '.join(ARCHITECTURES)}; {ORIGINAL}",
        )
    factors = [t for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    scaling = sum(len(tensor.data) for tensor in factors)
    contents = Contents(
        path=path,
        architecture=architecture,
        sizes={k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{architecture}.")},
        tokenizer=str(values.get("tokenizer.ggml.model", "")),
        splitter=str(values.get("tokenizer.ggml.pre", "")),
        parameters=sum(math.prod(map(int, t.shape)) for t in reader.tensors) - scaling,
        rope_factors=tuple(map(float, factors[0].data)) if factors else None,
    )
    if not contents.tokenizer:
        raise CheckpointError(f"{path.name} has no tokenizer", ORIGINAL)
    return contents


def _scalar(field: Any) -> Any:
    """The value of a metadata field; None for an array."""
    if len(field.types) != 1:
        return None
    value = field.parts[field.data[0]]
    return bytes(value).decode("utf-8", "replace") if field.types[0].name == "STRING" else value.tolist()[0]


def fill_config(config: Any, contents: Contents) -> None:
    """Make a transformers config agree with every metadata key of its file.

    Args:
        config: what transformers made of the file; changed in place.
        contents: what the file says.

    Raises:
        UnsupportedFamilyError: a key has no place in the config.
    """
    for key, value in contents.sizes.items():
        if key == _ROPE_BASE or (key == "rope.scaling.type" and value == "none"):
            continue
        name = _CONFIG_KEY.get(key)
        if name == "head_dim" and value == _derived_head_dim(contents) and not hasattr(config, name):
            continue
        if name is None or value is None or not hasattr(config, name):
            raise UnsupportedFamilyError(
                f"{contents.path.name} has metadata {contents.architecture}.{key} = {value!r}, "
                "which has no place in a config",
                ORIGINAL,
            )
        setattr(config, name, shortest(value))
    if hasattr(config, "query_pre_attn_scalar"):
        # Not in the file: llama.cpp derives it, from the head width except in the largest Gemma.
        big = config.num_hidden_layers == _BIG_GEMMA[contents.architecture]
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if big else config.head_dim
        )
    _fill_rope(config, contents)


def _derived_head_dim(contents: Contents) -> int:
    """Width of a head where the config has no word for it."""
    width, heads = contents.sizes["embedding_length"], contents.sizes["attention.head_count"]
    return int(width) // int(heads)


def _fill_rope(config: Any, contents: Contents) -> None:
    rope = config.rope_parameters
    main = rope.get("full_attention", rope)
    main["rope_theta"] = shortest(contents.sizes.get(_ROPE_BASE, 10000.0))
    if contents.rope_factors is None:
        return
    scaling = {
        "rope_type": "llama3",
        "factor": shortest(max(contents.rope_factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(main["rope_theta"], config.head_dim, scaling)
    if len(expected) != len(contents.rope_factors) or not all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, contents.rope_factors, strict=True)
    ):
        raise UnsupportedFamilyError(
            f"{contents.path.name} scales its rotary frequencies in a way that is not Llama 3's",
            ORIGINAL,
        )
    main.update(scaling)


def llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> list[float]:
    """What Llama 3 divides each rotary frequency by; a GGUF file keeps these, not the numbers behind them.

    Args:
        theta: base of the frequencies.
        head_dim: width of a head.
        scaling: ``factor``, ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings``.

    Returns:
        One factor for each of the ``head_dim / 2`` frequencies, highest frequency first.

    Source: https://arxiv.org/abs/2407.21783, and ``rope_type: llama3`` in transformers.
    """
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    found = []
    for i in range(head_dim // 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (2 * i / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def shortest(value: Any) -> Any:
    """A float that came through 32 bits, as it was written: 1e-05 and not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    return next(
        (short for digits in range(1, 9) if _to_float32(short := float(f"{value:.{digits}g}")) == value),
        value,
    )


def _to_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
