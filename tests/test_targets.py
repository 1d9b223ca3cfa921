"""The search for a size: what users type, and what the sources' proportions give."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest

import pico
from configs import GEMMA3, PYTHIA, QWEN3, REAL, SMOLLM2, pico_config, total
from dslm.checkpoint.oracle import expected_shapes
from dslm.errors import SizeError
from dslm.families import family_names, load_family
from dslm.plan import check_growth
from dslm.sizes import Sizes, check_legal
from dslm.targets import candidates, like, parse_count, parse_multiplier, scaled, with_hidden

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

# ---------------------------------------------------------------- what users type


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", Fraction(1)), ("2", Fraction(2)), ("1.5", Fraction(3, 2)), ("4/3", Fraction(4, 3)),
        ("1.1", Fraction(11, 10)), ("3/3", Fraction(1)), (" 2 ", Fraction(2)), ("1e0", Fraction(1)),
        ("2.0", Fraction(2)), ("15e-1", Fraction(3, 2)),
    ],
)  # fmt: skip
def test_a_multiplier_is_exact(text, value):
    assert parse_multiplier(text) == value


NO_MULTIPLIERS = [
    "0", "-1", "-2/3", "0.5", "x", "", " ", "2x", "x2", "1/0", "0/1", "nan", "inf", "-inf", "1,5", "2/1.5", "1e400",
    "1e99999", "--", "2 3", "0x2", "½",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_MULTIPLIERS)
def test_what_is_no_multiplier_is_refused_in_one_line(text):
    with pytest.raises(SizeError) as caught:
        scaled(load_family("llama"), SMOLLM2, parse_multiplier(text), Fraction(1))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("134515008", 134_515_008), ("360M", 360_000_000), ("1B", 10**9), ("1.5B", 1_500_000_000), ("1b", 10**9),
        ("7k", 7000), ("134_515_008", 134_515_008), ("134,515,008", 134_515_008), ("1e9", 10**9), ("0.5M", 500_000),
        ("1", 1), ("1,000.5k", 1_000_500),
    ],
)  # fmt: skip
def test_a_count_of_parameters_is_read(text, value):
    assert parse_count(text) == value


NO_COUNTS = [
    "0", "-1", "-1B", "x", "", " ", "B", "M", "1G", "1BB", "nan", "inf", "0M", "0.0001", "1/0", "1 2", "1e400",
    "1e400B", "9e99999", "1,5B", "15,5k", "1,23", ",5", "1,0000",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_COUNTS)
def test_what_is_no_count_is_refused_in_one_line(text):
    with pytest.raises(SizeError) as caught:
        candidates(load_family("llama"), SMOLLM2, parse_count(text))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# ---------------------------------------------------------------- candidates


def check_candidates(config: dict, wanted: int, **options) -> None:
    family = load_family(config["model_type"])
    source = Sizes.from_config(family, config)
    found = candidates(family, config, wanted, **options)
    assert found, "a growth always has some candidate"
    assert [c.score for c in found] == sorted(c.score for c in found)
    assert len({c.sizes for c in found}) == len(found) <= options.get("count", 8)
    for candidate in found:
        sizes = candidate.sizes
        check_legal(family, config, sizes)
        check_growth(source, sizes)
        assert all(getattr(sizes, word) >= getattr(source, word) for word in WIDTHS)
        edited = sizes.into_config(family, config)
        shapes = expected_shapes(edited)
        assert candidate.parameters == sum(map(prod, shapes.values())) == total(edited)
        assert candidate.off == pytest.approx(candidate.parameters / wanted - 1)
        step = candidate.friendly
        assert step in (1, 64, 128, 256)
        assert sizes.hidden_size % step == 0
        assert sizes.intermediate_size % step == 0
        assert sizes.tied == (source.tied and not options.get("untie", False))


@pytest.mark.parametrize("times", [1.03, 2.9])
@pytest.mark.parametrize(("name", "variant"), pico.CASES, ids=pico.IDS)
def test_candidates_of_every_family_are_legal_and_exactly_counted(name, variant, times):
    config = pico_config(name, variant)
    check_candidates(config, round(total(config) * times), count=4)


@pytest.mark.parametrize("times", [1.3, 2.7, 8])
@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_candidates_of_real_sizes_are_close_and_friendly(name, untie, times):
    config = REAL[name] | ({"tie_word_embeddings": False} if untie else {})
    family, wanted = load_family(config["model_type"]), round(total(config) * times)
    config = REAL[name]
    check_candidates(config, wanted, untie=untie)
    first = candidates(family, config, wanted, untie=untie)[0]
    assert abs(first.off) < 0.03
    assert first.friendly > 1
    source = Sizes.from_config(family, config)
    ratio = first.sizes.intermediate_size / first.sizes.hidden_size
    assert 0.5 < ratio / (source.intermediate_size / source.hidden_size) < 2, "the proportions are lost"


def test_the_source_itself_is_no_growth():
    config = SMOLLM2
    family = load_family("llama")
    source = Sizes.from_config(family, config)
    assert source not in [c.sizes for c in candidates(family, config, round(total(config) * 1.03), count=50)]
    with pytest.raises(SizeError, match="choose another number"):
        candidates(family, config, total(config))


def test_no_shape_is_offered_that_up_would_refuse():
    """A tied table under LayerNorm grows by whole multiples only, and not by padding; net2net widens the FFN only."""
    opt = {
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    family, wanted = load_family("opt"), round(total(opt) * 1.6)
    assert all(c.sizes.hidden_size % 768 == 0 for c in candidates(family, opt, wanted))
    assert any(c.sizes.hidden_size % 768 for c in candidates(family, opt, wanted, untie=True))
    olmo = {
        "model_type": "olmo",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    tied = olmo | {"tie_word_embeddings": True}
    assert {c.sizes.hidden_size for c in candidates(load_family("olmo"), tied, round(total(tied) * 1.3))} == {
        512
    }
    for method in ("padding", "net2net"):
        assert all(c.sizes.hidden_size == 768 for c in candidates(family, opt, wanted, method=method))


def test_an_untied_table_beyond_the_target_is_refused_or_approached_but_never_nothing():
    """Gemma's second table alone is more than half of the model."""
    family = load_family("gemma3_text")
    try:
        found = candidates(family, GEMMA3, round(total(GEMMA3) * 1.3), untie=True)
    except SizeError as error:
        assert error.hint  # noqa: PT017  (either answer is right)
    else:
        assert found


@pytest.mark.parametrize("share", [0.999, 0.5, 0.000001])
def test_fewer_parameters_than_the_source_point_to_down(share):
    with pytest.raises(SizeError, match=r"smaller than the source.*dslm down"):
        candidates(load_family("llama"), SMOLLM2, max(1, int(total(SMOLLM2) * share)))


@pytest.mark.parametrize("wanted", [10**11, 10**13, 10**18, 10**30])
def test_a_target_out_of_reach_is_refused_or_approached_but_never_breaks(wanted):
    """Out of reach means that nothing within eight times every width comes near."""
    family = load_family("llama")
    try:
        found = candidates(family, SMOLLM2, wanted)
    except SizeError as error:
        assert error.hint  # noqa: PT017  (either answer is right)
    else:
        assert found
        assert found[0].off > -0.5, "a shape that misses by more than half is no answer"


# ---------------------------------------------------------------- multipliers and other models

SCALED = [
    # config, hidden times, FFN times -> hidden, FFN, heads, kv heads
    (SMOLLM2, "2", "2", (1152, 3072, 18, 6)),
    (SMOLLM2, "1", "1.5", (576, 2304, 9, 3)),
    (SMOLLM2, "4/3", "1", (768, 1536, 12, 4)),
    (SMOLLM2, "5/3", "5/3", (960, 2560, 15, 5)),
    (QWEN3, "1.5", "1.5", (1536, 4608, 24, 12)),
    (QWEN3, "1.25", "1", (1280, 3072, 20, 10)),
    (PYTHIA, "1.5", "1.5", (768, 3072, 12, 12)),
    (GEMMA3, "2", "1", (1280, 2048, 8, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "hidden", "ffn", "expected"), SCALED)
def test_multipliers_scale_widths_and_heads_and_keep_the_rest(config, hidden, ffn, expected):
    family = load_family(config["model_type"])
    source = Sizes.from_config(family, config)
    target = scaled(family, config, parse_multiplier(hidden), parse_multiplier(ffn))
    assert tuple(getattr(target, word) for word in WIDTHS) == expected
    assert target == source.replace(**dict(zip(WIDTHS, expected, strict=True)))
    check_legal(family, config, target)


@pytest.mark.parametrize("name", family_names())
def test_one_and_a_half_is_legal_in_every_family(name):
    family = load_family(name)
    for variant in pico.PICO[name]:
        config = pico_config(name, variant)
        target = scaled(family, config, Fraction(3, 2), Fraction(3, 2))
        assert target.hidden_size == 48
        assert target.intermediate_size == 72
        assert target.head_dim == Sizes.from_config(family, config).head_dim
        check_legal(family, config, target)
        check_growth(Sizes.from_config(family, config), target)
        assert expected_shapes(target.into_config(family, config))


@pytest.mark.parametrize(
    ("config", "hidden", "ffn", "named"),
    [
        (SMOLLM2, "1.001", "1", "hidden_size"),
        (SMOLLM2, "1", "1.0001", "intermediate_size"),
        (SMOLLM2, "7/5", "1", "hidden_size"),
        (PYTHIA, "1.1", "1", "hidden_size"),
        (PYTHIA, "65/64", "1", "hidden_size"),
        (GEMMA3, "641/640", "1", "hidden_size"),
    ],
)
def test_a_multiplier_that_gives_no_legal_width_offers_those_that_do(config, hidden, ffn, named):
    family = load_family(config["model_type"])
    with pytest.raises(SizeError, match=named) as caught:
        check_legal(family, config, scaled(family, config, Fraction(hidden), Fraction(ffn)))
    assert any(character.isdigit() for character in caught.value.hint), "no nearest value is offered"


@pytest.mark.parametrize("hidden_size", [577, 640, 641, 700, 1000, 1153])
def test_heads_follow_the_stream_as_closely_as_is_legal(hidden_size):
    family = load_family("llama")
    source = Sizes.from_config(family, SMOLLM2)
    legal = [
        kv for kv in range(3, 40) if hidden_size % (3 * kv) == 0 and 3 * kv >= source.num_attention_heads
    ]  # the class wants hidden_size to be a multiple of the heads; the group of three stays
    if not legal:
        with pytest.raises(SizeError, match=str(hidden_size)):
            with_hidden(family, SMOLLM2, source, hidden_size)
        return
    target = with_hidden(family, SMOLLM2, source, hidden_size)
    best = min(legal, key=lambda kv: abs(kv / 3 - hidden_size / 576))
    assert target.num_key_value_heads == best
    assert target.num_attention_heads == 3 * best


def test_like_takes_the_shape_of_the_other_model():
    family = load_family("llama")
    source = Sizes.from_config(family, SMOLLM2)
    other = source.replace(hidden_size=960, intermediate_size=2560, num_attention_heads=15, num_key_value_heads=5,
                           num_hidden_layers=40, vocab_size=1000, tied=False)  # fmt: skip
    target = like(source, other)
    assert target == other.replace(vocab_size=source.vocab_size, tied=source.tied)


def test_like_refuses_what_growing_cannot_change():
    source = Sizes.from_config(load_family("llama"), SMOLLM2)
    with pytest.raises(SizeError, match="head_dim") as caught:
        like(source, source.replace(head_dim=source.head_dim * 2))
    assert caught.value.hint
