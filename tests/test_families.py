"""The conformance suite: names, shapes and legal sizes of every family are those of the stock transformers class."""

from __future__ import annotations

import dataclasses
import re
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import pico
from dslm.checkpoint.oracle import expected_shapes
from dslm.errors import SizeError
from dslm.families import load_family
from dslm.families.family import PARTS
from dslm.sizes import Sizes, check_legal, count_parameters
from tables import FAMILIES, every_family, every_variant, plain_config, shapes_of


def test_every_family_has_tiny_models_with_and_without_its_switches():
    assert sorted(pico.PICO) == FAMILIES
    for name in FAMILIES:
        family = load_family(name)
        for template, alternatives in family.tensors.items():
            conditions = [spec.condition for spec in alternatives if spec.condition]
            for condition in conditions:
                held = {family.holds(condition, plain_config(name, v)) for v in pico.PICO[name]}
                assert held == {True, False}, f"{name}: {template} is never seen both ways of {condition!r}"


# ---------------------------------------------------------------- names, shapes, counts


@every_variant
def test_layout_is_what_transformers_saves(name, variant, tmp_path):
    model = pico.make_model(name, variant)
    pico.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    config = pico.read_config(tmp_path)
    assert shapes_of(name, config) == on_disk == expected_shapes(config)
    counts = count_parameters(load_family(name), config)
    assert counts["total"] == model.num_parameters() == sum(map(prod, on_disk.values()))
    assert counts["total"] == sum(counts[part] for part in PARTS)


@every_variant
def test_parts_are_counted_where_they_belong(name, variant):
    family, config = load_family(name), plain_config(name, variant)
    model = pico.make_model(name, variant)
    counts, sizes = count_parameters(family, config), Sizes.from_config(family, config)
    ffn = [p for n, p in model.named_parameters() if re.search(r"\.mlp\.|\.fc[12]\.", n)]
    norms = [p for n, p in model.named_parameters() if re.search(r"norm", n)]
    assert counts["ffn"] == sum(p.numel() for p in ffn)
    assert counts["norm"] == sum(p.numel() for p in norms)
    assert (counts["head"] == 0) == (sizes.tied and name != "phi"), "phi's output has a bias of its own"


@every_family
def test_the_default_model_of_the_class_is_the_default_of_the_table(name):
    assert shapes_of(name, {"model_type": name}) == expected_shapes({"model_type": name})


@every_family
def test_absent_keys_resolve_as_the_config_class_resolves_them(name):
    family = load_family(name)
    config_class = type(AutoConfig.for_model(name))
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    assert {key: declared.get(key) for key in family.defaults} == dict(family.defaults)
    resolved, parsed = family.resolve({"model_type": name}), AutoConfig.for_model(name)
    for key in family.size_keys.values():
        if key != "head_dim" or hasattr(parsed, "head_dim"):
            assert resolved[key] == getattr(parsed, key), key


@every_family
def test_a_null_size_is_derived_as_the_config_class_derives_it(name):
    family = load_family(name)
    config = plain_config(name, next(iter(pico.PICO[name])))
    for key in ("num_key_value_heads", "head_dim", "word_embed_proj_dim"):
        declared = {f.name: f for f in dataclasses.fields(type(AutoConfig.for_model(name)))}.get(key)
        if key not in family.size_keys.values() or declared is None or "None" not in str(declared.type):
            continue
        asked = config | {key: None}
        assert shapes_of(name, asked) == expected_shapes(asked), key


@every_family
def test_layout_has_every_tensor_once_and_in_the_order_of_the_model(name):
    family = load_family(name)
    for variant in pico.PICO[name]:
        layout = family.layout(plain_config(name, variant))
        layers = [t.layer for t in layout.values()]
        blocks = [layer for layer in layers if layer is not None]
        assert blocks == sorted(blocks)
        assert set(blocks) == set(range(3))
        templates = [template for template, _ in family.present(plain_config(name, variant))]
        assert len(templates) == len(set(templates)), "two alternatives of a line hold at once"
        assert family.embedding in layout
        assert (family.head in layout) == (not family.is_tied(plain_config(name, variant)))


# ---------------------------------------------------------------- random sizes


def shape_switches(name: str, variant: str) -> dict:
    """A variant's config without its per-layer lists, so that the number of layers is free."""
    config = plain_config(name, variant)
    return {key: value for key, value in config.items() if key not in load_family(name).per_layer}


@st.composite
def some_sizes(draw, name: str, *, grouped: bool):
    """Random sizes of a family; legal in its own extra rules only when ``grouped``."""
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 24]))
    heads = kv_heads * draw(st.integers(1, 3)) if grouped else draw(st.integers(1, 9))
    derived = name in ("opt", "gpt_neox")
    if grouped:
        kv_heads = heads if derived else kv_heads
        hidden = heads * (head_dim if derived else draw(st.sampled_from([4, 8, 12])))
    else:
        hidden = draw(st.one_of(st.integers(heads, 40), st.just(heads * head_dim)))
        kv_heads = draw(st.sampled_from([kv_heads, heads]))
    return Sizes(
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(8, 120)),
        tied=draw(st.booleans()),
    )


@every_family
@given(data=st.data())
def test_random_legal_sizes_are_what_transformers_builds_and_runs(name, data):
    family = load_family(name)
    config = shape_switches(name, data.draw(st.sampled_from(sorted(pico.PICO[name]))))
    if config.get("qk_layernorm") or config.get("rope_parameters"):
        config = {k: v for k, v in config.items() if k not in ("qk_layernorm", "rope_parameters")}
    sizes = data.draw(some_sizes(name, grouped=True))
    check_legal(family, config, sizes)
    edited = sizes.into_config(family, config)
    family.check_config(edited)
    assert Sizes.from_config(family, edited) == sizes
    expected = expected_shapes(edited)
    assert shapes_of(name, edited) == expected
    assert count_parameters(family, edited)["total"] == sum(map(prod, expected.values()))
    values = {key: value for key, value in edited.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values)).eval()
    assert model.num_parameters() == sum(map(prod, expected.values()))
    with torch.no_grad():
        assert model(torch.tensor([[3, 5, 4]])).logits.shape == (1, 3, sizes.vocab_size)


def _class_builds(config: dict) -> bool:
    try:
        expected_shapes(config)
    except SizeError:
        return False
    return True


def _breaks_our_rules(name: str, config: dict, sizes: Sizes) -> bool:
    """What no class checks when it is built, though its forward pass needs it."""
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    all_of_hidden = heads * sizes.head_dim == sizes.hidden_size
    if name in ("opt", "gpt_neox"):
        return heads != kv_heads or not all_of_hidden
    return heads % kv_heads != 0 or (bool(config.get("qk_layernorm")) and not all_of_hidden)


@every_family
@given(data=st.data())
def test_legality_is_the_config_class_and_our_rules(name, data):
    family = load_family(name)
    config = shape_switches(name, data.draw(st.sampled_from(sorted(pico.PICO[name]))))
    sizes = data.draw(some_sizes(name, grouped=data.draw(st.booleans())))
    if "rope_parameters" in config:
        sizes = sizes.replace(head_dim=Sizes.from_config(family, config).head_dim)  # its factors are per pair
    possible = not _breaks_our_rules(name, config, sizes)
    legal = possible and _class_builds(sizes.into_config(family, config))
    if legal:
        check_legal(family, config, sizes)
    else:
        with pytest.raises(SizeError) as caught:
            check_legal(family, config, sizes)
        assert caught.value.hint


ILLEGAL = [
    # family, variant, what is asked for, the word that the message must name
    ("llama", "gqa-tied", {"num_attention_heads": 8, "num_key_value_heads": 3}, "num_attention_heads"),
    ("llama", "gqa-tied", {"hidden_size": 34}, "hidden_size"),
    ("llama", "mha", {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
    ("llama", "gqa-tied", {"hidden_size": 3, "num_attention_heads": 4}, "hidden_size"),
    ("gemma2", "no-softcaps", {"hidden_size": 50}, "hidden_size"),
    ("gemma3_text", "windows", {"hidden_size": 46, "num_attention_heads": 6}, "hidden_size"),
    ("gpt_neox", "parallel", {"hidden_size": 44}, "hidden_size"),
    ("gpt_neox", "parallel", {"hidden_size": 3}, "hidden_size"),
    ("gpt_neox", "parallel", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("opt", "pre-norm", {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
    ("opt", "post-norm", {"hidden_size": 36}, "hidden_size"),
    ("phi", "qk-layernorm", {"hidden_size": 36}, "hidden_size"),
    ("phi", "gqa", {"num_attention_heads": 3}, "num_attention_heads"),
    ("phi3", "gqa-partial-rotary", {"num_attention_heads": 7}, "num_attention_heads"),
    ("mistral", "window", {"num_attention_heads": 1}, "num_attention_heads"),
    ("qwen2", "gqa-tied", {"num_attention_heads": 0}, "num_attention_heads"),
    ("qwen3", "mha", {"hidden_size": -32}, "hidden_size"),
    ("olmo2", "mha", {"intermediate_size": 0}, "intermediate_size"),
    ("smollm3", "biases", {"num_hidden_layers": 0}, "num_hidden_layers"),
]


@pytest.mark.parametrize(("name", "variant", "asked", "word"), ILLEGAL)
def test_a_refused_size_names_the_rule_and_its_nearest_values_are_legal(name, variant, asked, word):
    family, config = load_family(name), plain_config(name, variant)
    sizes = Sizes.from_config(family, config).replace(**asked)
    with pytest.raises(SizeError, match=word) as caught:
        check_legal(family, config, sizes)
    if "positive" in caught.value.hint:
        return
    suggestions = _suggestions(caught.value.hint)
    assert suggestions
    for suggestion in suggestions:
        changed = sizes.replace(**suggestion)
        if "num_key_value_heads" not in family.size_keys.values() and "num_attention_heads" in suggestion:
            changed = changed.replace(num_key_value_heads=changed.num_attention_heads)
        check_legal(family, config, changed)
        assert _class_builds(changed.into_config(family, config))


def _suggestions(hint: str) -> list[dict[str, int]]:
    """The alternatives that a hint offers: ``a 8 or 16`` and ``a 8 with b 2 or a 16 with b 4``."""
    found, word = [], ""
    for option in hint.split(": ")[-1].split(" or "):
        pairs = re.findall(r"([a-z_]+_[a-z_]+) (\d+)", option)
        word = pairs[0][0] if pairs else (re.findall(r"[a-z_]+_[a-z_]+", hint) or [word])[-1]
        numbers = re.findall(r"\d+", option)
        found.append({k: int(v) for k, v in pairs} if pairs else {word: int(numbers[0])})
    return found
