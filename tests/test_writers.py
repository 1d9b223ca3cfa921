"""What a writer aims at behind a norm, and the norm's gain, against what they must be."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.shrink.memo import Memo
from dslm.shrink.streams import Streams
from dslm.shrink.tap import anatomy
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.shrink.writers import Writer, before_norm, side


def normed(u_NY: torch.Tensor) -> torch.Tensor:
    return u_NY / u_NY.square().mean(dim=1, keepdim=True).sqrt()


def test_a_norm_gives_what_is_wanted_to_first_order():
    draw = torch.Generator().manual_seed(0)
    usual, other = (torch.randn(50, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    usual *= torch.rand(50, 1, generator=draw, dtype=torch.float64) * 9 + 1
    gain = torch.rand(16, generator=draw, dtype=torch.float64) + 0.5
    gain[::2] *= -1
    wanted = gain * normed(normed(usual) + 1e-4 * other)
    asked, counts = before_norm(wanted, usual, gain, torch.arange(1.0, 51.0))
    missing, before = (wanted - gain * normed(u) for u in (asked, usual))
    assert missing.abs().max() < 0.1 * before.abs().max()
    assert torch.allclose(counts * usual.square().mean(dim=1), torch.arange(1.0, 51.0).double())


def test_a_silent_channel_is_not_asked_for_what_it_cannot_give():
    usual, gain = torch.ones(1, 4), torch.tensor([1.0, 1.0, 1.0, 1e-6])
    asked, _ = before_norm(gain + 1.0, usual, gain, None)
    assert asked[0, :3].min() > 1.5
    assert asked[0, 3] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("family", ["olmo2", "gemma2", "gemma3_text"])
def test_a_gain_that_was_changed_is_found_again(family, position, tmp_path):
    """Nothing else differs, so least squares without a ridge gives the teacher's own; on other windows too."""
    variant = next(variant for name, variant in pico.CASES if name == family)
    stored = Stored(shrinking.make_source(tmp_path / "source", family, variant))
    teacher, student = Walk(stored), Walk(stored)
    ids = pico.tokens(rows=12, length=20)
    stream = teacher.embed(ids)
    student.embed(ids)
    with teacher.block(1), student.block(1):
        streams = Streams(stream, teacher.run(1, stream), stream.clone(), fit=8, held_out=4)
        names = anatomy(teacher, 1, stream[:1]).writers
        sides = [
            side(walk, 1, names, position, Memo(walk, (12, 20), tmp_path, name))
            for walk, name in ((teacher, "a"), (student, "b"))
        ]
        writer = Writer(
            *sides, last=position == 1, follows=True, encoded=lambda x: x, weighted=lambda x: None
        )
        norm = sides[1].norm
        assert norm is not None
        before = student.get(norm).clone()
        assert writer.refit_gain(streams, (0.0,)) is None or torch.allclose(
            writer.refit_gain(streams, (0.0,)), before, atol=1e-5
        )
        student.put(norm, before + 0.3 * torch.randn(len(before), generator=torch.Generator().manual_seed(1)))
        assert torch.allclose(writer.refit_gain(streams, (3.0, 0.0)), before, atol=1e-4)
