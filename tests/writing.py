"""Writing in a test: a source, what it grows to, and what then lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pico
from dslm.checkpoint.reader import open_folder
from dslm.plan import plan_growth
from dslm.resizing import resize


def make_source(folder: Path, family: str = "llama", variant: str = "gqa-tied", **options) -> Path:
    return pico.save(pico.make_model(family, variant, **options), folder)


def grow(source: Path, out: Path, **options) -> Path:
    """Double every width that the method can grow."""
    checkpoint = open_folder(source, name="tiny")
    sizes = checkpoint.sizes
    target = sizes.replace(intermediate_size=2 * sizes.intermediate_size)
    if options.get("method") != "net2net":
        target = target.replace(
            hidden_size=2 * sizes.hidden_size,
            num_attention_heads=2 * sizes.num_attention_heads,
            num_key_value_heads=2 * sizes.num_key_value_heads,
        )
    plan = plan_growth("tiny", checkpoint.family, checkpoint.config, target, **options)
    return resize(checkpoint, plan, out).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
