"""A block takes optimiser steps, which count only if they help on windows that it was not fitted on."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.shrink import reconstruct
from dslm.shrink.refine import refine, steps_for, stream_losses
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored

FIT, HELD_OUT = 24, range(24, 30)


@pytest.mark.parametrize("helps", [True, False], ids=["they help", "they harm"])
def test_steps_are_kept_where_they_help_on_held_out_windows(helps, tmp_path):
    walk = Walk(Stored(shrinking.make_source(tmp_path, "llama", "mha")))
    inputs = walk.embed(pico.tokens(rows=30, length=20))
    with walk.block(0):
        names = [name for name, place in walk.places.items() if place.line.layer == 0]
        before = {name: walk.get(name).clone() for name in names}
        now = walk.run(0, inputs)
        goals = inputs + 0.5 * (now - inputs)  # half of what the block adds
        if not helps:
            goals[HELD_OUT.start :] = now[HELD_OUT.start :]
        start, end = refine(
            walk, 0, inputs, stream_losses(lambda windows: goals[windows]), FIT, HELD_OUT, steps=20
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

    monkeypatch.setattr(reconstruct, "refine", note)
    shrinking.down(source, tmp_path / "out", source.sizes.replace(num_hidden_layers=2), refine=asked)
    assert set(taken) == ({steps} if steps else set())
    assert len(taken) <= 2, "none are taken while layers are chosen"
