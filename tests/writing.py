"""Writing in a test: a source, what it grows to, and what then lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import growing
import pico
from dslm.checkpoint.reader import open_folder
from dslm.plan import plan_growth
from dslm.resizing import resize


def make_source(folder: Path, family: str = "llama", variant: str = "gqa-tied", **options) -> Path:
    return pico.save(pico.make_model(family, variant, **options), folder)


def grow(source: Path, out: Path, **options) -> Path:
    """Double every width that the method can grow."""
    checkpoint = open_folder(source, name="tiny")
    target = growing.doubled(checkpoint.sizes)
    if options.get("method") == "net2net":
        target = checkpoint.sizes.replace(intermediate_size=target.intermediate_size)
    plan = plan_growth("tiny", checkpoint.family, checkpoint.config, target, **options)
    return resize(checkpoint, plan, out).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
