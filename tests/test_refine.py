"""A block takes optimiser steps, which count only if they help on windows that it was not fitted on."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.shrink import refine as module
from dslm.shrink import steps as steps_module
from dslm.shrink import walk as walk_module
from dslm.shrink.refine import kl_loss, refine, steps_for, stream_loss
from dslm.shrink.survey import walked_loss
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored

FIT, HELD_OUT = 24, range(24, 30)


@pytest.mark.parametrize("helps", [True, False], ids=["they help", "they harm"])
def test_steps_are_kept_where_they_help_on_held_out_windows(helps, tmp_path):
    walk = Walk(Stored(shrinking.make_source(tmp_path, "llama", "mha")))
    inputs = walk.embed(pico.tokens(rows=30, length=20))
    with walk.block(0):
        names = walk.names(0)
        before = {name: walk.get(name).clone() for name in names}
        now = walk.run(0, inputs)
        goals = inputs + 0.5 * (now - inputs)  # half of what the block adds
        if not helps:
            goals[HELD_OUT.start :] = now[HELD_OUT.start :]
        start, end = refine(
            walk, 0, inputs, stream_loss(lambda windows: goals[windows]), FIT, HELD_OUT, steps=20
        )
        changed = [name for name in names if not torch.equal(walk.get(name), before[name])]
        scale = goals[HELD_OUT.start :].square().mean(dim=-1, keepdim=True)
        error = ((walk.run(0, inputs) - goals)[HELD_OUT.start :].square() / scale).mean()
    assert end == pytest.approx(float(error), rel=1e-4, abs=1e-9)
    if helps:
        assert end < 0.8 * start
        assert changed == names
    else:
        assert end == start
        assert changed == []


def test_steps_are_judged_by_the_numbers_that_are_kept(tmp_path):
    """They help, but what is kept of them is far off."""
    walk = Walk(Stored(shrinking.make_source(tmp_path, "llama", "mha")))
    inputs = walk.embed(pico.tokens(rows=30, length=20))
    with walk.block(0):
        before = {name: walk.get(name).clone() for name in walk.names(0)}
        goals = inputs + 0.5 * (walk.run(0, inputs) - inputs)
        loss = stream_loss(lambda windows: goals[windows])
        start, end = refine(walk, 0, inputs, loss, FIT, HELD_OUT, steps=20, kept=lambda _, values: 9 * values)
        assert end == start
        assert all(torch.equal(walk.get(name), values) for name, values in before.items())


@pytest.mark.parametrize(("family", "variant"), [("gemma2", "windows-softcaps"), ("phi", "mha")])
def test_what_is_said_is_compared_in_pieces(family, variant, tmp_path, monkeypatch):
    """Against all logits of the stock class at once; a piece is of both windows, and the last one is short."""
    monkeypatch.setattr(module, "_LOGITS", 7 * pico.VOCAB)
    source = shrinking.make_source(tmp_path, family, variant)
    walk, model = Walk(Stored(source)), pico.make_model(family, variant)
    ids, positions = pico.tokens(rows=5, length=20), torch.tensor([3, 0, 19, 8, 7])
    stream = walk.embed(ids)
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            stream = walk.run(layer, stream)
    windows = torch.tensor([4, 1])
    out = stream.roll(1, dims=1)  # each position says what the one before it should
    with walk.head():
        off = walk.logits(out)[windows][:, positions].log_softmax(-1)
        found = kl_loss(walk, walk, lambda some: stream[some])(out[windows][:, positions], windows, positions)
    with torch.no_grad():
        said = model(input_ids=ids).logits[windows][:, positions].log_softmax(-1)
    expected = (said.exp() * (said - off)).sum() / len(positions)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(found) > 0.1


@pytest.mark.parametrize(("family", "variant"), [("gemma2", "windows-softcaps"), ("phi", "mha")])
def test_a_loss_is_taken_in_pieces(family, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(walk_module, "_LOGITS", 7 * pico.VOCAB)
    ids, model = pico.tokens(rows=3, length=20), pico.make_model(family, variant)
    found = walked_loss(Walk(Stored(shrinking.make_source(tmp_path, family, variant))), ids)
    with torch.no_grad():
        assert found == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_steps_see_the_text_so_often_at_most():
    assert steps_for(windows=64, length=1024, passes=20) == 20 * 64 // 2
    assert steps_for(windows=14, length=4096, passes=20) == 20 * 14
    assert steps_for(windows=1, length=16, passes=20) == 1


@pytest.mark.parametrize(("asked", "steps"), [(None, 4), (0, 0), (6, 6)])
def test_a_shrink_takes_as_many_steps_as_were_asked_for(asked, steps, tmp_path, monkeypatch):
    """Of 24 windows of 20 tokens 21 are to fit on, and a step sees 102: 20 passes are 4 steps."""
    taken = []
    source = shrinking.make_source(tmp_path / "source", "llama", "mha")

    def note(*arguments, steps, **options):
        taken.append(steps)
        return 1.0, 1.0

    monkeypatch.setattr(steps_module, "refine", note)
    shrinking.down(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=2), refine=asked)
    assert set(taken) == ({steps} if steps else set())
    assert len(taken) <= 2, "none are taken while layers are chosen"
