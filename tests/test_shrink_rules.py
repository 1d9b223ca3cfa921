"""Each rule of shrinking matters: with it the result is right, and with it left out it is visibly not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import PreTrainedModel

import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.families import Family, load_family
from dslm.shrink import encoder, rebuild, reconstruct, rotate, survivors, weights, writers
from dslm.shrink.fold import select
from dslm.shrink.select import top
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from growing import grow, load, logits, off
from pico import make_model, read_config, save, tokens
from ruling import WRONG, Rule, instead

# ---------------------------------------------------------------- what stays: the rest does next to nothing


def quiet_group(model: PreTrainedModel) -> None:
    """The first key-value head's query heads write next to nothing."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, :16] *= 1e-6


def quiet_layer(model: PreTrainedModel) -> None:
    """The middle layer writes next to nothing."""
    layer = model.model.layers[1]
    if hasattr(layer, "post_feedforward_layernorm"):  # it scales with 1 + gain what is written
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.fill_(-1 + 1e-6)
    else:
        layer.self_attn.o_proj.weight *= 1e-6
        layer.mlp.down_proj.weight *= 1e-6


def quiet_channels(model: PreTrainedModel) -> None:
    """Eight channels carry next to nothing."""
    model.model.embed_tokens.weight[:, 10:18] *= 1e-6
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight[10:18] = -1 + 1e-6  # it scales with 1 + gain what is written
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight[10:18] *= 1e-6


def few_directions(model: PreTrainedModel) -> None:
    """The stream lies in 24 of all directions, none of them along a channel."""
    square = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    some = torch.linalg.qr(square).Q[:, :24]
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ some @ some.T)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(some @ some.T @ writer.weight)


def any_heads(choose_heads):
    """Query heads by their scores alone; key-value heads by their numbers."""

    def choose(scores_H, kv_heads, target_heads, target_kv):
        heads = select(top(scores_H, target_heads), len(scores_H))
        return {"heads": heads, "kv_heads": select(torch.arange(target_kv), kv_heads)}

    return choose


def interleaved_groups(choose_heads):
    """As if query head h belonged to key-value head h modulo their number."""

    def choose(scores_H, kv_heads, target_heads, target_kv):
        order = torch.arange(len(scores_H)).view(-1, kv_heads).T.flatten()
        found = choose_heads(scores_H[order], kv_heads, target_heads, target_kv)
        return found | {"heads": select(order[found["heads"].keep_T], len(scores_H))}

    return choose


def first_of_each_list(resized_config):
    def shrunk(table, config, sizes, layers):
        return resized_config(table, config, sizes, tuple(range(len(layers))))

    return shrunk


def without_amplitude(choose_channels):
    return lambda scores, power, count: select(choose_channels(scores, power, count).keep_T, len(scores))


ANY_HEADS = instead(survivors, "choose_heads", any_heads)
INTERLEAVED = instead(survivors, "choose_heads", interleaved_groups)
FIRST_LAYERS = instead(weights, "resized_config", first_of_each_list)
UNSCALED_CHANNELS = instead(encoder, "choose_channels", without_amplitude)
UNSCALED_DIRECTIONS = instead(
    encoder, "rotation", lambda make: lambda *a: dataclasses.replace(make(*a), amplitude=1.0)
)
GAINS_STAY = instead(rotate.Rotation, "prepared", lambda _: lambda rotation, weights: weights)
CHANNELS_ONLY = instead(Family, "rotates", lambda _: False)
NARROW = {"hidden_size": 24}
ONE_GROUP = {"num_attention_heads": 2, "num_key_value_heads": 1}
TWO_LAYERS = {"num_hidden_layers": 2}
CUTS = {
    "grouped queries: heads of the group": Rule("llama", "gqa-tied", ANY_HEADS, ONE_GROUP, quiet_group),
    "grouped queries: which are neighbours": Rule("llama", "gqa-tied", INTERLEAVED, ONE_GROUP, quiet_group),
    "sliding windows of kept layers": Rule("gemma3_text", "windows", FIRST_LAYERS, TWO_LAYERS, quiet_layer),
    "rotation of kept layers": Rule("smollm3", "nope-tied", FIRST_LAYERS, TWO_LAYERS, quiet_layer),
    "mean square of channels": Rule("gemma2", "no-softcaps", UNSCALED_CHANNELS, NARROW, quiet_channels),
    "mean square of directions": Rule("llama", "mha", UNSCALED_DIRECTIONS, NARROW, few_directions),
    "directions, not channels": Rule("llama", "gqa-tied", CHANNELS_ONLY, NARROW, few_directions),
    "a norm's gain goes into its readers": Rule("qwen3", "mha", GAINS_STAY, NARROW, few_directions),
}  # fmt: skip


@pytest.mark.parametrize("rule", CUTS.values(), ids=CUTS.keys())
def test_a_cut_needs_the_rule(rule, tmp_path, monkeypatch):
    model = rule.save(tmp_path / "source")
    source = open_folder(tmp_path / "source")

    def distance(name: str) -> float:
        shrinking.down(source, tmp_path / name, source.sizes.replace(**rule.sizes), method="slice")
        return off(logits(model, tokens(6)), logits(load(tmp_path / name, torch.float32), tokens(6)))

    assert distance("with") < WRONG / 10
    rule.without(monkeypatch)
    assert distance("without") > 10 * WRONG


@pytest.mark.parametrize(
    ("family", "variant"),
    [("gemma2", "no-softcaps"), ("smollm3", "nope-interval")],
)
def test_layers_that_are_told_by_their_number_stay_what_they_are(family, variant, tmp_path, monkeypatch):
    """Older files list nothing by layer."""
    model = make_model(family, variant)
    with torch.no_grad():
        quiet_layer(model)
    model.save_pretrained(tmp_path / "source")
    config = read_config(tmp_path / "source")
    for key in load_family(family).per_layer:
        del config[key]
    (tmp_path / "source/config.json").write_text(json.dumps(config), encoding="utf-8")
    source, ids = open_folder(tmp_path / "source"), tokens(6)
    assert torch.equal(logits(load(source.folder, torch.float32), ids), logits(model, ids))

    def distance(name: str) -> float:
        shrinking.down(source, tmp_path / name, source.sizes.replace(**TWO_LAYERS), method="slice")
        return off(logits(model, ids), logits(load(tmp_path / name, torch.float32), ids))

    assert distance("with") < WRONG / 10
    monkeypatch.setattr(weights, "listed_config", lambda family, config: config)
    assert distance("without") > 10 * WRONG


# ---------------------------------------------------------------- re-reading


def constant_units(model: PreTrainedModel) -> None:
    """Half of the units hardly vary, but what they add is large."""
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight[:24] *= 1e-4
        layer.mlp.up_proj.weight[:24] *= 1e-4
        layer.mlp.gate_proj.bias[:24] = 4.0
        layer.mlp.up_proj.bias[:24] = 1.0


def constant_block(model: PreTrainedModel) -> None:
    """What the second block adds is large and the same for all tokens."""
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        linear.weight.zero_()
        linear.bias.normal_(0, 3, generator=torch.Generator().manual_seed(0))


def sinks(model: PreTrainedModel) -> None:
    """One token in five has a stream that is thousands of times larger from the first block on."""
    model.model.embed_tokens.weight[:, 0] = 0
    model.model.embed_tokens.weight[3:23, 0] = 0.5
    model.model.layers[0].mlp.gate_proj.weight[:, 0] *= 300
    model.model.layers[0].mlp.up_proj.weight[:, 0] *= 300


def branch_gains(model: PreTrainedModel, change) -> None:
    """Change the gains of the norms between writers and stream, of each layer; Gemma keeps them as gain - 1."""
    stored = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    for number, layer in enumerate(model.model.layers):
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.copy_(change(number, norm.weight + stored) - stored)


def uneven_gains(model: PreTrainedModel) -> None:
    """From channel to channel the gains differ, as they do in trained models."""
    draw = torch.Generator().manual_seed(3)
    branch_gains(model, lambda number, gain: gain * torch.randn(len(gain), generator=draw).exp())


def narrow_and_uneven(model: PreTrainedModel) -> None:
    uneven_gains(model)
    quiet_channels(model)


def louder_again(model: PreTrainedModel) -> None:
    """The middle layer adds nearly what the first one did, four times over."""
    model.model.embed_tokens.weight *= 30  # beside which the first layer changes little
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    branch_gains(model, lambda number, gain: gain * 4 if number == 1 else gain)


NO_NORM = instead(writers, "before_norm", lambda _: lambda wanted, usual, gain, eps, weight: (wanted, weight))
GAIN_STAYS = instead(writers.StreamWriter, "refit_gain", lambda _: lambda writer, streams, ridges: None)
WITH_MEAN = instead(survivors, "less_constant", lambda _: lambda gram: gram[:-1, :-1])


def no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reconstruct, writers):
        monkeypatch.setattr(module, "bias_of", lambda walk, name: None)


ALL_ALIKE = instead(rebuild, "Recipe", lambda recipe: lambda: recipe(weigh_tokens=False))
UNITS = {"intermediate_size": 24}
FITS = {
    "a norm behind the writers": Rule("olmo2", "mha", NO_NORM, UNITS, uneven_gains, worse=1.4),
    "norms on both sides": Rule("gemma2", "windows-softcaps", NO_NORM, UNITS, uneven_gains, worse=1.4),
    "norms of fewer channels": Rule(
        "gemma2", "windows-softcaps", NO_NORM, NARROW, narrow_and_uneven, worse=5
    ),
    "its gain follows": Rule("olmo2", "mha", GAIN_STAYS, TWO_LAYERS, louder_again, worse=1.7),
    "its gain and one follow": Rule("gemma3_text", "windows", GAIN_STAYS, TWO_LAYERS, louder_again, worse=2),
    "biases are fitted": Rule("llama", "biases", no_bias, TWO_LAYERS, constant_block, worse=10),
    "a bias makes up for means": Rule("llama", "biases", WITH_MEAN, UNITS, constant_units, worse=1.5),
    "large tokens count no more": Rule("llama", "mha", ALL_ALIKE, UNITS, sinks, worse=10),
}


@pytest.mark.parametrize("rule", FITS.values(), ids=FITS.keys())
def test_a_fit_needs_the_rule(rule, tmp_path, monkeypatch):
    rule.save(tmp_path)
    source = open_folder(tmp_path)
    target = source.sizes.replace(**rule.sizes)
    layers = (0, 2) if target.num_hidden_layers == 2 else (0, 1, 2)
    windows, stream = shrinking.windows(fit=64), None
    if "hidden_size" in rule.sizes:
        survey = encoder.survey_stream(Walk(Stored(source)), windows.fit, tied=target.tied)
        stream = survey.encoder(target.hidden_size)

    def error() -> float:
        return sum(rebuild.rebuild(Stored(source), target, layers, stream, windows, tmp_path).errors)

    with_rule = error()
    rule.without(monkeypatch)
    assert error() > rule.worse * with_rule


@pytest.fixture
def trained_copies(tmp_path):
    """A model of 96 units, 48 of which were copies before all weights got some noise, and the sizes before it grew."""
    small = shrinking.make_source(tmp_path / "small", "llama", "mha")
    grow(small, tmp_path / "grown", small.sizes.replace(intermediate_size=96))
    model, generator = load(tmp_path / "grown", torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    return open_folder(save(model, tmp_path / "trained")), small.sizes


ALONE = instead(survivors, "keep_units", lambda keep: lambda *a, refitted: keep(*a, refitted=False))


def test_of_units_that_were_copies_before_they_were_trained_one_stays(trained_copies, tmp_path, monkeypatch):
    source, target = trained_copies

    def error() -> float:
        windows = shrinking.windows(fit=64)
        return rebuild.rebuild(Stored(source), target, (0, 1, 2), None, windows, tmp_path).errors[-1]

    together = error()
    ALONE(monkeypatch)
    assert error() > 4 * together


@pytest.mark.parametrize(("length", "differs"), [(191, False), (192, True)])
def test_too_few_tokens_do_not_tell_what_units_make_up_for(
    length, differs, trained_copies, tmp_path, monkeypatch
):
    """Two tokens for each of 96 units are enough."""
    source, target = trained_copies
    few = rebuild.Windows(tokens(1, rows=1, length=length), tokens(2, rows=2, length=length), {})

    def error() -> float:
        return rebuild.rebuild(Stored(source), target, (0, 1, 2), None, few, tmp_path).errors[-1]

    found = error()
    ALONE(monkeypatch)
    assert (error() != found) == differs
