"""The maps against brute-force float64: no transformers, no rounding but float64's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from dslm.errors import RecipeError, SizeError
from dslm.families import load_family
from dslm.grow.apply import grown_rows, random_for
from dslm.grow.axis_map import AxisMap, concatenated, copies, identity, merged, padded, weighted_copies
from dslm.grow.heads import lay_out_heads
from dslm.grow.maps import build_growth
from dslm.grow.split import even, noise, split_columns, split_named, uneven
from dslm.plan import plan_growth
from dslm.sizes import Sizes

LAYERS = 2
VOCAB = 40


def config_of(name: str, tied: bool) -> dict:
    config = {
        "model_type": name,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
    }
    return config if name == "phi" else config | {"head_dim": 6}


def random_weights(family, config) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    weights = {}
    for name, tensor in family.layout(config).items():
        values = draw.standard_normal(tensor.shape)
        weights[name] = 1.0 + 0.3 * values if name.endswith("norm.weight") else 0.5 * values
    return weights


def grow(family, config, weights, target: Sizes, **options) -> dict[str, np.ndarray]:
    """Grow arrays in memory through the same code that grows files."""
    plan = plan_growth("m", family, config, target, **options)
    growth = build_growth(family, config, plan, torch.float64)
    grown = {}
    for name, tensor in family.layout(target.into_config(family, config)).items():
        source = torch.from_numpy(weights.get(name, weights[family.embedding]))
        pieces = grown_rows(
            tensor,
            growth.tensor_map(tensor),
            len(source),
            lambda start, stop, source=source: source[start:stop].clone(),
            torch.float64,
            split_named(plan.split, plan.snr_db),
            plan.seed,
        )
        grown[name] = torch.cat(list(pieces)).numpy()
        assert grown[name].shape == tensor.shape
    return grown


def worst(name, config, target, **options) -> float:
    """Largest logit difference, relative to the largest logit, between source and grown model."""
    family = load_family(name)
    source = Sizes.from_config(family, config)
    weights = random_weights(family, config)
    grown = grow(family, config, weights, target, **options)
    ids = np.random.default_rng(2).integers(0, VOCAB, 9)
    before = reference.LOGITS[name](weights, ids, shape(source), layers=LAYERS)
    after = reference.LOGITS[name](grown, ids, shape(target), layers=LAYERS)
    return float(np.abs(before - after).max() / np.abs(before).max())


def shape(sizes: Sizes) -> reference.Shape:
    return reference.Shape(
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_attention_heads,
        sizes.num_key_value_heads,
        sizes.head_dim,
    )


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["llama", "olmo2", "phi"]),
    tied=st.booleans(),
    method=st.sampled_from(["hypercloning", "padding"]),
    split=st.sampled_from(["uneven", "even"]),
    hidden=st.integers(24, 80),
    intermediate=st.integers(20, 70),
    kv_heads=st.integers(2, 5),
    group=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_any_growth_is_exact_in_float64(
    name, tied, method, split, hidden, intermediate, kv_heads, group, seed
):
    tied = tied and name != "phi"  # a tied table under LayerNorm takes whole multiples only
    config = config_of(name, tied)
    source = Sizes.from_config(load_family(name), config)
    target = source.replace(
        hidden_size=hidden, intermediate_size=intermediate, num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
    )  # fmt: skip
    try:
        error = worst(name, config, target, method=method, split=split, seed=seed)
    except SizeError:
        fits = group * (kv_heads // 2) >= 2 and kv_heads * group >= 4
        divides = name != "llama" or hidden % (kv_heads * group) == 0
        assert not (fits and divides), "refused although the heads fit and the config class accepts"
        return
    assert error < 1e-12


@pytest.mark.parametrize("split", ["uneven", "even"])
@pytest.mark.parametrize("width", [21, 33, 40, 61, 100])
def test_net2net_is_exact_in_float64(split, width):
    config = config_of("llama", True)
    source = Sizes.from_config(load_family("llama"), config)
    target = source.replace(intermediate_size=width)
    assert worst("llama", config, target, method="net2net", split=split, seed=3) < 1e-12


def test_net2net_draws_from_its_seed():
    family, config = load_family("llama"), config_of("llama", True)
    source = Sizes.from_config(family, config)
    draws = [
        build_growth(
            family, config,
            plan_growth("m", family, config, source.replace(intermediate_size=40), method="net2net", seed=seed),
            torch.float64,
        ).maps["intermediate"].source
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize("word", ["hidden_size", "num_attention_heads"])
def test_net2net_refuses_what_it_cannot_keep(word):
    config = config_of("llama", True)
    source = Sizes.from_config(load_family("llama"), config)
    target = source.replace(**{word: 2 * getattr(source, word)})
    with pytest.raises(RecipeError, match="FFN only"):
        worst("llama", config, target, method="net2net")


def test_noise_keeps_the_function_to_float64_rounding_and_moves_the_copies():
    config = config_of("llama", True)
    source = Sizes.from_config(load_family("llama"), config)
    target = source.replace(hidden_size=48, intermediate_size=40)
    assert worst("llama", config, target, snr_db=5.0) < 1e-12


# ---- single maps


def encoder(axis: AxisMap) -> np.ndarray:
    """The matrix ``Enc [target, source]`` that a map stands for, for writers; new entries write zero."""
    matrix = np.zeros((axis.target, axis.size))
    matrix[np.arange(axis.target), axis.source] = np.where(axis.new, 0.0, axis.amplitude)
    return matrix


@given(size=st.integers(1, 30), extra=st.integers(0, 90))
def test_weighted_copies_keep_the_mean_square(size, extra):
    target = size + extra
    enc = encoder(weighted_copies(np.arange(target) % size, size))
    assert np.abs(enc.T @ enc - target / size * np.eye(size)).max() < 1e-12 * target


@given(size=st.integers(1, 30), extra=st.integers(0, 90))
def test_padding_keeps_the_mean_square_and_tiles_keep_the_mean(size, extra):
    target = size + extra
    tiles = target // size
    axis = padded(size, target, tiles=tiles, new_writes=False, normed=True)
    enc = encoder(axis)
    np.testing.assert_allclose(enc.T @ enc, target / size * np.eye(size), atol=1e-12 * target)
    assert np.ptp(enc.sum(axis=0)) < 1e-12


def test_integer_multiples_are_the_papers_cloning():
    axis = weighted_copies(np.arange(12) % 4, 4)
    assert np.array_equal(axis.source, [0, 1, 2, 3] * 3)
    assert np.array_equal(axis.amplitude, np.ones(12))


def test_unweighted_fractional_copies_would_be_wrong():
    axis = weighted_copies(np.arange(6) % 4, 4)
    assert np.allclose(axis.amplitude, np.sqrt(6 / 4 / np.array([2, 2, 1, 1, 2, 2])))


def test_merged_axes_are_outermost_first():
    heads = copies(np.array([0, 1, 0]), 2)
    axis = merged([heads, identity(3)])
    assert axis.source.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    fused = concatenated([axis, identity(2)])
    assert fused.source.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7]


@pytest.mark.parametrize(
    ("before", "after", "heads", "kv_heads"),
    [
        ((4, 2), (8, 4), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]),  # whole tiles
        ((4, 2), (8, 2), [0, 1, 0, 1, 2, 3, 2, 3], [0, 1]),  # kept keys: copies stay in their group
        ((4, 1), (4, 2), [0, 1, 2, 3], [0, 0]),  # one group split over two copies of its key
        ((4, 2), (6, 2), [0, 1, 0, 2, 3, 2], [0, 1]),
        ((4, 2), (6, 3), [0, 1, 2, 3, 0, 1], [0, 1, 0]),
    ],
)
def test_heads_stay_with_copies_of_their_keys(before, after, heads, kv_heads):
    base = Sizes(32, 8, 1, *before, 8, 10, tied=True)
    layout = lay_out_heads(base, base.replace(num_attention_heads=after[0], num_key_value_heads=after[1]))
    assert layout.heads.tolist() == heads
    assert layout.kv_heads.tolist() == kv_heads


def test_heads_that_do_not_fit_are_refused_with_counts_that_do():
    base = Sizes(32, 8, 1, 6, 2, 8, 10, tied=True)
    with pytest.raises(SizeError, match="cannot hold") as error:
        lay_out_heads(base, base.replace(num_attention_heads=6, num_key_value_heads=3))
    offered = [(8, 2), (6, 2), (8, 4)]
    assert any(
        f"num_key_value_heads {kv} with num_attention_heads {h}" in str(error.value) for h, kv in offered
    )
    for heads, kv_heads in ((6, 2), (8, 4)):
        lay_out_heads(base, base.replace(num_attention_heads=heads, num_key_value_heads=kv_heads))


# ---- splits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("split", [uneven, even], ids=["uneven", "even"])
@pytest.mark.parametrize("count", range(1, 10))
def test_parts_sum_to_the_weight_bit_for_bit(dtype, split, count):
    weights = (torch.randn(64, 50, generator=torch.Generator().manual_seed(count)) ** 3).to(dtype)
    axis = copies(np.tile(np.arange(50), count), 50)
    parts = split_columns(weights.float(), axis, split, dtype, random_for(0, "w", count))
    assert parts.dtype == dtype
    total = parts.double().view(64, count, 50).sum(dim=1)
    assert torch.equal(total, weights.double())


def test_uneven_parts_differ_and_even_parts_do_not():
    weights = torch.randn(32, 40)
    axis = copies(np.tile(np.arange(40), 2), 40)
    for split, equal in ((uneven, False), (even, True)):
        parts = split_columns(weights, axis, split, torch.float32, random_for(0, "w", 0)).view(32, 2, 40)
        assert torch.equal(parts[:, 0], parts[:, 1]) is equal
        assert (parts[:, 0].abs() >= parts[:, 1].abs()).all()


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_noise_has_the_level_that_was_asked_for(snr_db):
    weights = torch.randn(200, 500)
    axis = copies(np.tile(np.arange(500), 2), 500)
    parts = split_columns(weights, axis, noise(snr_db), torch.float32, random_for(0, "w", 0)).view(
        200, 2, 500
    )
    difference = (parts[:, 0] - weights / 2).square().mean()
    assert 10 * torch.log10((weights / 2).square().mean() / difference).item() == pytest.approx(
        snr_db, abs=0.2
    )
    torch.testing.assert_close(parts.sum(dim=1), weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "snr_db"), [("odd", None), ("noise", None), ("noise", float("nan"))])
def test_unknown_splits_are_refused(name, snr_db):
    with pytest.raises(RecipeError):
        split_named(name, snr_db)
