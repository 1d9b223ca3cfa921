"""Shrinking a tiny model in a test: random legal targets, and windows of random tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import pico
from dslm.checkpoint.reader import Checkpoint, open_folder
from dslm.errors import SizeError
from dslm.plan import plan_shrink
from dslm.shrink.down import Shrunk, shrink_checkpoint
from dslm.shrink.rebuild import Windows
from dslm.shrink.redundancy import exact_stage
from dslm.shrink.weights import Stored, Weights
from dslm.sizes import Sizes
from growing import load, logits, off

FLOAT32 = 3e-5
"""How far the logits of two models that are the same may lie apart."""
AXES = ("ffn", "heads", "kv_heads", "layers", "hidden", "all")


def windows(fit: int = 24, held_out: int = 6, check: int = 2, length: int = 20, seed: int = 0) -> Windows:
    """Random tokens."""
    ids = pico.tokens(seed, rows=fit + held_out + check, length=length)
    first, second, third = ids.split([fit, held_out, check])
    return Windows(first, second, {"check": third})


def make_source(folder: Path, family: str, variant: str, **options) -> Checkpoint:
    return open_folder(pico.save(pico.make_model(family, variant, **options), folder), name="tiny")


def smaller_in_all(sizes: Sizes) -> Sizes:
    """Of a tiny model: less of everything, with groups of heads as large as they were."""
    groups = 2 * sizes.num_key_value_heads // sizes.num_attention_heads
    return sizes.replace(
        intermediate_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=groups
    )  # fmt: skip


def down(source: Checkpoint, out: Path, target: Sizes, **options) -> Shrunk:
    """Shrink with a plan; the model writes its own calibration text."""
    plan = plan_shrink(source.name, source.family, source.config, target, samples=24, length=20, **options)
    return shrink_checkpoint(source, plan, out, device="cpu")


def distance(one: Path, other: Path, dtype: torch.dtype = torch.float32, seed: int = 1) -> float:
    """How far two checkpoints' logits lie apart, relative to the largest."""
    ids = pico.tokens(seed)
    return off(*(logits(load(folder, dtype), ids) for folder in (one, other)))


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Nats per predicted token, as stock transformers computes the logits."""
    logits_NV = logits(model, ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits_NV, ids[:, 1:].flatten()))


def reduced(folder: Path, target: Sizes, place: Path) -> tuple[Path, Sizes, dict[str, int]]:
    """What the exact stage leaves of a checkpoint, as one in a new folder; its sizes, and what was removed."""
    found = exact_stage(Stored(open_folder(folder)), target)
    out = written(found.weights, place / f"reduced{len(list(place.iterdir()))}")
    return out, open_folder(out).sizes, found.removed


def written(weights: Weights, folder: Path) -> Path:
    """The weights as a checkpoint that stock transformers loads."""
    folder.mkdir()
    tensors = {name: weights.read(name).contiguous() for name in weights.family.layout(weights.config)}
    (folder / "config.json").write_text(json.dumps(weights.config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draw_smaller(source: Checkpoint, axis: str, draw: random.Random) -> Sizes | None:
    """Random legal sizes that shrink one axis, or all; None where the family allows none."""
    sizes = source.sizes
    for _ in range(300):
        target = _drawn(sizes, axis, draw)
        if target == sizes:
            continue
        try:
            plan_shrink(source.name, source.family, source.config, target, samples=2, length=16)
        except SizeError:
            continue
        return target
    return None


def _drawn(sizes: Sizes, axis: str, draw: random.Random) -> Sizes:
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    group = heads // kv_heads
    changes: dict[str, int] = {}
    if axis in ("ffn", "all"):
        changes["intermediate_size"] = draw.randint(1, sizes.intermediate_size - 1)
    if axis in ("layers", "all"):
        changes["num_hidden_layers"] = draw.randint(1, sizes.num_hidden_layers - 1)
    if axis == "heads":
        changes["num_attention_heads"] = kv_heads * draw.randint(1, group)
    if axis in ("kv_heads", "all"):
        changes["num_key_value_heads"] = draw.randint(1, kv_heads)
        changes["num_attention_heads"] = changes["num_key_value_heads"] * draw.randint(1, group)
    if axis in ("hidden", "all"):
        changes["hidden_size"] = draw.randint(8, sizes.hidden_size - 1)
    target = sizes.replace(**changes)
    if axis in ("hidden", "heads", "kv_heads") and draw.random() < 0.5:  # where both must go together
        kept = draw.randint(1, kv_heads)
        target = target.replace(
            num_key_value_heads=kept,
            num_attention_heads=kept * group,
            hidden_size=kept * group * sizes.head_dim,
        )
    return target


def rebuilt_logits(walk, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model that is walked block by block."""
    hidden = walk.embed(ids)
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            hidden = walk.run(layer, hidden)
    with walk.head():
        return walk.logits(hidden).double()
