"""Which layers go: those that the block before can make up for, told by the loss of bridged and of rebuilt models."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.shrink import depth
from dslm.shrink.approximate import approximate
from dslm.shrink.depth import bridged_losses, gaps_of, likely_layers
from dslm.shrink.rebuild import Windows, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.survey import removal_losses
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from growing import grow, load

IDS, FIT = pico.tokens(1, rows=4, length=16), pico.tokens(2, rows=12, length=20)
RUNS = [frozenset((i, i + 1)) for i in range(1, 6)]


def deep_source(folder, family="llama", variant="mha", layers=7, seed=3):
    """Seven layers, all of which do something."""
    small = shrinking.make_source(folder / "small", family, variant)
    grow(small, folder / "deep", small.sizes.replace(num_hidden_layers=layers))
    loaded = load(folder / "deep", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.layers.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return open_folder(pico.save(loaded, folder / "random")), loaded


def bridged_by_hand(model, gone):
    """The loss without some layers, each gap bridged: with hidden states of the stock model and lstsq in float64."""
    layers, hooks = model.model.layers, []
    streams, units = [], []

    def note(found):
        return lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"])

    for place in [*layers, model.model.norm]:
        hooks.append(place.register_forward_pre_hook(note(streams), with_kwargs=True))
    for layer in layers:
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(note(units), with_kwargs=True))
    with torch.no_grad():
        model(FIT)
    for hook in hooks:
        hook.remove()
    hooks = []
    for start, stop in gaps_of(gone):
        x, before, after = (
            t.flatten(0, 1).double() for t in (units[start - 1], streams[start], streams[stop])
        )
        weight = (1 / after.square().mean(1)).sqrt()[:, None]
        gram = (x * weight).T @ (x * weight)
        ridge = gram.diagonal() * x.shape[1] / x.shape[0] + gram.diagonal().mean() * 1e-9 + 1e-30
        rows = torch.cat([x * weight, torch.diag(ridge.sqrt())])
        goal = torch.cat([(after - before) * weight, x.new_zeros(x.shape[1], before.shape[1])])
        bridge = torch.linalg.lstsq(rows, goal).solution.float()
        writer = layers[start - 1].mlp.down_proj
        hooks.append(writer.register_forward_hook(lambda module, args, out, b=bridge: out + args[0] @ b))
        for layer in layers[start:stop]:
            skip = lambda module, args, kwargs, out: args[0] if args else kwargs["hidden_states"]  # noqa: E731
            hooks.append(layer.register_forward_hook(skip, with_kwargs=True))
    with torch.no_grad():
        loss = float(model(IDS, labels=IDS).loss)
    for hook in hooks:
        hook.remove()
    return loss


def test_bridged_losses_are_those_of_the_bridged_model(tmp_path):
    source, model = deep_source(tmp_path)
    choices = [frozenset(c) for c in ([1], [3, 4], [6], [1, 4], [1, 2, 5, 6], [2, 4, 6])]
    found = bridged_losses(Walk(Stored(source)), IDS, FIT, choices)
    assert found == pytest.approx([bridged_by_hand(model, gone) for gone in choices], rel=1e-4)
    raw = removal_losses(Walk(Stored(source)), IDS, choices)
    assert max(abs(a - b) for a, b in zip(found, raw, strict=True)) > 0.01


@pytest.mark.parametrize(("gone", "gaps"), [([], ()), ([1], ((1, 2),)), ([1, 2, 5], ((1, 3), (5, 6)))])
def test_gaps(gone, gaps):
    assert gaps_of(frozenset(gone)) == gaps


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_so_many_layers_stay_in_order_and_the_first_always(count, tmp_path):
    source, _ = deep_source(tmp_path)
    kept, *_ = likely_layers(Walk(Stored(source)), FIT, count)
    assert len(kept) == count
    assert kept[0] == 0
    assert list(kept) == sorted(set(kept))


def test_layers_that_add_nothing_go_wherever_they_are(tmp_path):
    """Four of seven in two places: no single run of four is free."""
    _, model = deep_source(tmp_path)
    with torch.no_grad():
        for layer in (1, 2, 5, 6):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    source = open_folder(pico.save(model, tmp_path / "idle"))
    assert likely_layers(Walk(Stored(source)), FIT, 3)[0] == (0, 3, 4)


def windows_of(source):
    return Windows(pico.tokens(5, rows=24, length=24), pico.tokens(6, rows=12, length=24), {})


def rebuilt_losses(source, target, choices, folder):
    losses = []
    for number, layers in enumerate(choices):
        (folder / str(number)).mkdir()
        found = rebuild(Stored(source), target, layers, None, windows_of(source), folder / str(number))
        losses.append(found.losses["held-out"][1])
    return losses


def test_of_the_likely_choices_the_one_that_is_best_after_rebuilding_is_taken(tmp_path):
    source, _ = deep_source(tmp_path, seed=7)
    target = source.sizes.replace(num_hidden_layers=5, intermediate_size=source.sizes.intermediate_size // 2)
    likely = likely_layers(Walk(Stored(source)), windows_of(source).fit, 5)[:2]
    losses = rebuilt_losses(source, target, likely, tmp_path)
    best = likely[losses.index(min(losses))]
    assert best != likely[0]  # otherwise this shows nothing
    found = approximate(Stored(source), target, windows_of(source), tmp_path, recipe=Recipe())
    assert found.base.layers == best
    assert found.losses["held-out"][1] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.parametrize(
    ("costs", "likely"),
    [
        ([1.2, 1.09, 2.0, 1.0, 1.05], [3, 4, 1]),
        ([5.0, 1.0, 3.0, 2.0, 4.0], [1, 3]),
        ([1.04, 1.03, 1.02, 1.01, 1.0], [4, 3, 2, 1]),
        ([0.1, -0.1, 0.0, 0.2, 0.3], [1, 2]),
        ([0.1, -1.0, -0.95, -0.92, 0.3], [1, 2, 3]),
    ],
)
def test_choices_that_cost_nearly_as_little_as_the_best_are_likely_too(costs, likely, tmp_path, monkeypatch):
    def losses(walk, ids, fit, removals, progress):
        assert removals == [frozenset(), *RUNS]
        return [4.0, *(4.0 + cost for cost in costs)]

    monkeypatch.setattr(depth, "bridged_losses", losses)
    source, _ = deep_source(tmp_path)
    kept = likely_layers(Walk(Stored(source)), FIT, 5)
    assert [set(range(7)) - set(layers) for layers in kept] == [RUNS[i] for i in likely]


def test_slicing_takes_the_layers_without_which_the_loss_is_least(tmp_path):
    source, _ = deep_source(tmp_path)
    target = source.sizes.replace(num_hidden_layers=5)
    found = approximate(Stored(source), target, windows_of(source), tmp_path, recipe=Recipe(solve=False))
    fit = windows_of(source).fit
    losses = removal_losses(Walk(Stored(source)), fit[:, : fit.shape[1] // 4], RUNS)
    gone = RUNS[losses.index(min(losses))]
    assert found.base.layers == tuple(layer for layer in range(7) if layer not in gone)


def test_a_block_that_adds_the_same_to_all_tokens_is_bridged_by_a_bias(tmp_path):
    model = pico.make_model("llama", "biases")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            linear.weight.zero_()
            linear.bias.normal_(0, 3, generator=generator)
    source = open_folder(pico.save(model, tmp_path))
    (bridged,) = bridged_losses(Walk(Stored(source)), IDS, FIT, [frozenset({1})])
    whole, raw = removal_losses(Walk(Stored(source)), IDS, [frozenset(), frozenset({1})])
    assert abs(bridged - whole) < 0.02 * abs(raw - whole)


def test_behind_post_norms_nothing_is_bridged(tmp_path, monkeypatch):
    source, _ = deep_source(tmp_path, "olmo2", "mha")
    walk = Walk(Stored(source))
    monkeypatch.setattr(depth, "bridged_losses", lambda *arguments: pytest.fail("bridged"))
    losses = removal_losses(walk, FIT[:, :5], RUNS)
    gone = RUNS[losses.index(min(losses))]
    assert likely_layers(walk, FIT, 5)[0] == tuple(layer for layer in range(7) if layer not in gone)
