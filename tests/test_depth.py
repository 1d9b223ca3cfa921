"""New blocks: the same function bit for bit, the right kind of block, and a start that training does not upset."""

from __future__ import annotations

import json

import pytest
import torch

import calling
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import SizeError
from dslm.families import family_names, load_family
from dslm.grow.blocks import new_blocks, origins
from dslm.plan import plan_growth
from dslm.sizes import Sizes
from dslm.verify.liveness import certify
from growing import grow, load, logits
from pico import CASES, PICO, make_model, read_config, save, tokens

call = calling.call  # a fixture
DEEPER = [
    pytest.param(family, variant, id=f"{family}-{variant}")
    for family, variant in CASES
    if load_family(family).keeps_stream(PICO[family][variant])
]


@pytest.mark.parametrize(
    ("before", "after"), [(1, 1), (1, 4), (3, 3), (3, 4), (3, 5), (3, 6), (3, 11), (30, 37)]
)
def test_new_blocks_are_spread_evenly_behind_what_they_copy(before, after):
    layers = origins(before, after)
    assert len(layers) == after
    assert sorted(layers) == list(layers)
    assert set(layers) == set(range(before))
    counts = [layers.count(number) for number in range(before)]
    assert max(counts) - min(counts) <= 1
    assert len(new_blocks(layers)) == after - before
    assert [layers[n] for n in range(after) if n not in new_blocks(layers)] == list(range(before))


@pytest.mark.parametrize(("family", "variant"), DEEPER)
def test_a_deeper_model_is_the_same_function_bit_for_bit(family, variant, tmp_path):
    source = open_folder(save(make_model(family, variant), tmp_path / "source"))
    out = grow(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=5))
    before, after = (load(folder, torch.float32) for folder in (source.folder, out))
    assert after.config.num_hidden_layers == 5
    assert torch.equal(logits(before, tokens(1)), logits(after, tokens(1)))


def test_a_family_that_normalises_its_stream_cannot_get_deeper():
    config = PICO["opt"]["post-norm"] | {"model_type": "opt"}
    family = load_family("opt")
    source = Sizes.from_config(family, config)
    with pytest.raises(SizeError, match="norms over its stream") as caught:
        plan_growth("m", family, config, source.replace(num_hidden_layers=4))
    assert caught.value.hint


def test_a_new_block_is_of_the_kind_of_its_origin(tmp_path):
    source = open_folder(save(make_model("gemma3_text", "windows"), tmp_path / "source"))
    kinds = source.config["layer_types"]
    assert len(set(kinds)) == 2
    out = grow(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=5))
    assert read_config(out)["layer_types"] == [kinds[layer] for layer in origins(3, 5)]


@pytest.mark.parametrize(
    ("family", "variant", "key"),
    [("gemma2", "windows-softcaps", "layer_types"), ("smollm3", "nope-interval", "no_rope_layers")],
)
def test_layers_told_apart_by_their_number_are_listed(family, variant, key, tmp_path):
    """Otherwise a block that moved would become one of another kind."""
    source = open_folder(save(make_model(family, variant), tmp_path / "source"))
    config = read_config(source.folder)
    kinds = config.pop(key)
    (source.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    unlisted = open_folder(source.folder)
    out = grow(unlisted, tmp_path / "out", source.sizes.replace(num_hidden_layers=5))
    assert read_config(out)[key] == [kinds[layer] for layer in origins(3, 5)]
    models = [load(folder, torch.float32) for folder in (source.folder, out)]
    assert torch.equal(*(logits(model, tokens(1, length=40)) for model in models))


def moved(model, ids):
    """How far one step of AdamW moves the logits, relative to their size."""
    before = logits(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return ((logits(model, ids) - before).norm() / before.norm()).item()


WIDER = {
    "FFN": {"intermediate_size": 96},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "heads in groups": {"num_attention_heads": 8},
    "all": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4},
}
WINDOW = tokens(7, rows=1, length=48)


@pytest.mark.parametrize("options", [{}, {"method": "padding"}, {"snr_db": 10.0}], ids=str)
@pytest.mark.parametrize("wider", WIDER)
@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "gqa-tied"), ("gemma2", "biases"), ("phi3", "gqa-partial-rotary")]
)
def test_copies_in_a_new_block_can_become_different(family, variant, wider, options, tmp_path):
    source = open_folder(save(make_model(family, variant), tmp_path / "source"))
    target = source.sizes.replace(num_hidden_layers=4, **WIDER[wider])
    grown = open_folder(grow(source, tmp_path / "out", target, **options))
    found = certify(grown, WINDOW)
    assert found.unlocked, found.examples
    assert found.alive, found.examples


def test_a_unit_that_only_did_not_fire_is_not_called_dead(tmp_path):
    """A ReLU that stays at zero on this text; its output is read with zeros in a new block."""
    model = make_model("opt", "pre-norm")
    source = open_folder(save(model, tmp_path / "source"))
    grown = open_folder(grow(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=5)))
    assert certify(grown, WINDOW).alive
    with torch.no_grad():
        for part in (model.model.decoder.layers[1].fc1.weight, model.model.decoder.layers[1].fc1.bias):
            part[7] = 0
        model.model.decoder.layers[1].fc2.weight[:, 7] = 0
    found = certify(open_folder(save(model, tmp_path / "dead")), WINDOW)
    assert {space.name: space.dead for space in found.spaces}["FFN units"] == 1


def test_dtypes_that_differ_by_layer_go_with_their_layers(tmp_path):
    model = make_model("llama", "mha", dtype=torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.float()
    source = open_folder(save(model, tmp_path / "source"))
    grown = open_folder(grow(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=5)))
    name = "model.layers.{}.mlp.up_proj.weight"
    dtypes = ["BF16", "F32", "F32"]
    assert [grown.entries[name.format(n)].dtype for n in range(5)] == [
        dtypes[layer] for layer in origins(3, 5)
    ]
    shrinking.down(grown, tmp_path / "back", source.sizes)
    back = open_folder(tmp_path / "back")
    assert [back.entries[name.format(n)].dtype for n in range(3)] == dtypes
    for tensor in source.entries:
        rows = source.entries[tensor].shape[0]
        assert torch.equal(*(each.read_rows(tensor, 0, rows) for each in (source, back)))


def test_a_depth_that_no_model_has_is_refused_at_once(call, tmp_path):
    save(make_model("llama", "mha"), tmp_path / "source")
    code, _, err = call("up", tmp_path / "source", "--num-hidden-layers", 10**9, "--dry-run")
    assert code == 1
    assert "more than any model has" in calling.one_line(err)


@pytest.mark.parametrize("word", ["attention", "key-value"])
def test_one_number_says_both_head_counts_where_they_are_the_same(call, word, tmp_path):
    save(make_model("gpt_neox", "parallel"), tmp_path / "source")
    wider = ["--hidden-size", 64, f"--num-{word}-heads", 8]
    code, out, err = call("up", tmp_path / "source", *wider, "--dry-run", "--json")
    assert code == 0, err
    heads = {key: after for key, (_, after) in json.loads(out)["changes"].items() if key.endswith("heads")}
    assert heads == {"num_attention_heads": 8, "num_key_value_heads": 8}


def test_like_a_wider_and_shallower_model_says_what_can_be_done(call, tmp_path):
    source = open_folder(save(make_model("llama", "mha"), tmp_path / "source"))
    grow(source, tmp_path / "deep", source.sizes.replace(num_hidden_layers=5))
    grow(source, tmp_path / "wide", source.sizes.replace(intermediate_size=96))
    code, _, err = call("up", tmp_path / "deep", "--like", tmp_path / "wide", "--dry-run")
    assert code == 1
    assert "leave it at 5" in calling.one_line(err)
    code, out, _ = call("up", tmp_path / "source", "--like", tmp_path / "deep", "--dry-run", "--json")
    assert json.loads(out)["changes"] == {"num_hidden_layers": [3, 5]}


@pytest.mark.parametrize(
    ("family", "variant"), [("olmo2", "mha"), ("gemma2", "no-softcaps"), ("gemma3_text", "windows")]
)
def test_the_first_step_of_training_does_not_upset_new_blocks(family, variant, tmp_path):
    """A norm behind writers of zeros would blow up their first step to full size."""
    source = open_folder(save(make_model(family, variant), tmp_path / "source"))
    out = grow(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=6))
    ids = tokens(4)
    assert moved(load(out, torch.float32), ids) < 3 * moved(load(source.folder, torch.float32), ids)


@pytest.mark.parametrize("name", family_names())
def test_branch_norms_are_tensors_of_the_families_that_have_such_norms(name):
    family = load_family(name)
    assert bool(family.branch_norms) is (family.blocks in ("post", "sandwich"))
    for norm in family.branch_norms:
        assert f"{norm}.weight" in family.tensors


def test_up_makes_a_model_deeper_and_says_how(call, tmp_path):
    save(make_model("qwen3", "gqa-tied"), tmp_path / "source")
    code, out, _ = call("up", tmp_path / "source", "-o", tmp_path / "out", "--num-hidden-layers", 4, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["changes"] == {"num_hidden_layers": [3, 4]}
    assert found["methods"] == {"num_hidden_layers": "blocks"}
    assert "[blocks](https://arxiv.org/abs/2401.02415)" in (tmp_path / "out" / "README.md").read_text()
    command = json.loads((tmp_path / "out" / "dslm.json").read_text())["command"]
    assert "--num-hidden-layers 4 --method hypercloning" in command
