"""Growing a tiny model in a test, and asking stock transformers whether the function was kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dslm.checkpoint.reader import Checkpoint, open_folder
from dslm.errors import RecipeError, SizeError
from dslm.families import Family, load_family
from dslm.grow.heads import lay_out_heads
from dslm.plan import plan_growth
from dslm.resizing import resize
from dslm.sizes import Sizes, check_legal
from pico import PICO

DIMENSIONS = ("layers", "hidden", "ffn", "heads", "kv_heads", "all")


def grow(source: Path | Checkpoint, out: Path, target: Sizes, **options: Any) -> Path:
    """Grow a checkpoint on disk to ``target``."""
    checkpoint = source if isinstance(source, Checkpoint) else open_folder(source)
    plan = plan_growth(checkpoint.name, checkpoint.family, checkpoint.config, target, **options)
    return resize(checkpoint, plan, out).folder


def load(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load with stock transformers, insisting that every tensor was found and nothing was left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits ``[rows, tokens, vocabulary]`` in float64."""
    return model(ids, **inputs).logits.double()


def off(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return ((before - after).abs().max() / before.abs().max()).item()


def doubled(sizes: Sizes) -> Sizes:
    """Twice the width, the FFN and the heads."""
    return sizes.replace(
        hidden_size=2 * sizes.hidden_size,
        intermediate_size=2 * sizes.intermediate_size,
        num_attention_heads=2 * sizes.num_attention_heads,
        num_key_value_heads=2 * sizes.num_key_value_heads,
    )


def draw_target(family: Family, config: dict, dimension: str, draw: random.Random) -> Sizes:
    """Random legal sizes that grow one dimension, or all of them."""
    source = Sizes.from_config(family, config)
    for _ in range(500):
        target = _drawn(family, config, source, dimension, draw)
        if any(
            getattr(target, word) < getattr(source, word) for word in ("num_attention_heads", "hidden_size")
        ):
            continue
        try:
            check_legal(family, config, target)
            lay_out_heads(source, target)
        except SizeError:
            continue
        if target != source:
            return target
    raise AssertionError(f"no legal {dimension} found for {family.name}")


def _drawn(family: Family, config: dict, source: Sizes, dimension: str, draw: random.Random) -> Sizes:
    changes: dict[str, int] = {}
    heads, kv_heads = source.num_attention_heads, source.num_key_value_heads
    if dimension in ("ffn", "all"):
        changes["intermediate_size"] = source.intermediate_size + draw.randint(
            1, 2 * source.intermediate_size
        )
    if dimension == "heads":
        changes["num_attention_heads"] = heads + draw.randint(1, 6) * kv_heads
    if dimension in ("kv_heads", "all"):
        changes["num_key_value_heads"] = draw.randint(kv_heads, 3 * kv_heads)
        changes["num_attention_heads"] = changes["num_key_value_heads"] * draw.randint(1, 4)
    if dimension in ("hidden", "all"):
        changes["hidden_size"] = source.hidden_size + draw.randint(1, 2 * source.hidden_size)
    if dimension in ("layers", "all", "coupled") and family.keeps_stream(config):
        least = 1 if dimension == "layers" else 0
        changes["num_hidden_layers"] = source.num_hidden_layers + draw.randint(least, 4)
    if dimension == "coupled":
        group = heads // kv_heads
        more = kv_heads + draw.randint(1, 4)
        changes["num_key_value_heads"], changes["num_attention_heads"] = more, more * group
        changes["hidden_size"] = more * group * source.head_dim
        changes["intermediate_size"] = source.intermediate_size + draw.randint(0, 9)
    return source.replace(**changes)


def dimensions_of(family: str, variant: str) -> tuple[str, ...]:
    """What can grow by itself: where head_dim follows from the other two, they grow together."""
    table = load_family(family)
    layers = ("layers",) if table.keeps_stream(PICO[family][variant]) else ()
    coupled = table.head_dim == "derived" or variant in ("qk-layernorm", "longrope")
    return (*layers, "ffn", "coupled") if coupled else DIMENSIONS


def grow_or_nearest(source: Checkpoint, out: Path, target: Sizes, method: str) -> Path:
    """Grow to ``target``; where no exact growth exists, to what the refusal offers instead.

    Only a stream under LayerNorm is ever refused: with a tied table (then it is untied), or read outside a norm
    (then it takes the next whole multiple).
    """
    try:
        return grow(source, out, target, method=method)
    except (RecipeError, SizeError) as error:
        refusal = str(error)
    assert source.family.norm == "layer"
    assert target.hidden_size != source.sizes.hidden_size
    if "--untie" in refusal:
        assert target.tied
        return grow_or_nearest(source, out, target.replace(tied=False), method)
    assert "whole multiple" in refusal
    assert not source.family.holds(source.family.norm_on_read, source.config)
    whole = 2 * source.sizes.hidden_size
    heads = whole // source.sizes.head_dim
    assert target.hidden_size != whole or method != "hypercloning"
    doubled = target.replace(hidden_size=whole, num_attention_heads=heads, num_key_value_heads=heads)
    return grow_or_nearest(source, out, doubled, "hypercloning")
