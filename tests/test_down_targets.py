"""The search for a smaller size: what users type, and the candidates for a number of parameters."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

import pico
from configs import GEMMA3, PYTHIA, QWEN3, REAL, SMOLLM2, pico_config, sizes_of, total
from dslm.checkpoint.config import resized_config
from dslm.checkpoint.oracle import expected_shapes
from dslm.errors import SizeError
from dslm.families import family_names, load_family
from dslm.plan import plan_shrink
from dslm.sizes import Sizes, check_legal, count_parameters
from dslm.targets import like
from dslm.targets_down import (
    divided,
    parse_divisor,
    parse_share,
    shrink_candidates,
)

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)

# ---------------------------------------------------------------- what users type


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("2", 2), ("1.5", Fraction(3, 2)), ("4/3", Fraction(4, 3)), ("2.0", 2)]
)
def test_a_divisor_is_exact(text, value):
    assert parse_divisor(text) == value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("two", "not a number"), ("", "not a number"), ("nan", "not a number"), ("1/0", "not a number"),
        ("0", "not positive"), ("-2", "not positive"), ("0.5", "dslm up"), ("2000", "at most"),
        ("1e999999999", "not a number"),
    ],
)  # fmt: skip
def test_what_is_no_divisor_is_refused(text, named):
    with pytest.raises(SizeError) as caught:
        parse_divisor(text)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("0.8", Fraction(4, 5)), ("4/5", Fraction(4, 5)), ("1e-2", Fraction(1, 100))]
)
def test_a_share_is_exact(text, value):
    assert parse_share(text) == value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("most", "not a number"), ("", "not a number"), ("nan", "not a number"), ("80%", "not a number"),
        ("0", "not positive"), ("-0.5", "not positive"), ("1", "dslm up"), ("1.2", "dslm up"),
    ],
)  # fmt: skip
def test_what_is_no_share_is_refused(text, named):
    with pytest.raises(SizeError) as caught:
        parse_share(text)
    assert named in str(caught.value)


# ---------------------------------------------------------------- divisors and other models

DIVIDED = [
    # config, hidden by, FFN by -> hidden, FFN, layers, heads, kv heads
    (SMOLLM2, "1", "1", (576, 1536, 30, 9, 3)),
    (SMOLLM2, "1", "1.5", (576, 1024, 30, 9, 3)),
    (SMOLLM2, "1.5", "2", (384, 768, 30, 6, 2)),
    (SMOLLM2, "3", "3", (192, 512, 30, 3, 1)),
    (SMOLLM2, "2", "1", (288, 1536, 30, 6, 2)),  # 4.5 heads are none: 2 groups are as near as 1, and more
    (SMOLLM2, "9/8", "1", (512, 1536, 30, 4, 2)),  # no multiple of 3 divides 512: the group has to shrink too
    (QWEN3, "2", "2", (512, 1536, 28, 8, 4)),
    (QWEN3, "4/3", "1", (768, 3072, 28, 12, 6)),
    (PYTHIA, "2", "2", (256, 1024, 6, 4, 4)),
    (PYTHIA, "8/5", "1", (320, 2048, 6, 5, 5)),
    (GEMMA3, "2", "1", (320, 2048, 18, 4, 1)),
]


@pytest.mark.parametrize(("config", "hidden", "ffn", "expected"), DIVIDED)
def test_divisors_divide_widths_and_heads_and_keep_the_rest(config, hidden, ffn, expected):
    family = load_family(config["model_type"])
    target = divided(family, config, parse_divisor(hidden), parse_divisor(ffn))
    assert tuple(getattr(target, word) for word in SHAPE) == expected
    source = sizes_of(config)
    assert target == source.replace(**dict(zip(SHAPE, expected, strict=True)))
    check_legal(family, config, target)


@pytest.mark.parametrize(
    ("config", "hidden", "ffn", "named"),
    [
        (SMOLLM2, "1.7", "1", "hidden_size 576 divided by 17/10.*nearest: 320 .* or 384 .divided by 1.5"),
        (SMOLLM2, "1.001", "1", "nearest: 512"),
        (SMOLLM2, "1", "1.7", "intermediate_size 1536 divided by 17/10.*nearest: 896 .* or 960"),
        (SMOLLM2, "601", "1", "hidden_size.*nearest: 1 "),
        (PYTHIA, "1.6", "1.3", "intermediate_size.*nearest"),
        (PYTHIA, "16/15", "1", "hidden_size 480.*nearest legal hidden_size: (448|512) or"),
    ],
)
def test_a_divisor_that_gives_no_legal_width_offers_those_that_do(config, hidden, ffn, named):
    with pytest.raises(SizeError) as caught:
        divided(load_family(config["model_type"]), config, Fraction(hidden), Fraction(ffn))
    assert re.search(named, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", family_names())
def test_half_is_legal_in_every_family(name):
    family = load_family(name)
    for variant in pico.PICO[name]:
        config = pico_config(name, variant)
        source = Sizes.from_config(family, config)
        target = divided(family, config, Fraction(2), Fraction(2))
        assert (target.hidden_size, target.intermediate_size) == (16, 24)
        assert target.head_dim == source.head_dim
        check_legal(family, config, target)
        assert expected_shapes(target.into_config(family, config))


def test_like_takes_the_shape_of_the_other_model_with_its_layers():
    source = sizes_of(SMOLLM2)
    shape = dict(zip(SHAPE, (384, 1024, 20, 6, 2), strict=True))
    other = source.replace(**shape, vocab_size=1000, tied=False)
    assert like(source, other) == source.replace(**shape)


def test_like_refuses_another_head_dim():
    source = sizes_of(SMOLLM2)
    with pytest.raises(SizeError, match="rotary"):
        like(source, source.replace(head_dim=128))


# ---------------------------------------------------------------- a number of parameters

SHARES = [0.99, 0.85, 0.7, 0.5, 0.3]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("config", REAL.values(), ids=REAL)
def test_candidates_are_legal_smaller_near_exact_and_ranked(config, share):
    family = load_family(config["model_type"])
    now = total(config)
    wanted = round(share * now)
    found = shrink_candidates(family, config, wanted)
    assert 1 <= len(found) <= 8
    assert len({c.sizes for c in found}) == len(found)
    for candidate in found:
        plan = plan_shrink("m", family, config, candidate.sizes)  # legal, and within reach
        assert plan.methods
        exact = count_parameters(family, candidate.sizes.into_config(family, config))["total"]
        assert candidate.parameters == exact < now
        assert candidate.off == pytest.approx(exact / wanted - 1)
    ranks = [(abs(c.off) > 0.01, c.score) for c in found]
    assert ranks == sorted(ranks)
    assert abs(found[0].off) < 0.02 or config is GEMMA3  # without its layers only the stream has much to give


def test_mild_cuts_take_layers_and_units_and_leave_heads_and_stream():
    """On SmolLM2-135M, 15 % smaller, a tenth of the layers and an eighth of the units measured best."""
    best = shrink_candidates(load_family("llama"), SMOLLM2, round(0.85 * total(SMOLLM2)))[0].sizes
    assert (best.hidden_size, best.num_attention_heads, best.num_key_value_heads) == (576, 9, 3)
    assert 26 <= best.num_hidden_layers <= 28
    assert 1280 <= best.intermediate_size <= 1408


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "config"), [("llama", SMOLLM2), ("gpt_neox", PYTHIA)], ids=["llama", "gpt_neox"]
)
def test_the_search_ends_early_with_what_all_shapes_would_give(name, config, share):
    wanted = round(share * total(config))
    every = shrink_candidates(load_family(name), config, wanted, count=10**6)
    assert len(every) > 6
    assert shrink_candidates(load_family(name), config, wanted, count=6) == every[:6]


@pytest.mark.parametrize("name", family_names())
def test_every_pico_model_has_candidates_that_can_be_planned(name):
    for variant in pico.PICO[name]:
        config = pico_config(name, variant)
        family = load_family(name)
        for untie in (False, True):
            try:
                found = shrink_candidates(family, config, round(0.7 * total(config)), count=20, untie=untie)
            except SizeError as error:
                assert "too few" in str(error)  # noqa: PT017  (one of both is right)
                continue
            for candidate in found:
                plan_shrink("m", family, config, candidate.sizes)
                layers = tuple(range(candidate.sizes.num_hidden_layers))
                assert expected_shapes(resized_config(family, config, candidate.sizes, layers))


def test_count_and_untie_are_obeyed():
    family = load_family("llama")
    found = shrink_candidates(family, SMOLLM2, round(0.8 * total(SMOLLM2)), count=3, untie=True)
    assert len(found) == 3
    assert all(not c.sizes.tied for c in found)


@pytest.mark.parametrize("extra", [0, 1, 10**12])
def test_a_target_that_is_not_smaller_points_to_up(extra):
    with pytest.raises(SizeError, match=r"not smaller than the source's 134,515,008.*dslm up"):
        shrink_candidates(load_family("llama"), SMOLLM2, total(SMOLLM2) + extra)


@pytest.mark.parametrize("wanted", [1, 1000, 3_000_000])
def test_a_target_below_the_table_and_a_layer_is_refused(wanted):
    with pytest.raises(SizeError, match=r"too few: a table of 49,152 x 64 and 1 layer.*3,162,496"):
        shrink_candidates(load_family("llama"), SMOLLM2, wanted)
    assert shrink_candidates(load_family("llama"), SMOLLM2, 3_162_496)
