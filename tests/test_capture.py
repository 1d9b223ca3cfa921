"""Captures of what cuts cost: predictions from them, and their cache."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

import pico
import searching
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import VerificationError
from dslm.load import load_model
from dslm.plan import plan_growth
from dslm.resizing import resize
from dslm.shrink import capture as capture_module
from dslm.shrink import search as search_module
from dslm.shrink import select, silence, survivors
from dslm.shrink.capture import Capture, capture, damage
from dslm.shrink.importance import importance
from dslm.shrink.rebuild import Windows, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.search import predict, search
from dslm.shrink.silence import silenced_losses, stand_ins
from dslm.shrink.tap import with_one
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from searching import MODELS, NAMES, captured, sizes_of, total

cache, llama = searching.cache, searching.llama  # fixtures

# ---------------------------------------------------------------- captures and predictions


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=NAMES)
def test_cutting_nothing_costs_nothing_and_cutting_more_never_costs_less(family, variant, tmp_path):
    weights = Stored(shrinking.make_source(tmp_path / "tiny", family, variant))
    sizes = sizes_of(weights)
    found = capture(
        Walk(weights), pico.tokens(1, rows=3), pico.tokens(rows=3), sizes, Recipe(by_loss=False), {}
    )
    assert predict(found, sizes) == found.base
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    for series in (
        [sizes.replace(num_hidden_layers=n) for n in range(1, 4)],
        [sizes.replace(intermediate_size=n) for n in range(1, 49)],
        [sizes.replace(hidden_size=n) for n in range(1, 33)],
        [sizes.replace(num_attention_heads=sizes.num_key_value_heads * n) for n in range(1, group + 1)],
        [
            sizes.replace(num_key_value_heads=n, num_attention_heads=n * group)
            for n in range(1, sizes.num_key_value_heads + 1)
        ],
    ):
        for solve in (True, False):
            losses = [predict(found, shape, solve=solve) for shape in series]
            assert all(math.isfinite(loss) for loss in losses)
            assert losses[-1] == found.base
            assert all(smaller >= larger for smaller, larger in pairwise(losses))
            assert len(series) == 1 or losses[0] > losses[-1]


def test_damage_goes_through_its_points_and_on_beyond_them():
    quarter, half, most = (1 - math.exp(-depth) for depth in (0.25, 0.5, 1.0))
    points = ((quarter, 0.01), (half, 0.04), (most, 0.04))
    assert [damage(points, share) for share, _ in points] == pytest.approx([nats for _, nats in points])
    between, below, beyond = (1 - math.exp(-depth) for depth in (0.375, 0.125, 2.0))
    assert damage(points, between) == pytest.approx(
        0.0225
    )  # a power law of -log of what stays, here a square
    assert damage(points, below) == pytest.approx(0.0025)
    assert damage(points, beyond) == pytest.approx(0.08)  # at least linear
    assert damage(points, 0.0) == 0.0
    assert damage(((half, 0.4),), quarter) == pytest.approx(0.1)
    assert damage((), 0.1) == math.inf


def test_a_cut_that_overflows_is_hopeless_and_not_free():
    assert capture_module._rising({0.1: math.nan, 0.05: -1.0}) == ((0.05, 1e-4), (0.1, 100.0))


CUTS = {
    "units": {"intermediate_size": 17},
    "groups": {"num_key_value_heads": 1, "num_attention_heads": 2},
    "heads": {"num_attention_heads": 2},
    "both": {"intermediate_size": 30, "num_attention_heads": 2},
}


@pytest.mark.parametrize("by_loss", [False, True], ids=["norms", "loss"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("family", "variant"), [m for m in MODELS if m[0] not in ("opt", "gpt_neox")])
def test_silencing_is_what_slicing_does(family, variant, cut, by_loss, tmp_path):
    weights = Stored(shrinking.make_source(tmp_path / "tiny", family, variant))
    sizes, fit, ids = sizes_of(weights), pico.tokens(1, rows=3, length=20), pico.tokens(2, rows=3, length=20)
    target, walk = sizes.replace(**CUTS[cut]), Walk(weights)
    felt = importance(walk, fit, tmp_path) if by_loss else {}
    layers, recipe = tuple(range(sizes.num_hidden_layers)), Recipe(solve=False)
    silenced, whole = silenced_losses(walk, fit, ids, [target, sizes], recipe, felt)
    windows = Windows(fit, ids, {})
    sliced = rebuild(weights, target, layers, None, windows, tmp_path, recipe=recipe, felt=felt)
    assert sliced.losses["held-out"] == pytest.approx((whole, silenced), abs=1e-5)
    assert abs(silenced - whole) > 1e-4


DOUBLED = {
    "units": {"intermediate_size": 96},
    "groups": {"num_attention_heads": 8, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("doubled", DOUBLED)
def test_silencing_copies_costs_little_if_the_others_stand_in(doubled, llama, tmp_path):
    source = llama.checkpoint
    before, grown = source.sizes, source.sizes.replace(**DOUBLED[doubled])
    resize(source, plan_growth(source.name, source.family, source.config, grown), tmp_path / "big")
    walk = Walk(Stored(open_folder(tmp_path / "big")))
    fit, ids = pico.tokens(1, rows=16, length=20), pico.tokens(2, rows=16, length=20)
    costs = []
    for recipe in (Recipe(by_loss=False), Recipe(solve=False)):
        silenced, whole = silenced_losses(walk, fit, ids, [before, grown], recipe, {})
        costs.append(abs(silenced - whole))
    assert costs[0] < costs[1] / 5
    assert costs[1] > 0.04


def test_what_stands_in_is_damped_least_squares():
    """Against the rows that damping adds to the tokens, one by one, in float64."""
    draw = torch.Generator().manual_seed(0)
    x_NX = (
        torch.randn(40, 7, generator=draw, dtype=torch.float64) @ torch.randn(7, 7, generator=draw).double()
    )
    kept_X = torch.tensor([True, False, True, True, False, True, True])
    for one in (False, True):
        full_NF = with_one(x_NX + 3) if one else x_NX
        kept_F = torch.cat([kept_X, kept_X.new_ones(int(one))])
        varying_NF = full_NF - full_NF.mean(dim=0) if one else full_NF
        extra = (0.1 * varying_NF.square().sum(dim=0)).sqrt()
        rows = torch.cat([full_NF[:, kept_F], extra.diag()[kept_F][:, kept_F]])
        wanted = torch.cat([full_NF[:, :7][:, ~kept_X], torch.zeros(int(kept_F.sum()), 2).double()])
        best = torch.linalg.lstsq(rows, wanted).solution
        found = stand_ins(full_NF.T @ full_NF, kept_X)
        assert found.shape == best.shape == (int(kept_F.sum()), 2)
        assert torch.allclose(found, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["gqa-tied", "biases"])
def test_what_goes_is_what_a_rebuilding_chooses(variant, tmp_path, monkeypatch):
    weights = Stored(shrinking.make_source(tmp_path / "tiny", "llama", variant))
    sizes, windows, walk = sizes_of(weights), shrinking.windows(), Walk(weights)
    target = sizes.replace(intermediate_size=30, num_attention_heads=2, num_key_value_heads=1)
    felt, recipe = importance(walk, windows.fit, tmp_path), Recipe().closed()
    chosen = []
    for module, name in ((select, "surviving_units"), (survivors, "surviving_heads")):
        monkeypatch.setattr(module, name, _noted(getattr(module, name), chosen))
    silenced_losses(walk, windows.fit, windows.held_out, [target], recipe, felt)
    ours = chosen.copy()
    chosen.clear()
    layers = tuple(range(sizes.num_hidden_layers))
    rebuild(weights, target, layers, None, windows, tmp_path, recipe=recipe, felt=felt)
    assert len(ours) == 2 * len(layers)
    assert ours == chosen
    few = windows.fit[:3]
    chosen.clear()
    silenced_losses(walk, few, windows.held_out, [target], recipe, felt)
    assert chosen == [], "too few tokens to tell what others make up for"


def _noted(function, chosen):
    def call(*given):
        found = function(*given)
        chosen.append(found.tolist() if isinstance(found, torch.Tensor) else found["heads"].keep_T.tolist())
        return found

    return call


def test_a_one_stands_behind_what_a_writer_with_a_bias_reads(tmp_path, monkeypatch):
    """A constant that stands in for what goes is as good as another bias of the writer."""
    source = shrinking.make_source(tmp_path / "tiny", "llama", "biases")
    weights, windows, seen = Stored(source), shrinking.windows(), {}

    def constant(gram_FF, kept_X):
        assert len(gram_FF) == len(kept_X) + 1
        fit_KL = torch.zeros(int(kept_X.sum()) + 1, int((~kept_X).sum()), dtype=torch.float64)
        fit_KL[-1] = 0.25
        seen[len(seen)] = ~kept_X
        return fit_KL

    monkeypatch.setattr(silence, "stand_ins", constant)
    target = source.sizes.replace(intermediate_size=30)
    (silenced,) = silenced_losses(Walk(weights), windows.fit, windows.held_out, [target], Recipe(), {})
    model = load_model(source, dtype="float32", device="cpu")
    with torch.no_grad():
        for layer, lost_X in seen.items():
            down = model.model.layers[layer].mlp.down_proj
            down.bias += 0.25 * down.weight[:, lost_X].sum(dim=1)
            down.weight[:, lost_X] = 0.0
        loss = model(input_ids=windows.held_out, labels=windows.held_out).loss
    assert silenced == pytest.approx(float(loss), abs=1e-5)


def test_a_stream_is_surveyed_on_some_tokens_and_measured_on_others(llama, monkeypatch):
    surveyed, measured = [], []
    survey = capture_module.survey_stream
    monkeypatch.setattr(
        capture_module, "survey_stream", lambda w, ids, **o: surveyed.append(ids) or survey(w, ids, **o)
    )
    for name in ("walked_loss", "removal_losses"):
        losses = getattr(capture_module, name)
        monkeypatch.setattr(
            capture_module, name, lambda w, ids, *o, losses=losses: measured.append(ids) or losses(w, ids, *o)
        )
    fit, ids = pico.tokens(1, rows=4), pico.tokens(2, rows=2)
    capture(Walk(llama), fit, ids, sizes_of(llama), Recipe(), {})
    assert [seen.tolist() for seen in surveyed] == [fit.tolist()]
    assert len(measured) == 2 + 3, "the whole model, its layers, and three widths"
    assert all(seen.tolist() == ids.tolist() for seen in measured)


def test_what_is_chosen_and_what_stands_in_go_by_the_recipe(llama):
    windows = shrinking.windows()
    recipes = Recipe(), Recipe(by_loss=False), Recipe(weigh_tokens=False), Recipe(solve=False)
    found = [captured(llama, windows, recipe).damages for recipe in recipes]
    assert len({one["units"] for one in found}) == 4
    assert len({one["layers"] for one in found}) == 1


def test_a_model_without_a_loss_is_refused(tmp_path, monkeypatch, llama):
    monkeypatch.setattr(capture_module, "walked_loss", lambda *_: math.nan)
    with pytest.raises(VerificationError, match="loss is not finite"):
        captured(llama, shrinking.windows())


# ---------------------------------------------------------------- the cache


def test_the_next_target_needs_no_walk(llama, cache, monkeypatch):
    windows = shrinking.windows()
    first = captured(llama, windows)
    assert len(list(cache.iterdir())) == 1

    def walk(*_):
        raise AssertionError("walked again")

    monkeypatch.setattr(capture_module, "Walk", walk)
    monkeypatch.setattr(search_module, "Walk", walk)
    assert captured(llama, windows) == first
    assert search(llama, round(0.8 * total(llama)), windows, build=0, device="cpu").shapes
    with pytest.raises(AssertionError, match="walked again"):
        captured(llama, shrinking.windows(seed=1))


def test_other_weights_with_the_same_headers_are_another_model(llama, tmp_path, cache):
    model = pico.make_model("llama", "gqa-tied", seed=1)
    other = Stored(open_folder(pico.save(model, tmp_path / "other"), name="tiny"))
    windows = shrinking.windows()
    assert captured(llama, windows) != captured(other, windows)
    assert len(list(cache.iterdir())) == 2


def test_one_changed_number_is_another_model(llama, tmp_path, cache):
    model = pico.make_model("llama", "gqa-tied")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 7] += 1
    other = Stored(open_folder(pico.save(model, tmp_path / "other"), name="tiny"))
    windows = shrinking.windows()
    assert captured(llama, windows) != captured(other, windows)
    assert len(list(cache.iterdir())) == 2


def _edited(change):
    def edit(text: bytes) -> bytes:
        held = json.loads(text)
        change(held)
        return json.dumps(held).encode()

    return edit


BROKEN = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "not text": lambda text: b"\xff\x00",
    "a list": lambda text: b"[]",
    "no numbers": _edited(lambda held: held.update(base="x")),
    "not finite": _edited(lambda held: held.update(base=math.nan)),
    "an axis is missing": _edited(lambda held: held["damages"].pop("units")),
    "points are no pairs": _edited(lambda held: held["damages"].update(units=[[1]])),
    "points fall": _edited(lambda held: held["damages"].update(units=[[0.1, 2.0], [0.2, 1.0]])),
    "damages are null": _edited(lambda held: held.update(damages=None)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_is_made_anew(name, llama, cache):
    first = captured(llama, shrinking.windows())
    (place,) = cache.iterdir()
    sound = place.read_bytes()
    place.write_bytes(BROKEN[name](sound))
    assert captured(llama, shrinking.windows()) == first
    assert place.read_bytes() == sound
    assert list(cache.iterdir()) == [place]


def test_a_cache_that_cannot_be_written_is_done_without(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "file"))
    assert isinstance(captured(llama, shrinking.windows()), Capture)


def test_same_capture_every_time(llama, cache):
    found = []
    for _ in range(2):
        torch.manual_seed(len(found))
        found.append(captured(llama, shrinking.windows()))
        next(cache.iterdir()).unlink()
    assert found[0] == found[1]
