"""The small files around the weights: the edited config, and what is copied as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dslm.errors import CheckpointError
from dslm.families import Family
from dslm.sizes import Sizes

_NOT_COPIED = re.compile(
    r"config\.json|README\.md|dslm\.json|metrics\.jsonl|loss\.png|trainer_state\.json|adapter_config\.json"
    r"|.*\.safetensors|.*\.index\.json"
    r"|.*\.(bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|ot|py|partial|lock)|\..*",
    re.IGNORECASE,
)
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def files_to_copy(folder: Path) -> list[Path]:
    """Tokenizer, chat templates, generation config, licence: everything beside the weights, sorted by name."""
    files = [p for p in folder.iterdir() if p.is_file() and not _NOT_COPIED.fullmatch(p.name)]
    templates = folder / "additional_chat_templates"
    return sorted([*files, templates] if templates.is_dir() else files)


def with_dtype(config: Mapping[str, Any], code: str | None) -> dict[str, Any]:
    """``config`` naming another dtype, under whichever key it uses; unchanged when ``code`` is None."""
    edited = dict(config)
    if code is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in edited] or ["torch_dtype"]
        edited.update(dict.fromkeys(keys, DTYPE_NAMES[code]))
    return edited


def resized_config(
    family: Family, config: Mapping[str, Any], sizes: Sizes, layers: Sequence[int]
) -> dict[str, Any]:
    """``config`` with other sizes, and every per-layer list at what the blocks were that the target's come from.

    Args:
        family: the family's table.
        config: the source's config.
        sizes: the target's.
        layers: the source block of each target block.
    """
    edited = sizes.into_config(family, config)
    for key in family.per_layer:
        value = config.get(key)
        if isinstance(value, list):
            edited[key] = [value[layer] for layer in layers]
    return edited


def listed_config(family: Family, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config`` with the lists that tell layers apart written out, as transformers' config class does.

    Older files of Gemma 2, and SmolLM3 with an interval, list nothing: what a layer does follows from its number. When
    layers before it come or go, it must stay what it was. Where all layers are alike nothing is added.

    Raises:
        CheckpointError: transformers does not tell the layers apart either.
    """
    # Older files of Qwen list no layer types and attend to everything unless windows are on.
    harmless = {"layer_types"} if family.resolve(config).get("use_sliding_window") is False else set()
    missing = {key for key in family.per_layer if not isinstance(config.get(key), list)} - harmless
    if not missing:
        return config
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    whole = AutoConfig.for_model(config["model_type"], **values)
    lists = {}
    for key in sorted(missing):
        found = getattr(whole, key, None)
        if found is None:
            raise CheckpointError(
                f"config.json does not list {key}, and the installed transformers does not either",
                f"write {key} out, one entry per layer, or install a newer transformers",
            )
        lists[key] = list(found)
    return {**config, **lists}


def config_text(config: Mapping[str, Any]) -> str:
    """A config as JSON text, keys in their original order."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def card_metadata(folder: Path) -> dict[str, Any]:
    """The front matter of the source's model card; empty where there is none that can be read."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
