"""What a plan to grow holds and refuses, and its file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from configs import PYTHIA, REAL, SMOLLM2, pico_config
from dslm.checkpoint.card import command_of, render_card
from dslm.errors import DslmError, RecipeError, SizeError
from dslm.families import load_family
from dslm.plan import Plan, plan_growth
from dslm.sizes import Sizes
from dslm.targets import scaled

UNGROWN = [
    ({"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}, "dslm down"),
    ({"intermediate_size": 1535}, "dslm down"),
    ({"num_attention_heads": 6}, "dslm down"),
    ({"num_key_value_heads": 1}, "dslm down"),
    ({"num_hidden_layers": 29}, "dslm down"),
    ({"head_dim": 128}, "head_dim"),
    ({"vocab_size": 50000}, "vocab_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"intermediate_size": 0}, "intermediate_size"),
]


@pytest.mark.parametrize(("asked", "named"), UNGROWN)
def test_a_target_that_is_no_growth_is_refused(asked, named):
    family = load_family("llama")
    target = Sizes.from_config(family, SMOLLM2).replace(**asked)
    with pytest.raises(SizeError, match=named) as caught:
        plan_growth("m", family, SMOLLM2, target)
    assert caught.value.hint


def test_padding_has_no_split_in_its_card():
    def grown(method):
        target = Sizes.from_config(load_family("llama"), SMOLLM2).replace(intermediate_size=3072)
        plan = plan_growth("m", load_family("llama"), SMOLLM2, target, method=method)
        return command_of(plan), render_card("large", plan, (1, 2), {method: "a paper"}, {}, {})

    command, card = grown("padding")
    assert "--split" not in command
    assert "Split" not in card
    command, card = grown("hypercloning")
    assert "--split uneven" in command
    assert "Split: uneven." in card


def test_a_command_can_be_pasted_whatever_its_model_is_called():
    target = Sizes.from_config(load_family("llama"), SMOLLM2).replace(intermediate_size=3072)
    plan = plan_growth("model & co", load_family("llama"), SMOLLM2, target)
    assert command_of(plan).startswith("dslm up 'model & co' --intermediate-size 3072 ")


def test_two_tables_cannot_be_tied():
    family = load_family("gpt_neox")
    target = Sizes.from_config(family, PYTHIA).replace(tied=True)
    with pytest.raises(SizeError, match="tied"):
        plan_growth("m", family, PYTHIA, target)


def test_a_stream_cannot_grow_to_the_width_of_a_projected_table():
    """At equal widths OPT has no projections at all, so what they compute would be lost."""
    config = pico_config("opt", "projected-untied") | {"word_embed_proj_dim": 48}
    family = load_family("opt")
    target = scaled(family, config, Fraction(3, 2), Fraction(1))
    with pytest.raises(DslmError, match="word_embed_proj_dim"):
        plan_growth("m", family, config, target)


@pytest.mark.parametrize("options", [{"method": "magic"}, {"seed": -1}])
def test_options_that_do_not_exist_are_refused(options):
    family = load_family("llama")
    target = scaled(family, SMOLLM2, Fraction(2), Fraction(2))
    with pytest.raises(RecipeError) as caught:
        plan_growth("m", family, SMOLLM2, target, **options)
    assert str(next(iter(options.values()))) in str(caught.value)


PLANS = [
    {},
    {"method": "net2net", "seed": 7},
    {"method": "padding", "split": "even", "dtype": "BF16"},
    {"snr_db": 10.0, "seed": 2**40},
]


@pytest.mark.parametrize("options", PLANS)
@pytest.mark.parametrize("config", REAL.values(), ids=REAL)
def test_a_plan_survives_its_file(config, options, tmp_path):
    family = load_family(config["model_type"])
    target = scaled(family, config, Fraction(3, 2), Fraction(2)).replace(tied=False)
    plan = plan_growth("owner/naïve: 'model'", family, config, target, **options)
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert Plan.from_yaml(path) == plan
    assert plan.methods.keys() == {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    }
    assert Plan.from_yaml(path).to_yaml() == plan.to_yaml()


def test_only_what_changes_has_a_method():
    family = load_family("llama")
    source = Sizes.from_config(family, SMOLLM2)
    assert not plan_growth("m", family, SMOLLM2, source).methods
    wider = plan_growth("m", family, SMOLLM2, source.replace(intermediate_size=2048), method="padding")
    assert wider.methods == {"intermediate_size": "padding"}


def _plan_text() -> str:
    family = load_family("llama")
    return plan_growth("m", family, SMOLLM2, scaled(family, SMOLLM2, Fraction(2), Fraction(2))).to_yaml()


NO_PLANS = {
    "empty": b"",
    "text": b"grow it please",
    "number": b"3",
    "list": b"- 1\n- 2\n",
    "not YAML": b"{a: [",
    "not text": b"\xff\xfe\x00\x80",
    "sizes missing": b"model: m\nfamily: llama\n",
    "sizes a number": b"model: m\nfamily: llama\nsource: 3\ntarget: 4\nmethods: {}\n",
    "unknown key": _plan_text().encode() + b"colour: red\n",
    "size unknown": _plan_text().replace("  hidden_size", "  hiden_size").encode(),
    "size a word": _plan_text().replace("hidden_size: 1152", "hidden_size: wide").encode(),
    "size a fraction": _plan_text().replace("hidden_size: 1152", "hidden_size: 1152.5").encode(),
    "object": b"!!python/object/apply:os.system ['true']",
}


@pytest.mark.parametrize("content", NO_PLANS.values(), ids=NO_PLANS)
def test_what_is_no_plan_is_refused_by_its_file(content, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"plan\.yaml") as caught:
        Plan.from_yaml(path)
    assert caught.value.hint


@pytest.mark.parametrize("place", ["absent.yaml", "."])
def test_a_plan_that_cannot_be_read_is_named(place, tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        Plan.from_yaml(Path(tmp_path / place))
