"""What a plan to shrink holds and refuses, its file, and the card that it gives."""

from __future__ import annotations

import re

import pytest

from configs import PYTHIA, QWEN3, REAL, SMOLLM2, pico_config, sizes_of
from dslm.checkpoint.card import calibration_names, command_of, render_card, without_places
from dslm.errors import DslmError, RecipeError, SizeError
from dslm.families import load_family
from dslm.plan import SHRUNK, Plan, check_plan, plan_growth, plan_shrink
from dslm.shrink_plan import check_groups


def shrink(config: dict, **changes) -> Plan:
    words = ("method", "texts", "samples", "length", "refine", "seed")
    options = {key: changes.pop(key) for key in words if key in changes}
    family = load_family(config["model_type"])
    return plan_shrink("m", family, config, sizes_of(config).replace(**changes), **options)


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
    (SMOLLM2, {"num_attention_heads": 8}, "num_attention_heads 8 is not a multiple.*num_attention_heads: 6$"),
    (PYTHIA, {"hidden_size": 448}, "derives head_dim.*hidden_size 448 with num_attention_heads 7"),
    (PYTHIA, {"hidden_size": 500}, "legal: hidden_size 448 with num_attention_heads 7 or hidden_size 384 with"),
    (SMOLLM2, {"num_key_value_heads": 2}, "nearest legal: num_attention_heads 6$"),
    (PYTHIA | {"num_attention_heads": 1}, {"hidden_size": 256}, "shrink intermediate_size or num_hidden_layers$"),
    (pico_config("opt", "projected"), {"num_attention_heads": 2, "num_key_value_heads": 2},
     "nearest legal: hidden_size 24 with num_attention_heads 3 or hidden_size 8 with"),
    (PYTHIA, {"tied": True}, "tied"),
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


@pytest.mark.parametrize(
    ("heads", "named"),
    [
        (
            {"num_key_value_heads": 1},
            "9 query heads for each.*has 3.*nearest legal pairs: 3 with 1 or 6 with 2",
        ),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "4 query heads.*pairs: 3 with 1 or 6 with 2"),
    ],
)
def test_query_heads_keep_their_key_value_head(heads, named):
    source = sizes_of(SMOLLM2)
    with pytest.raises(SizeError) as caught:
        check_groups(source, source.replace(**heads), load_family("llama"), SMOLLM2)
    assert re.search(named, f"{caught.value} {caught.value.hint}")
    check_groups(
        source, source.replace(num_attention_heads=2, num_key_value_heads=1), load_family("llama"), SMOLLM2
    )


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
        ({"texts": "wiki.txt"}, "texts is 'wiki.txt', one word; give a list of texts"),
        ({"texts": []}, "no calibration text is named; name some; self: the model writes it"),
        ({"texts": ["a", "self", "a"]}, "the calibration text a is named twice"),
        ({"texts": ["./a", "b/../a"]}, "the calibration text b/../a is named twice"),
        ({"texts": ["a", "b"], "samples": 3}, "samples is 3; at least 4: one window of each text to fit on"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        shrink(SMOLLM2, intermediate_size=1024, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"texts": ["wiki.txt", "self"], "samples": 8, "length": 64}, {"method": "slice", "seed": 2**40}],
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
    "texts a word": ("texts:\n  - self", "texts: self", "texts of calibration is 'self'"),
    "a text a number": ("texts:\n  - self", "texts: [3]", r"texts of calibration is \[3\]"),
    "unknown key": ("  length: 512", "  width: 512", "calibration must have"),
    "calibration a word": (
        "calibration:\n  texts:\n  - self\n  samples: 64\n  length: 512\n  refine: null", "calibration: wiki",
        "calibration",
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
        ("self", "self"),
        ("/home/me/self", "./self"),
        ("owner/data-v1.5", "owner/data-v1.5"),
        ("owner/data:small-v1", "owner/data:small-v1"),
        ("a/b/c", "c"),
        ("wiki.txt", "wiki.txt"),
    ],
)
def test_the_place_of_a_text_is_nobodys_business(text, name):
    assert calibration_names([text]) == [name]


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["/home/me/a/wiki.txt", "/home/me/b/wiki.txt", "self"], ["a/wiki.txt", "b/wiki.txt", "self"]),
        (["/x/a/c/t.txt", "/x/b/c/t.txt", "/x/u.txt"], ["a/c/t.txt", "b/c/t.txt", "u.txt"]),
        (["t.txt", "a/t.txt", "b/t.txt"], ["t.txt", "a/t.txt", "b/t.txt"]),
        (["a.txt", "./a.txt"], ["a.txt", "a.txt"]),
        (["owner/data", "/x/owner/data.txt"], ["owner/data", "data.txt"]),
        (["/x/small/wiki.tokens", "/x/large/wiki.tokens"], ["./small/wiki.tokens", "./large/wiki.tokens"]),
        (["/d/self", "self"], ["./self", "self"]),
        (["/me/a.txt", "/me//a.txt"], ["a.txt", "a.txt"]),
        (["/a.txt", "/b/a.txt"], ["a.txt", "b/a.txt"]),
    ],
)
def test_texts_of_the_same_name_are_told_apart(texts, names):
    assert calibration_names(texts) == names


def test_the_command_and_the_card_of_a_shrink():
    plan = shrink(
        SMOLLM2,
        intermediate_size=1024,
        num_hidden_layers=20,
        tied=False,
        texts=["/home/me/wiki.txt", "self"],
        seed=3,
    )
    assert command_of(plan) == (
        "dslm down m --intermediate-size 1024 --num-hidden-layers 20 --untie --method reconstruct "
        "--calibration wiki.txt --calibration self --samples 64 --sequence-length 512 --seed 3"
    )
    assert "--calibration" not in command_of(shrink(SMOLLM2, intermediate_size=1024))
    assert " --refine 0 " in command_of(shrink(SMOLLM2, intermediate_size=1024, refine=0))
    card = render_card("small", plan, (200, 100), {}, {}, {"perplexity": 3.25})
    assert "least squares towards the sliced weights, and steps of single blocks" in card
    assert (
        "Calibration: wiki.txt and text that the model wrote itself, at most 64 windows of 512 tokens. Seed: 3."
        in card
    )
    assert "/home/me" not in card + without_places(plan).to_yaml()
    assert "Split" not in card
    sliced = render_card("small", shrink(SMOLLM2, intermediate_size=1024, method="slice"), (2, 1), {}, {}, {})
    assert "[slice](https://arxiv.org/abs/2407.14679)" in sliced
    assert "Calibration: text that the model wrote itself, at most 64" in sliced
