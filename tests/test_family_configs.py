"""What every family's table reads from a config, refuses in it, and writes back into it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig

import pico
from dslm.checkpoint.oracle import check_against_oracle, expected_shapes
from dslm.errors import CheckpointError, UnsupportedFamilyError
from dslm.families import family_of, load_family
from dslm.sizes import Sizes, differing, kv_cache_bytes_per_token
from tables import FAMILIES, every_family, every_variant, plain_config, shapes_of

# ---------------------------------------------------------------- configs


@every_variant
def test_check_config_accepts_what_the_class_writes(name, variant, tmp_path):
    config = pico.make_config(name, variant)
    family = load_family(name)
    for written in (config.to_dict(), config.to_diff_dict(), plain_config(name, variant)):
        family.check_config(written)
        assert family_of({**written, "architectures": [family.architecture]}) is family
        assert Sizes.from_config(family, written).num_attention_heads == config.num_attention_heads


@every_family
def test_the_table_knows_every_key_of_the_class(name):
    written = AutoConfig.for_model(name).to_dict()
    unknown = {k for k, v in written.items() if v is not None} - load_family(name).known_keys
    assert not unknown


REFUSED_KEYS = [
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ({"zeta_scale": 2.0}, "zeta_scale"),
    ({"num_experts": 0}, "num_experts"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 32.0}, "hidden_size"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
]


@every_family
@pytest.mark.parametrize(("keys", "named"), REFUSED_KEYS)
def test_check_config_refuses_by_name(name, keys, named):
    config = plain_config(name, next(iter(pico.PICO[name]))) | keys
    with pytest.raises(UnsupportedFamilyError, match=named):
        load_family(name).check_config(config)


@every_family
def test_check_config_refuses_values_that_the_table_excludes(name):
    family = load_family(name)
    config = plain_config(name, next(iter(pico.PICO[name])))
    for key, allowed in family.only.items():
        family.check_config(config | {key: None})
        for value in allowed:
            family.check_config(config | {key: value})
        for other in ({True, False, 2, 3} if isinstance(allowed[0], bool) else {2, 0.5}) - set(allowed):
            with pytest.raises(UnsupportedFamilyError, match=key):
                family.check_config(config | {key: other})


@pytest.mark.parametrize("length", [0, 2, 4])
@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in FAMILIES for key in load_family(name).per_layer]
)
def test_check_config_refuses_a_list_of_the_wrong_length(name, key, length):
    config = plain_config(name, next(iter(pico.PICO[name])))
    with pytest.raises(UnsupportedFamilyError, match=f"{key}.* {length} entries for 3 layers"):
        load_family(name).check_config(config | {key: ["full_attention"] * length})


def test_families_with_layer_lists_declare_them():
    for name in FAMILIES:
        written = AutoConfig.for_model(name).to_dict()
        lists = {k for k, v in written.items() if isinstance(v, list) and k not in ("eos_token_id",)}
        assert lists <= set(load_family(name).per_layer), name


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}, {"model_type": "gpt2"}])
def test_unknown_families_are_refused_with_a_hint(config):
    with pytest.raises(UnsupportedFamilyError) as caught:
        family_of(config)
    assert caught.value.hint


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(UnsupportedFamilyError, match=r"'t5'.*llama.*smollm3"):
        load_family("t5")


@every_family
def test_ignored_tensors_are_no_part_of_any_model(name):
    family = load_family(name)
    for variant in pico.PICO[name]:
        assert not [n for n in expected_shapes(plain_config(name, variant)) if family.is_ignored(n)]
    for pattern in family.ignored:
        assert family.is_ignored(pattern.replace("*", "7"))


def test_the_oracle_refuses_a_tensor_of_another_shape_or_name():
    config = plain_config("llama", "mha")
    right = shapes_of("llama", config)
    check_against_oracle(config, right)
    gain = "model.norm.weight"
    for wrong in (
        right | {gain: (31,)},
        right | {"extra": (1,)},
        {k: v for k, v in right.items() if k != gain},
    ):
        with pytest.raises(CheckpointError, match="in transformers"):
            check_against_oracle(config, wrong)


# ---------------------------------------------------------------- key-value cache


@every_variant
def test_cache_bytes_are_those_of_a_real_cache(name, variant):
    model = pico.make_model(name, variant)
    sizes = Sizes.from_config(load_family(name), plain_config(name, variant))

    def cached(length: int) -> int:
        with torch.no_grad():
            cache = model(pico.tokens(rows=1, length=length), use_cache=True).past_key_values
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert cached(4) - cached(3) == kv_cache_bytes_per_token(sizes, itemsize=4)
    assert kv_cache_bytes_per_token(sizes, itemsize=2) * 2 == kv_cache_bytes_per_token(sizes, itemsize=4)


# ---------------------------------------------------------------- sizes <-> config

INTO_CONFIG = [
    # family, config keys over the base, sizes asked for, keys that change
    ("llama", {}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("llama", {"num_key_value_heads": 2}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": None}, {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64},
     {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}),
    ("llama", {"head_dim": None}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("llama", {"head_dim": None}, {"hidden_size": 64}, {"hidden_size": 64, "head_dim": 8}),
    ("llama", {"head_dim": 8}, {"hidden_size": 64}, {"hidden_size": 64}),
    ("qwen2", {"num_key_value_heads": 2}, {"hidden_size": 48}, {"hidden_size": 48, "head_dim": 8}),
    ("qwen2", {"num_key_value_heads": 2}, {"num_attention_heads": 64}, {"num_attention_heads": 64, "head_dim": 8}),
    ("qwen2", {"num_key_value_heads": 2}, {"tied": True}, {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": True}, {"tied": False}, {"tie_word_embeddings": False}),
    ("gemma", {"head_dim": 8, "num_key_value_heads": 2}, {"tied": False}, {"tie_word_embeddings": False}),
    ("opt", {}, {"intermediate_size": 99}, {"ffn_dim": 99}),
    ("opt", {"word_embed_proj_dim": 32}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8, "word_embed_proj_dim": 64}),
    ("opt", {"word_embed_proj_dim": None}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("opt", {"word_embed_proj_dim": 16}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("mistral", {"num_key_value_heads": 4}, {"intermediate_size": 50, "vocab_size": 97},
     {"intermediate_size": 50, "vocab_size": 97}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "asked", "changed"), INTO_CONFIG)
def test_into_config_changes_what_it_must_and_nothing_else(name, keys, asked, changed):
    family = load_family(name)
    base = plain_config(name, next(iter(pico.PICO[name])))
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        base.pop(key, None)
    config = {
        "zz_first": None,
        "_name_or_path": "x/y",
        **base,
        **keys,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    before = copy.deepcopy(config)
    sizes = Sizes.from_config(family, config).replace(**asked)
    edited = sizes.into_config(family, config)
    assert config == before, "the source's config was edited in place"
    assert edited == {**config, **changed}
    assert list(edited)[: len(config)] == list(config), "the order of keys changed"
    assert Sizes.from_config(family, edited) == sizes
    assert {word for word, _ in differing(Sizes.from_config(family, config), sizes).items()} == set(asked)


@every_variant
def test_into_config_of_the_same_sizes_is_the_same_config(name, variant):
    family = load_family(name)
    for config in (plain_config(name, variant), pico.make_config(name, variant).to_dict()):
        edited = Sizes.from_config(family, config).into_config(family, config)
        assert edited == config
        assert list(edited) == list(config)
