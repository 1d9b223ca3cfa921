"""The small files around the weights: the edited config, and what is copied as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_NOT_COPIED = re.compile(
    r"config\.json|README\.md|dslm\.json|metrics\.jsonl|loss\.png|.*\.safetensors|.*\.safetensors\.index\.json|.*\.index\.json"
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
