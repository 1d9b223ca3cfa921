"""Each rule of growing matters: with it the function is kept, and with it left out it is visibly not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dslm.checkpoint.reader import open_folder
from dslm.families import family
from dslm.families.axes import Role
from dslm.grow import axis_map, heads, hypercloning, maps, padding
from growing import grow, load, logits, off
from pico import make_model, save, tokens

WRONG = 1e-3


def without_amplitudes(monkeypatch):
    """Copies that are not weighted, and padding that is not scaled."""
    monkeypatch.setattr(hypercloning, "weighted_copies", axis_map.copies)


def without_padding_scale(monkeypatch):
    for module in (hypercloning, padding):
        whole = module.padded
        monkeypatch.setattr(
            module, "padded", lambda *a, whole=whole, **k: whole(*a, **{**k, "normed": False})
        )


def without_centring(monkeypatch):
    whole = hypercloning.padded
    monkeypatch.setattr(hypercloning, "padded", lambda *a, **k: whole(*a, **{**k, "centred": False}))


def with_tiled_queries(monkeypatch):
    """Query heads tiled whatever the key-value heads do."""

    def lay_out(source, target):
        layout = heads.lay_out_heads(source, target)
        tiled = np.arange(target.num_attention_heads) % source.num_attention_heads
        return dataclasses.replace(layout, heads=tiled)

    monkeypatch.setattr(hypercloning, "lay_out_heads", lay_out)


def without_factor(which: str) -> Callable:
    def change(monkeypatch):
        whole = maps._table_factors

        def factors(*args):
            table, final = whole(*args)
            return (1.0, final * table) if which == "table" else (table, 1.0)

        monkeypatch.setattr(maps, "_table_factors", factors)

    return change


def without_table_fields(**fields) -> Callable:
    def change(monkeypatch):
        whole = family.load_family
        monkeypatch.setattr(family, "load_family", lambda name: dataclasses.replace(whole(name), **fields))

    return change


def with_line(template: str, alter: Callable) -> Callable:
    """One line of the family's table altered."""

    def change(monkeypatch):
        whole = family.load_family

        def load_family(name):
            found = whole(name)
            specs = tuple(alter(spec) for spec in found.tensors[template])
            return dataclasses.replace(found, tensors={**found.tensors, template: specs})

        monkeypatch.setattr(family, "load_family", load_family)

    return change


def not_normed(spec):
    return dataclasses.replace(spec, axes=tuple(dataclasses.replace(a, normed=False) for a in spec.axes))


def as_role(role: Role) -> Callable:
    """Treat the first axis as having another role."""
    return lambda spec: dataclasses.replace(
        spec, axes=(dataclasses.replace(spec.axes[0], role=role), *spec.axes[1:])
    )


LAYER = "model.layers.{layer}."
NEOX = "gpt_neox.layers.{layer}."


@dataclass(frozen=True)
class Rule:
    family: str
    variant: str
    sizes: dict
    without: Callable
    method: str = "hypercloning"
    dtype: torch.dtype = torch.float64


RULES = {
    "weighted copies": Rule("llama", "gqa-tied", {"hidden_size": 48}, without_amplitudes),
    "scaled padding": Rule("llama", "gqa-tied", {"hidden_size": 48}, without_padding_scale, "padding"),
    "tied table": Rule("llama", "gqa-tied", {"hidden_size": 64}, without_factor("final")),
    "grouped queries": Rule("llama", "gqa-tied", {"num_attention_heads": 8}, with_tiled_queries),
    "norm over all heads, queries": Rule(
        "olmo2", "gqa-tied", {"num_attention_heads": 6},
        with_line(LAYER + "self_attn.q_proj.weight", not_normed),
    ),
    "norm over all heads, keys": Rule(
        "olmo2", "gqa-tied", {"num_attention_heads": 12, "num_key_value_heads": 3},
        with_line(LAYER + "self_attn.k_proj.weight", not_normed),
    ),
    "norm over all heads, bias": Rule(
        "olmo2", "biases", {"num_attention_heads": 6},
        with_line(LAYER + "self_attn.q_proj.bias", not_normed),
    ),
    "post-norm: what it scales": Rule("olmo2", "mha", {"hidden_size": 48}, without_amplitudes),
    "LayerNorm: centred stream": Rule("phi", "mha", {"hidden_size": 48}, without_centring),
    "LayerNorm: scaled bias": Rule(
        "phi", "mha", {"hidden_size": 48},
        with_line(LAYER + "input_layernorm.bias", as_role(Role.GAIN)),
    ),
    "LayerNorm: scaled final bias": Rule(
        "phi", "tied", {"hidden_size": 64}, without_factor("final"),
    ),
    "parallel blocks: the FFN writes the stream": Rule(
        "gpt_neox", "parallel", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6},
        with_line(NEOX + "mlp.dense_4h_to_h.weight", as_role(Role.SHIFT)),
    ),
    "parallel blocks: so does attention": Rule(
        "gpt_neox", "parallel", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6},
        with_line(NEOX + "attention.dense.weight", as_role(Role.SHIFT)),
    ),
    "sequential blocks": Rule(
        "gpt_neox", "sequential", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6},
        with_line(NEOX + "attention.dense.bias", as_role(Role.SHIFT)),
    ),
    "Gemma's embedding multiplier": Rule("gemma", "mqa", {"hidden_size": 64}, without_factor("table")),
    "Gemma's embedding multiplier, untied": Rule(
        "gemma", "mha-untied", {"hidden_size": 64}, without_table_fields(embedding_multiplier="none")
    ),
    "Gemma's 1 + gain": Rule("gemma2", "windows-softcaps", {"hidden_size": 64}, without_table_fields(gain_offset=0)),
    "norms on both sides": Rule("gemma3_text", "windows", {"hidden_size": 48}, without_amplitudes),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_rule_matters(rule, tmp_path, monkeypatch):
    save(make_model(rule.family, rule.variant, dtype=rule.dtype), tmp_path / "source")
    sizes = open_folder(tmp_path / "source").sizes.replace(**rule.sizes)
    before = logits(load(tmp_path / "source", rule.dtype), tokens(6))

    grow(tmp_path / "source", tmp_path / "with", sizes, method=rule.method)
    assert off(before, logits(load(tmp_path / "with", rule.dtype), tokens(6))) < 5e-6

    rule.without(monkeypatch)
    grow(tmp_path / "source", tmp_path / "without", sizes, method=rule.method)
    assert off(before, logits(load(tmp_path / "without", rule.dtype), tokens(6))) > WRONG


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemmas_multiplier_is_the_one_the_model_rounds_to(dtype):
    """sqrt(hidden) is rounded to the weights' dtype before it multiplies, and the table makes up for just that."""
    from dslm.families import load_family
    from dslm.grow.maps import build_growth
    from dslm.plan import plan_growth
    from dslm.sizes import Sizes

    config = {"model_type": "gemma", "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4}
    table = load_family("gemma")
    target = Sizes.from_config(table, config).replace(hidden_size=56)
    growth = build_growth(table, config, plan_growth("m", table, config, target), dtype)
    before, after = (torch.tensor(size**0.5).to(dtype).double() for size in (40, 56))
    assert growth.table_factor == pytest.approx((before / after).item(), rel=1e-12)
    assert growth.table_factor != pytest.approx((40 / 56) ** 0.5, rel=1e-5)
    assert growth.table_factor * growth.final_factor == pytest.approx(40 / 56, rel=1e-12)
