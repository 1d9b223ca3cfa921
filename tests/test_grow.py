"""Every family, every dimension, random legal sizes: the grown model is the same function in stock transformers."""

from __future__ import annotations

import random

import pytest
import torch

from dslm.checkpoint.reader import open_folder
from dslm.errors import RecipeError
from dslm.plan import METHOD_NAMES
from growing import dimensions_of, draw_target, grow, grow_or_nearest, load, logits, off
from pico import CASES, IDS, make_model, save, tokens

FLOAT64 = 5e-6  # norms and softmax of transformers round to float32 whatever the weights are
FLOAT32 = 2e-5

_GROWTHS = [
    pytest.param(family, variant, dimension, method, id=f"{family}-{variant}-{dimension}-{method}")
    for family, variant in CASES
    for dimension in dimensions_of(family, variant)
    for method in METHOD_NAMES
    if method == "hypercloning" or dimension != "layers"  # depth has one method
    if method != "net2net" or dimension == "ffn"
]


@pytest.mark.parametrize(("family", "variant", "dimension", "method"), _GROWTHS)
def test_growth_keeps_the_function_in_float64(family, variant, dimension, method, tmp_path):
    save(make_model(family, variant, dtype=torch.float64), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    draw = random.Random(f"{family}-{variant}-{dimension}-{method}")
    target = draw_target(source.family, source.config, dimension, draw)
    out = grow_or_nearest(source, tmp_path / "out", target, method)
    before, after = (load(folder, torch.float64) for folder in (tmp_path / "source", out))
    ids = tokens(1)
    assert after.num_parameters() > before.num_parameters()
    assert off(logits(before, ids), logits(after, ids)) < FLOAT64


@pytest.mark.parametrize(("family", "variant"), CASES, ids=IDS)
def test_growth_keeps_the_function_in_float32_however_it_is_asked(family, variant, tmp_path):
    """In one go: past the window, left padding, decoding from a cache, and after transformers saved it again."""
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    everything = dimensions_of(family, variant)[-1]
    target = draw_target(source.family, source.config, everything, random.Random(f"{family}-{variant}"))
    out = grow_or_nearest(source, tmp_path / "out", target, "hypercloning")
    before, after = (load(folder, torch.float32) for folder in (tmp_path / "source", out))
    ids = tokens(2, length=48)
    expected = logits(before, ids)
    assert off(expected, logits(after, ids)) < FLOAT32
    assert off(*(_left_padded(model, ids) for model in (before, after))) < FLOAT32
    assert off(expected[:, -6:], _decoded(after, ids, 6)) < FLOAT32
    save(after, tmp_path / "again")
    assert off(expected, logits(load(tmp_path / "again", torch.float32), ids)) < FLOAT32


def _left_padded(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = logits(model, ids, attention_mask=mask)
    return torch.cat([found[0, 7:], found[1]])


@torch.no_grad()
def _decoded(model, ids, steps):
    state = model(ids[:, :-steps], use_cache=True)
    found = []
    for i in range(ids.shape[1] - steps, ids.shape[1]):
        state = model(ids[:, i : i + 1], past_key_values=state.past_key_values, use_cache=True)
        found.append(state.logits.double())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=IDS)
def test_a_position_past_the_window_of_training_works_as_before(family, variant, tmp_path):
    """Rotary and sliding-window positions beyond max_position_embeddings; learned ones have an end."""
    if family == "opt":
        pytest.skip("OPT has learned positions only up to its maximum")
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(intermediate_size=100)
    out = grow(source, tmp_path / "out", target)
    ids = tokens(3, rows=1, length=80)
    before, after = (load(folder, torch.float32) for folder in (tmp_path / "source", out))
    assert off(logits(before, ids), logits(after, ids)) < FLOAT32


@pytest.mark.parametrize("split", [{"split": "even"}, {"split": "uneven"}, {"snr_db": 10.0}], ids=str)
def test_every_split_keeps_the_function(split, tmp_path):
    save(make_model("llama", "gqa-tied", dtype=torch.float64), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(
        hidden_size=96, intermediate_size=100, num_attention_heads=12, num_key_value_heads=6
    )
    out = grow(source, tmp_path / "out", target, **split)
    before, after = (load(folder, torch.float64) for folder in (tmp_path / "source", out))
    assert off(logits(before, tokens(4)), logits(after, tokens(4))) < FLOAT64


@pytest.mark.parametrize("tied", ["gqa-tied", "mha"])
def test_bfloat16_doubling_adds_up_bit_for_bit(tied, tmp_path):
    """A whole multiple of a bf16 model: every reader's copies sum to the source's weight, nothing is rounded."""
    save(make_model("llama", tied, dtype=torch.bfloat16), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    sizes = source.sizes
    target = sizes.replace(hidden_size=64, intermediate_size=96, num_attention_heads=8,
                           num_key_value_heads=2 * sizes.num_key_value_heads)  # fmt: skip
    grown = open_folder(grow(source, tmp_path / "out", target))
    assert grown.dtype == "BF16"
    for name, tensor in grown.family.layout(grown.config).items():
        if tensor.part == "norm" or name == "model.embed_tokens.weight":
            continue
        small = source.read_rows(name, 0, source.entries[name].shape[0]).double()
        large = grown.read_rows(name, 0, tensor.shape[0]).double()
        rows, columns = large.shape[0] // small.shape[0], large.shape[1] // small.shape[1]
        folded = large.view(rows, small.shape[0], columns, small.shape[1]).sum(dim=2)
        assert torch.equal(folded, small.expand_as(folded)), name


def test_a_tied_model_stays_tied_and_untie_adds_one_table(tmp_path):
    save(make_model("llama", "gqa-tied", dtype=torch.float64), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(hidden_size=48)
    tied = open_folder(grow(source, tmp_path / "tied", target))
    untied = open_folder(grow(source, tmp_path / "untied", target.replace(tied=False)))
    assert "lm_head.weight" not in tied.entries
    assert untied.entries["lm_head.weight"].shape == (96, 48)
    assert untied.config["tie_word_embeddings"] is False
    expected = logits(load(tmp_path / "source", torch.float64), tokens(5))
    for folder in ("tied", "untied"):
        assert off(expected, logits(load(tmp_path / folder, torch.float64), tokens(5))) < FLOAT64


def test_each_tensor_keeps_its_own_dtype_unless_one_is_asked_for(tmp_path):
    model = make_model("qwen3", "gqa-tied", dtype=torch.bfloat16)
    model.model.norm.float()
    save(model, tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(intermediate_size=60)
    kept = open_folder(grow(source, tmp_path / "kept", target))
    cast = open_folder(grow(source, tmp_path / "cast", target, dtype="F32"))
    assert kept.entries["model.norm.weight"].dtype == "F32"
    assert kept.entries["model.layers.0.mlp.up_proj.weight"].dtype == "BF16"
    assert {entry.dtype for entry in cast.entries.values()} == {"F32"}
    assert "float32" in (cast.config.get("dtype"), cast.config.get("torch_dtype"))


def test_numbers_too_large_for_float16_are_refused_by_name(tmp_path):
    model = make_model("llama", "gqa-tied")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    save(model, tmp_path / "source")
    source = open_folder(tmp_path / "source")
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        grow(source, tmp_path / "out", source.sizes.replace(intermediate_size=96), dtype="F16")
    assert not (tmp_path / "out").exists()
