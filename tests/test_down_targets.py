"""The search for a smaller size, and what a plan to shrink holds and refuses."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

import pico
from dslm.checkpoint.card import calibration_name, command_of, render_card, without_places
from dslm.checkpoint.oracle import expected_shapes
from dslm.errors import DslmError, RecipeError, SizeError
from dslm.families import family_names, load_family
from dslm.plan import SHRUNK, Plan, check_plan, plan_growth, plan_shrink
from dslm.shrink.fold import shrunk_config
from dslm.sizes import Sizes, check_legal, count_parameters
from dslm.targets_down import (
    divided,
    like_smaller,
    parse_divisor,
    parse_share,
    shrink_candidates,
)
from test_targets import GEMMA3, PYTHIA, QWEN3, REAL, SMOLLM2, pico_config, total

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def sizes_of(config: dict) -> Sizes:
    return Sizes.from_config(load_family(config["model_type"]), config)


def shrink(config: dict, **changes) -> Plan:
    options = {
        key: changes.pop(key) for key in ("method", "text", "samples", "length", "seed") if key in changes
    }
    family = load_family(config["model_type"])
    return plan_shrink("m", family, config, sizes_of(config).replace(**changes), **options)


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
    assert like_smaller(source, other) == source.replace(**shape)


def test_like_refuses_another_head_dim():
    source = sizes_of(SMOLLM2)
    with pytest.raises(SizeError, match="rotary"):
        like_smaller(source, source.replace(head_dim=128))


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
                assert expected_shapes(shrunk_config(family, config, candidate.sizes, layers))


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


def test_layers_that_are_told_by_their_number_stay():
    assert {
        c.sizes.num_hidden_layers for c in shrink_candidates(load_family("gemma3_text"), GEMMA3, 2 * 10**8)
    } == {18}
    listed = GEMMA3 | {"layer_types": ["full_attention"] * 18}
    found = shrink_candidates(load_family("gemma3_text"), listed, round(0.9 * total(listed)), count=50)
    assert {c.sizes.num_hidden_layers for c in found} != {18}


# ---------------------------------------------------------------- plans

REFUSED = [
    (SMOLLM2, {"hidden_size": 640, "num_attention_heads": 9}, "hidden_size 640 is larger.*dslm up"),
    (SMOLLM2, {"intermediate_size": 1537}, "intermediate_size 1537 is larger than the source's 1536.*dslm up"),
    (SMOLLM2, {"num_hidden_layers": 31}, "num_hidden_layers 31.*dslm up"),
    (SMOLLM2, {"num_attention_heads": 12}, "num_attention_heads 12.*dslm up"),
    (SMOLLM2, {"num_key_value_heads": 9}, "num_key_value_heads 9.*dslm up"),
    (SMOLLM2, {"head_dim": 32}, "head_dim cannot change from 64 to 32: every rotary.*num_attention_heads"),
    (SMOLLM2, {"vocab_size": 1000}, "vocab_size cannot change"),
    (SMOLLM2, {"vocab_size": 50000}, "vocab_size cannot change"),
    (SMOLLM2, {"hidden_size": 500}, "hidden_size.*nearest legal hidden_size: 495 or 504"),
    (SMOLLM2, {"hidden_size": 0}, "hidden_size 0"),
    (SMOLLM2, {"hidden_size": -1}, "hidden_size -1"),
    (SMOLLM2, {"num_hidden_layers": 0}, "num_hidden_layers 0"),
    (SMOLLM2, {"num_attention_heads": 8}, "num_attention_heads 8 is not a multiple"),
    (SMOLLM2, {"num_key_value_heads": 1}, "9 query heads for each.*has 3.*nearest legal pairs: 3 with 1 or 6 with 2"),
    (SMOLLM2, {"num_attention_heads": 4, "num_key_value_heads": 1}, "4 query heads.*pairs: 3 with 1 or 6 with 2"),
    (PYTHIA, {"hidden_size": 448}, "derives head_dim.*hidden_size 448 with num_attention_heads 7"),
    (PYTHIA, {"tied": True}, "tied"),
    (GEMMA3, {"num_hidden_layers": 9}, "layer_types is not listed.*other sizes"),
    (pico_config("smollm3", "nope-interval"), {"num_hidden_layers": 2}, "no_rope_layers"),
    (pico_config("olmo", "tied-biases"), {"hidden_size": 16}, "hidden_size cannot shrink.*--untie"),
    (pico_config("opt", "projected-untied"), {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
     "word_embed_proj_dim"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "asked", "named"), REFUSED)
def test_a_target_that_is_no_shrink_is_refused(config, asked, named):
    with pytest.raises(SizeError) as caught:
        shrink(config, **asked)
    assert re.search(named, str(caught.value)), str(caught.value)
    assert caught.value.hint


ALLOWED = [
    (SMOLLM2, {"num_attention_heads": 6}),
    (SMOLLM2, {"num_attention_heads": 3, "num_key_value_heads": 1}),
    (SMOLLM2, {"num_hidden_layers": 1}),
    (SMOLLM2, {"intermediate_size": 1}),
    (SMOLLM2, {"tied": False, "hidden_size": 288}),
    (pico_config("olmo", "tied-biases"), {"hidden_size": 16, "tied": False}),
    (QWEN3, {"num_hidden_layers": 20}),
]


@pytest.mark.parametrize(("config", "asked"), ALLOWED)
def test_only_what_shrinks_has_a_method(config, asked):
    plan = shrink(config, **asked, method="slice")
    assert plan.shrinks
    assert plan.methods == {word: "slice" for word in SHRUNK if word in asked}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "magic"}, "magic"),
        ({"method": "hypercloning"}, "hypercloning"),
        ({"seed": -1}, "seed -1"),
        ({"samples": 1}, "samples is 1"),
        ({"samples": -5}, "samples is -5"),
        ({"length": 0}, "windows of 0 tokens"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        shrink(SMOLLM2, intermediate_size=1024, **options)


@pytest.mark.parametrize(
    "options", [{}, {"text": "wiki.txt", "samples": 8, "length": 64}, {"method": "slice", "seed": 2**40}]
)
@pytest.mark.parametrize("config", REAL.values(), ids=REAL)
def test_a_plan_survives_its_file(config, options, tmp_path):
    plan = shrink(config, intermediate_size=1024, tied=False, **options)
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert Plan.from_yaml(path) == plan
    assert Plan.from_yaml(path).to_yaml() == plan.to_yaml()
    assert not {"split", "snr_db"} & plan.as_dict().keys()
    check_plan(Plan.from_yaml(path), load_family(config["model_type"]), config)


def test_a_growth_says_nothing_of_calibration():
    family = load_family("llama")
    plan = plan_growth("m", family, SMOLLM2, sizes_of(SMOLLM2).replace(intermediate_size=2048))
    assert not plan.shrinks
    assert list(plan.as_dict()) == [
        "model", "family", "source", "target", "methods", "split", "snr_db", "seed", "dtype",
    ]  # fmt: skip


EDITS = {
    "larger": ("  intermediate_size: 1024", "  intermediate_size: 2048", "larger than the source"),
    "method": ("intermediate_size: reconstruct", "intermediate_size: magic", "magic"),
    "no method": ("  intermediate_size: reconstruct\n", "", "None"),
    "two methods": ("num_hidden_layers: reconstruct", "num_hidden_layers: slice", "different methods"),
    "dtype": ("dtype: null", "dtype: BF16", "BF16"),
    "samples": ("samples: 64", "samples: 1", "samples is 1"),
    "samples a word": ("samples: 64", "samples: many", "samples of calibration is 'many'"),
    "samples a truth": ("samples: 64", "samples: true", "samples of calibration is True"),
    "text a number": ("text: null", "text: 3", "text of calibration is 3"),
    "unknown key": ("  length: 512", "  width: 512", "calibration must have"),
    "calibration a word": (
        "calibration:\n  text: null\n  samples: 64\n  length: 512\n  refine: 0", "calibration: wiki", "calibration"
    ),
    "other model": ("family: llama", "family: qwen2", "another model"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "named"), EDITS.values(), ids=EDITS)
def test_a_plan_that_was_edited_is_checked_again(before, after, named, tmp_path):
    text = shrink(SMOLLM2, intermediate_size=1024, num_hidden_layers=20).to_yaml()
    assert before in text
    (tmp_path / "plan.yaml").write_text(text.replace(before, after))
    with pytest.raises(DslmError, match=named):
        check_plan(Plan.from_yaml(tmp_path / "plan.yaml"), load_family("llama"), SMOLLM2)


# ---------------------------------------------------------------- cards


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/me/wiki.txt", "wiki.txt"),
        ("data/wiki.txt", "wiki.txt"),
        ("~/wiki.jsonl", "wiki.jsonl"),
        ("./wiki", "wiki"),
        ("owner/data-v1.5", "owner/data-v1.5"),
        ("a/b/c", "c"),
        ("wiki.txt", "wiki.txt"),
    ],
)
def test_the_place_of_a_text_is_nobodys_business(text, name):
    assert calibration_name(text) == name


def test_the_command_and_the_card_of_a_shrink():
    plan = shrink(
        SMOLLM2, intermediate_size=1024, num_hidden_layers=20, tied=False, text="/home/me/wiki.txt", seed=3
    )
    assert command_of(plan) == (
        "dslm down m --intermediate-size 1024 --num-hidden-layers 20 --untie --method reconstruct "
        "--calibration wiki.txt --samples 64 --sequence-length 512 --seed 3"
    )
    assert "--calibration" not in command_of(shrink(SMOLLM2, intermediate_size=1024))
    card = render_card("small", plan, (200, 100), {}, {}, {"perplexity": 3.25})
    assert "least squares towards the sliced weights, see how-it-works" in card
    assert "Calibration: wiki.txt, 64 windows of 512 tokens. Seed: 3." in card
    assert "/home/me" not in card + without_places(plan).to_yaml()
    assert "Split" not in card
    sliced = render_card("small", shrink(SMOLLM2, intermediate_size=1024, method="slice"), (2, 1), {}, {}, {})
    assert "[slice](https://arxiv.org/abs/2407.14679)" in sliced
    assert "text that the model wrote itself" in sliced
