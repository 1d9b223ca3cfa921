"""The exact stage: whatever growth added is found and removed, told nothing, and nothing else is."""

from __future__ import annotations

import random

import pytest
import torch

import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.families.axes import Role
from dslm.families.units import unit_parts
from dslm.shrink.redundancy import exact_stage
from dslm.shrink.weights import Stored
from dslm.sizes import Sizes, differing
from dslm.verify.units import Shuffle, parts_of
from growing import dimensions_of, draw_target, grow, grow_or_nearest, load
from pico import CASES, IDS, make_model, read_config, save
from shrinking import FLOAT32, distance, reduced

BFLOAT16 = 3e-2  # weights that growth scaled are rounded once more

# Every switch of every family grown in everything at once, and each family's first in one dimension at a time.
_GROWTHS = [
    pytest.param(family, variant, dimension, method, id=f"{family}-{variant}-{dimension}-{method}")
    for number, (family, variant) in enumerate(CASES)
    for dimension in dimensions_of(family, variant)
    for method in ("hypercloning", "padding", "net2net")
    if method == "hypercloning" or dimension != "layers"
    if method != "net2net" or dimension == "ffn"
    if dimension in ("all", "coupled") or family != CASES[number - 1][0]
]


@pytest.mark.parametrize(("family", "variant", "dimension", "method"), _GROWTHS)
def test_every_growth_is_undone(family, variant, dimension, method, tmp_path):
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    draw = random.Random(f"{family}-{variant}-{dimension}-{method}")
    target = draw_target(source.family, source.config, dimension, draw)
    grown = grow_or_nearest(source, tmp_path / "grown", target, method)
    out, sizes, removed = reduced(grown, source.sizes, tmp_path)
    assert sizes.replace(tied=source.sizes.tied) == source.sizes
    assert set(removed) == set(differing(open_folder(grown).sizes, sizes))
    assert distance(tmp_path / "source", out) < FLOAT32


def test_twin_heads_do_not_cost_the_groups_that_are_asked_for(tmp_path):
    """With twins gone each group would have one query head, and no group of two could be made again."""
    model = make_model("llama", "gqa-tied")
    with torch.no_grad():
        for layer in model.model.layers:
            heads = layer.self_attn.q_proj.weight.view(4, 8, 32)
            heads[1], heads[3] = heads[0], heads[2]
    source = open_folder(save(model, tmp_path / "source"))
    target = source.sizes.replace(num_attention_heads=2, num_key_value_heads=1)
    shrinking.down(source, tmp_path / "out", target)
    assert open_folder(tmp_path / "out").sizes == target


SPLIT = [("llama", "gqa-tied"), ("olmo2", "gqa-tied"), ("gemma2", "biases")]
ALSO_SPLIT = [("qwen2", "gqa-tied"), ("qwen3", "gqa-tied"), ("phi", "gqa"), ("gpt_neox", "parallel")]


@pytest.mark.parametrize("split", [{"split": "even"}, {"split": "uneven"}, {"snr_db": 10.0}], ids=str)
@pytest.mark.parametrize(
    ("family", "variant", "dtype"),
    [(*one, torch.float32) for one in SPLIT + ALSO_SPLIT] + [(*one, torch.bfloat16) for one in SPLIT],
    ids=str,
)
def test_every_split_is_undone(family, variant, split, dtype, tmp_path):
    save(make_model(family, variant, dtype=dtype), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6}
    if source.sizes.num_attention_heads == source.sizes.num_key_value_heads:
        heads = {"num_attention_heads": 9, "num_key_value_heads": 9}
    target = source.sizes.replace(hidden_size=72, intermediate_size=100, **heads)
    grown = grow(source, tmp_path / "grown", target, **split)
    out, sizes, _ = reduced(grown, source.sizes, tmp_path)
    assert sizes == source.sizes
    assert distance(tmp_path / "source", out) < (FLOAT32 if dtype is torch.float32 else BFLOAT16)


@pytest.mark.parametrize(("family", "variant"), [("llama", "gqa-tied"), ("phi", "gqa"), ("olmo2", "mha")])
def test_growth_upon_growth_is_undone_in_any_order_of_units(family, variant, tmp_path):
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    wider = {"hidden_size": 64, "intermediate_size": 77, "num_attention_heads": 8, "num_key_value_heads": 8}
    once = grow(source, tmp_path / "once", source.sizes.replace(**wider))
    target = source.sizes.replace(**wider | {"hidden_size": 88, "intermediate_size": 120})
    twice = open_folder(grow(once, tmp_path / "twice", target, method="padding"))
    model = load(twice.folder, torch.float32)
    with Shuffle(parts_of(model, twice), twice.family.dimensions(twice.config)).applied():
        save(model, tmp_path / "shuffled")
    out, sizes, _ = reduced(tmp_path / "shuffled", source.sizes, tmp_path)
    assert sizes == source.sizes
    assert distance(tmp_path / "source", out) < FLOAT32


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "biases"),
        ("gemma2", "biases"),
        ("phi", "gqa"),
        ("olmo2", "mha"),
        ("qwen2", "mha"),
        ("qwen3", "mha"),
        ("opt", "pre-norm"),
        ("gpt_neox", "parallel"),
    ],
)
def test_identity_blocks_are_removed(family, variant, tmp_path):
    model = make_model(family, variant)
    folder = save(model, tmp_path / "deep")
    for line in open_folder(folder).family.layout(read_config(folder)).values():
        roles = {axis.role for axis in line.spec.axes if axis.dimensions == ("hidden",)}
        if line.layer == 1 and roles & {Role.WRITE, Role.BIAS}:
            model.get_parameter(line.name).data.zero_()
    save(model, folder)
    source = open_folder(folder)
    out, _, removed = reduced(folder, source.sizes.replace(num_hidden_layers=2), tmp_path)
    assert removed == {"num_hidden_layers": 1}
    assert distance(folder, out) < FLOAT32
    assert reduced(folder, source.sizes, tmp_path)[2] == {}


@pytest.mark.parametrize(("family", "variant"), CASES, ids=IDS)
def test_nothing_is_found_where_there_is_nothing(family, variant, tmp_path):
    source = Stored(open_folder(save(make_model(family, variant), tmp_path / "source")))
    found = exact_stage(source, Sizes(1, 1, 1, 1, 1, 1, 1, tied=False))
    assert found.removed == {}
    assert found.weights is source


@pytest.mark.parametrize("method", ["hypercloning", "padding"])
@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "gqa-tied"), ("phi", "mha"), ("olmo2", "mha"), ("gemma", "mqa")]
)
def test_a_target_between_stays_exact(family, variant, method, tmp_path):
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    wider = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 16}
    grown = grow(
        source, tmp_path / "grown", source.sizes.replace(**wider, num_key_value_heads=4), method=method
    )
    target = open_folder(grown).sizes.replace(hidden_size=41, intermediate_size=77, num_attention_heads=6)
    out, sizes, removed = reduced(grown, target, tmp_path)
    assert target.hidden_size <= sizes.hidden_size <= 64
    assert (sizes.intermediate_size, sizes.num_key_value_heads) == (77, 4)
    assert sizes.num_attention_heads == 8
    assert removed["intermediate_size"] == 19
    assert distance(tmp_path / "source", out) < FLOAT32


def test_near_copies_are_not_copies(tmp_path):
    save(make_model("llama", "gqa-tied"), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(
        hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4
    )
    grown = grow(source, tmp_path / "grown", target)
    model = load(grown, torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    save(model, tmp_path / "near")
    assert reduced(tmp_path / "near", source.sizes, tmp_path)[2] == {}


def test_layers_that_differ_in_what_is_redundant_share_one_size(tmp_path):
    """Units, query heads and key-value heads die or repeat at other places in every layer."""
    model = make_model("qwen2", "mha")
    layers = model.model.layers
    with torch.no_grad():
        for layer, dead in zip(layers, ([0], [1, 3], [2]), strict=True):
            for head in dead:
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
            layer.mlp.down_proj.weight[:, : 5 * len(dead)] = 0
        layers[2].mlp.up_proj.weight[20] = layers[2].mlp.up_proj.weight[9]
        layers[2].mlp.gate_proj.weight[20] = layers[2].mlp.gate_proj.weight[9]
        layers[0].mlp.gate_proj.weight[40] = 0
    folder = save(model, tmp_path / "source")
    least = open_folder(folder).sizes.replace(
        intermediate_size=1, num_attention_heads=1, num_key_value_heads=1
    )
    out, _, removed = reduced(folder, least, tmp_path)
    assert removed == {"intermediate_size": 6, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert distance(folder, out) < FLOAT32


def test_multiples_of_either_sign_are_merged_under_an_rms_norm(tmp_path):
    model = make_model("llama", "mha")
    with torch.no_grad():
        for twin, factor in ((7, -2.0), (8, 0.5), (9, 1.0), (30, -0.3)):
            for norm in (m for name, m in model.named_modules() if name.endswith("norm")):
                norm.weight[twin] = norm.weight[3]
            model.model.embed_tokens.weight[:, twin] = factor * model.model.embed_tokens.weight[:, 3]
            for layer in model.model.layers:
                for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    writer.weight[twin] = factor * writer.weight[3]
    folder = save(model, tmp_path / "source")
    out, _, removed = reduced(folder, open_folder(folder).sizes.replace(hidden_size=4), tmp_path)
    assert removed == {"hidden_size": 4}
    assert distance(folder, out) < FLOAT32


def test_a_channel_that_is_zero_is_not_zero_to_a_layer_norm_off_centre(tmp_path):
    model = make_model("phi", "mha")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter[:, 5:9] = 0
            elif any(word in name for word in ("dense", "fc2", "norm.bias")):
                parameter[5:9] = 0
    folder = save(model, tmp_path / "source")
    assert reduced(folder, open_folder(folder).sizes.replace(hidden_size=4), tmp_path)[2] == {}


def planted(model, checkpoint, draw):
    """Copy and silence units and heads at random, differently in every layer."""
    sizes = checkpoint.family.dimensions(checkpoint.config)
    parts = parts_of(model, checkpoint)

    def change(layer, dimension, roles, source, goal):
        for part in parts:
            for position, axis in enumerate(part.line.spec.axes if part.line.layer == layer else ()):
                for where in unit_parts(axis, dimension, sizes) if axis.role in roles else ():
                    rows = part.parameter.data.movedim(position, 0)
                    rows[where[goal]] = 0 if source is None else rows[where[source]].clone()

    for layer in range(sizes["layers"]):
        for dimension, most in (("intermediate", 12), ("kv_heads", 2), ("heads", sizes["heads"])):
            for _ in range(draw.randint(0, most)):
                source, goal = draw.sample(range(sizes[dimension]), 2)
                if dimension == "kv_heads" or draw.random() < 0.5:
                    change(layer, dimension, {Role.WRITE, Role.BIAS, Role.GAIN}, source, goal)
                else:
                    change(layer, dimension, {Role.READ}, None, goal)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("family", "variant"), [("qwen2", "gqa-tied"), ("olmo2", "biases"), ("phi3", "gqa-partial-rotary")]
)
def test_what_is_planted_at_random_is_removed_exactly(family, variant, seed, tmp_path):
    draw = random.Random(seed)
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    wider = draw_target(source.family, source.config, "all", draw)
    # Uneven shares of what is then taken away would leave no two channels alike.
    grown = open_folder(grow(source, tmp_path / "grown", wider, split="even"))
    model = load(grown.folder, torch.float32)
    planted(model, grown, draw)
    save(model, tmp_path / "planted")
    words = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    least = {word: draw.randint(1, getattr(grown.sizes, word)) if seed % 2 else 1 for word in words}
    out, sizes, removed = reduced(tmp_path / "planted", grown.sizes.replace(**least), tmp_path)
    assert all(getattr(sizes, word) >= least[word] for word in words)
    assert removed
    assert distance(tmp_path / "planted", out) < FLOAT32
