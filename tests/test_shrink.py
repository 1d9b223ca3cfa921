"""Shrinking gives plain checkpoints that stock transformers loads, and re-reading beats cutting."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import DslmError
from dslm.plan import plan_shrink
from dslm.shrink import refine
from dslm.shrink import steps as steps_module
from dslm.shrink import walk as walk_module
from dslm.shrink.calibrate import calibration
from dslm.shrink.down import shrink_checkpoint
from dslm.shrink.encoder import survey_stream
from dslm.shrink.rebuild import rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.shrink_plan import SELF
from growing import grow, load, logits, off

every_variant = pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)


@every_variant
def test_a_walk_is_the_stock_model_bit_for_bit(family, variant, tmp_path):
    model = pico.make_model(family, variant)
    walk = Walk(Stored(open_folder(pico.save(model, tmp_path))))
    ids = pico.tokens(rows=3)
    with torch.no_grad():
        expected = model(ids).logits.double()
    assert torch.equal(shrinking.rebuilt_logits(walk, ids), expected)


# Where a tied table has no gain before the output the stream stays, and with it the heads where it is their product.
STAYS = {
    ("olmo", "tied-biases"): ["hidden", "all"],
    ("opt", "post-norm"): ["heads", "kv_heads", "hidden", "all"],
    ("opt", "plain-norms"): ["heads", "kv_heads", "hidden", "all"],
    ("opt", "no-final-norm"): ["heads", "kv_heads", "hidden", "all"],
}


@every_variant
def test_every_axis_gives_a_plain_checkpoint(family, variant, tmp_path):
    """Loads in stock transformers with nothing missing or left over, generates, and is what was walked and reported."""
    source = shrinking.make_source(tmp_path / "source", family, variant)
    draw = random.Random(f"{family} {variant}")
    ids, stays = pico.tokens(rows=2, length=18), []
    held_out = calibration(source, [SELF], samples=24, length=20, seed=0).held_out
    before = shrinking.loss_of(load(source.folder, torch.float32), held_out)
    for axis in shrinking.AXES:
        target = shrinking.draw_smaller(source, axis, draw)
        if target is None:
            stays.append(axis)
            continue
        out = tmp_path / axis
        done = shrinking.down(source, out, target)
        small = open_folder(out)
        assert small.sizes == target
        model = load(out, torch.float32)
        found = logits(model, ids)
        assert torch.isfinite(found).all()
        assert off(shrinking.rebuilt_logits(Walk(Stored(small)), ids), found) < 1e-5
        assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
        assert done.parameters[1] == sum(p.numel() for p in model.parameters()) < done.parameters[0]
        assert done.losses["held-out"] == pytest.approx(
            (before, shrinking.loss_of(model, held_out)), rel=1e-5
        )
        again = pico.save(model, tmp_path / f"{axis}-again")
        assert off(found, logits(load(again, torch.float32), ids)) < 1e-6
    assert stays == STAYS.get((family, variant), [])


@pytest.mark.parametrize("axis", ["ffn", "kv_heads", "layers", "hidden"])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "gqa-tied"),
        ("qwen3", "mha"),
        ("olmo2", "mha"),
        ("gemma2", "windows-softcaps"),
        ("phi", "mha"),
    ],
)
def test_re_reading_beats_cutting_on_other_tokens(family, variant, axis, tmp_path):
    """On windows that neither fitted nor chose anything."""
    source = shrinking.make_source(tmp_path / "source", family, variant)
    target = shrinking.draw_smaller(source, axis, random.Random(axis))
    if target is None:
        pytest.skip(f"{family} cannot shrink {axis} alone")
    found = {}
    for method in ("slice", "reconstruct"):
        plan = plan_shrink("tiny", source.family, source.config, target, method=method, samples=96, length=20)
        shrink_checkpoint(source, plan, tmp_path / method, device="cpu")
        ids = pico.tokens(5, rows=8, length=20)
        teacher = torch.log_softmax(logits(load(source.folder, torch.float32), ids), -1)
        student = torch.log_softmax(logits(load(tmp_path / method, torch.float32), ids), -1)
        found[method] = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    assert found["reconstruct"] < found["slice"]


@pytest.mark.parametrize("method", ["slice", "reconstruct"])
@pytest.mark.parametrize(
    ("family", "variant", "axis"),
    [("llama", "gqa-tied", "hidden"), ("phi", "mha", "layers"), ("gemma2", "windows-softcaps", "all")],
)
def test_what_is_reported_is_the_loss_of_what_was_written(family, variant, axis, method, tmp_path):
    """In the source's dtype: what rounding costs is in the report, and blocks are fitted behind rounded ones."""
    model = pico.make_model(family, variant).bfloat16()
    source = open_folder(pico.save(model, tmp_path / "source"))
    target = shrinking.draw_smaller(source, axis, random.Random(axis))
    assert target is not None
    done = shrinking.down(source, tmp_path / "out", target, method=method)
    text = calibration(source, [SELF], samples=24, length=20, seed=0)
    walk = Walk(Stored(open_folder(tmp_path / "out")))
    logits_BTV = shrinking.rebuilt_logits(walk, text.held_out)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), text.held_out[:, 1:].flatten())
    assert done.losses["held-out"][1] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize(("family", "variant"), [("olmo2", "mha"), ("gemma2", "windows-softcaps")])
def test_new_blocks_behind_silent_norms_stay_when_something_else_goes(family, variant, tmp_path):
    """What they add is zero, since the gain of the norm behind their writers is."""
    small = shrinking.make_source(tmp_path / "small", family, variant)
    deep = small.sizes.replace(num_hidden_layers=4)
    source = open_folder(grow(small, tmp_path / "deep", deep))
    shrinking.down(source, tmp_path / "out", deep.replace(intermediate_size=32))
    assert torch.isfinite(logits(load(tmp_path / "out", torch.float32), pico.tokens())).all()


def test_the_same_plan_gives_the_same_bytes(tmp_path):
    source = shrinking.make_source(tmp_path / "source", "llama", "gqa-tied")
    target = source.sizes.replace(intermediate_size=30, num_hidden_layers=2)
    for name in ("one", "two"):
        shrinking.down(source, tmp_path / name, target, seed=3)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "one/dslm.json").read_text() == (tmp_path / "two/dslm.json").read_text()


def test_a_slice_only_cuts(tmp_path):
    """What the baseline keeps are numbers of the source, untouched."""
    source = shrinking.make_source(tmp_path / "source", "llama", "mha")
    target = source.sizes.replace(intermediate_size=20, num_attention_heads=2, num_key_value_heads=2)
    shrinking.down(source, tmp_path / "out", target, method="slice")
    before, after = (
        load_file(source.folder / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    for name, weight in after.items():
        assert torch.isin(weight, before[name]).all(), name


@pytest.mark.parametrize(
    ("family", "variant", "share"),
    [("llama", "mha", 0.8), ("olmo2", "mha", 0.8), ("gemma2", "windows-softcaps", 0.9)],
)
def test_dropped_layers_are_made_up_for_by_the_block_before_them(family, variant, share, tmp_path):
    """The target of a block before a gap is the stream behind the gap, behind a norm too."""
    source = shrinking.make_source(tmp_path / "source", family, variant)
    target = source.sizes.replace(num_hidden_layers=2)
    errors = {}
    for drift in (True, False):
        found = rebuild(
            Stored(source),
            target,
            (0, 2),
            None,
            shrinking.windows(fit=64),
            tmp_path,
            recipe=Recipe(drift=drift).closed(),
        )
        errors[drift] = found.errors[0]
    assert errors[True] < share * errors[False]


@pytest.mark.parametrize(
    ("family", "variant", "share"),
    [("gemma2", "windows-softcaps", 0.95), ("olmo2", "mha", 0.98), ("phi", "mha", 0.95)],
)
def test_a_block_before_a_gap_learns_what_is_gone(family, variant, share, tmp_path):
    """Its few steps do what no choice of its writers can, in front of a norm too."""
    source = shrinking.make_source(tmp_path / "source", family, variant)
    target, windows = source.sizes.replace(num_hidden_layers=2), shrinking.windows(fit=256)
    errors = {}
    for steps in (0, 300):
        found = rebuild(
            Stored(source), target, (0, 2), None, windows, tmp_path, recipe=Recipe(gap_steps=steps)
        )
        errors[steps] = found.errors[0]
    assert errors[300] < share * errors[0]


def test_blocks_beside_a_gap_take_steps_and_farther_ones_behind_it(tmp_path, monkeypatch):
    small = shrinking.make_source(tmp_path / "small", "llama", "mha")
    source = open_folder(grow(small, tmp_path / "source", small.sizes.replace(num_hidden_layers=5)))
    target, windows = source.sizes.replace(num_hidden_layers=4), shrinking.windows(fit=64)
    taken = []

    def note(walk, layer, *arguments, steps, step=refine.STEP, **options):
        taken.append((layer, steps, step))
        return 1.0, 1.0

    def steps_of(**recipe) -> list[tuple[int, int, float]]:
        taken.clear()
        rebuild(Stored(source), target, (0, 1, 3, 4), None, windows, tmp_path, recipe=Recipe(**recipe))
        return list(taken)

    monkeypatch.setattr(steps_module, "refine", note)
    passes = steps_module.PASSES * len(windows.fit) // (2048 // windows.fit.shape[1])
    assert 10 < passes < 20
    last = (3, passes, refine.STEP)
    assert steps_of(gap_steps=10, last_steps=9) == [
        (1, 10, refine.FAR),
        (2, 10, refine.FAR),
        (3, 9, refine.STEP),
    ]
    assert steps_of() == [(1, passes, refine.FAR), (2, passes, refine.FAR), last]
    far = [(layer, passes, refine.FAR) for layer in (1, 2)]
    assert steps_of(refine=11) == [(0, 11, refine.STEP), *far, last]
    assert steps_of(refine=11, last_steps=0) == [(0, 11, refine.STEP), *far, (3, 11, refine.FAR)]
    assert steps_of(solve=False) == []


@pytest.mark.parametrize(
    ("family", "variant", "hidden"),
    [("llama", "gqa-tied", 28), ("gemma2", "windows-softcaps", 32), ("phi", "mha", 28)],
)
def test_the_last_block_learns_what_the_model_says(family, variant, hidden, tmp_path, monkeypatch):
    """With the norm behind it and nothing else; at five positions of twenty, since logits are large."""
    monkeypatch.setattr(refine, "_LOGITS", 102 * 5 * pico.VOCAB)
    source = shrinking.make_source(tmp_path / "source", family, variant)
    weights, windows = Stored(source), shrinking.windows(fit=256)
    target = source.sizes.replace(intermediate_size=24, hidden_size=hidden)
    stream = None
    if hidden != source.sizes.hidden_size:
        stream = survey_stream(Walk(weights), windows.fit, tied=target.tied).encoder(hidden)
    found = {}
    for steps in (0, 300):
        room = tmp_path / str(steps)
        room.mkdir()
        recipe = Recipe(last_steps=steps)
        found[steps] = rebuild(weights, target, (0, 1, 2), stream, windows, room, recipe=recipe)
    changed = {
        name
        for name in source.family.layout(found[0].config)
        if not torch.equal(found[0].read(name), found[300].read(name))
    }
    assert changed
    assert all(".2." in name or name.startswith(source.family.final_norm) for name in changed), changed
    assert any(name.startswith(source.family.final_norm) for name in changed)
    ends = {steps: far_from(source, small, windows.held_out) for steps, small in found.items()}
    assert ends[300] < 0.995 * ends[0]
    assert found[300].errors[:-1] == found[0].errors[:-1]
    assert found[300].errors[-1] != found[0].errors[-1]


def far_from(source, small, ids: torch.Tensor) -> float:
    """``KL(source || small)`` in nats per token."""
    wanted, given = (
        shrinking.rebuilt_logits(Walk(one), ids).double().log_softmax(-1) for one in (Stored(source), small)
    )
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.mark.parametrize(
    ("asked", "there", "taken"), [("auto", "mps", "cpu"), ("auto", "cuda", "cuda"), ("cpu", "cpu", "cpu")]
)
def test_a_shrink_runs_where_float64_is(asked, there, taken, monkeypatch):
    monkeypatch.setattr(walk_module, "pick_device", lambda name: torch.device(there))
    assert walk_module.walking_device(asked) == torch.device(taken)


def test_a_device_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr(walk_module, "pick_device", torch.device)
    with pytest.raises(DslmError, match="--device cpu"):
        walk_module.walking_device("mps")
