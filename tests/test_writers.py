"""What a writer aims at behind a norm, and the norm's gain, against what they must be."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.shrink.memo import Memo
from dslm.shrink.streams import Streams
from dslm.shrink.tap import anatomy, tap
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.shrink.writers import StreamWriter, before_norm, side

EPSILON = 1e-5


def normed(u_NY: torch.Tensor) -> torch.Tensor:
    return u_NY / (u_NY.square().mean(dim=1, keepdim=True) + EPSILON).sqrt()


@pytest.fixture
def usual() -> torch.Tensor:
    """From tokens that are nearly silent before the norm to loud ones."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(50, 16, generator=draw, dtype=torch.float64) * torch.logspace(-4, 1, 50)[:, None].double()
    )


@pytest.fixture
def gain() -> torch.Tensor:
    found = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    found[::2] *= -1
    return found


def test_a_norm_gives_the_direction_that_is_wanted(usual, gain):
    """Whatever it is; a little less of channels with a small gain."""
    other = torch.randn(50, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = gain * normed(other)
    asked, counts = before_norm(wanted[20:], usual[20:], gain, EPSILON, torch.arange(1.0, 31.0))
    cosine = torch.nn.functional.cosine_similarity(gain * normed(asked), wanted[20:])
    assert cosine.min() > 0.999
    size = usual[20:].square().mean(dim=1) + EPSILON
    assert torch.allclose(asked.square().mean(dim=1) + EPSILON, size, rtol=0.1)
    assert torch.allclose(counts * size, torch.arange(1.0, 31.0).double())


def test_what_the_teachers_norm_gives_asks_for_what_its_writer_gives(usual, gain):
    asked, _ = before_norm(gain * normed(usual), usual, gain, EPSILON, None)
    assert torch.allclose(asked, usual, rtol=1e-9)


def test_a_silent_channel_is_not_asked_for_what_it_cannot_give():
    usual, gain = torch.ones(1, 4), torch.tensor([1.0, 1.0, 1.0, 1e-6])
    asked, _ = before_norm(gain + 1.0, usual, gain, EPSILON, None)
    assert asked[0, 0] > 1.5 * asked[0, 3] > 0


def test_behind_a_norm_that_is_silent_nothing_changes():
    """New blocks of these families begin so."""
    usual = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    asked, _ = before_norm(torch.ones(3, 4), usual, torch.zeros(4), EPSILON, None)
    assert torch.allclose(asked, usual)


@pytest.fixture(params=["olmo2", "gemma2", "gemma3_text"])
def sides(request, tmp_path):
    """Both models of a pair, the same, at their second block; streams that differ; and where they are one."""
    variant = next(variant for name, variant in pico.CASES if name == request.param)
    stored = Stored(shrinking.make_source(tmp_path / "source", request.param, variant))
    teacher, student = Walk(stored), Walk(stored)
    stream = teacher.embed(pico.tokens(rows=12, length=20))
    student.embed(pico.tokens(rows=12, length=20))
    with teacher.block(1), student.block(1):
        names = anatomy(teacher, 1, stream[:1]).writers
        streams = Streams(stream, teacher.run(1, stream), stream.clone(), fit=8, held_out=4)

        def pair(position: int, weighted=lambda x: None) -> StreamWriter:
            both = (
                side(walk, 1, names, position, Memo(walk, (12, 20), tmp_path, name))
                for walk, name in ((teacher, "a"), (student, "b"))
            )
            return StreamWriter(
                *both, last=position == 1, follows=True, encoded=lambda x: x, weighted=weighted
            )

        yield pair, streams


def test_an_output_counts_by_the_gain_behind_it(sides):
    pair, _ = sides
    writer = pair(1)
    student = writer.student.walk
    gain = student.get(writer.student.norm) + student.weights.family.gain_offset
    student.put(writer.student.norm, 3 * gain - student.weights.family.gain_offset)
    assert torch.allclose(writer.outputs_count(), 9 * gain**2, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 1])
def test_a_gain_that_was_changed_is_found_again(position, sides):
    """Nothing else differs, so least squares without a ridge gives the teacher's own; on other windows too."""
    pair, streams = sides
    writer = pair(position)
    student, norm = writer.student.walk, writer.student.norm
    before = student.get(norm).clone()
    student.put(norm, before + 0.3 * torch.randn(len(before), generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(writer.refit_gain(streams, (3.0, 0.0)), before, atol=1e-4)


def test_a_gain_is_weighted_least_squares_per_channel(sides):
    """Against a solution in float64 from the stacked activations, where the student's stream is another."""
    pair, streams = sides
    streams.student += 0.5 * torch.randn(streams.student.shape, generator=torch.Generator().manual_seed(1))
    writer = pair(1, lambda x_ND: x_ND.abs().mean(dim=1))
    student, norm = writer.student.walk, writer.student.norm
    offset, stored = student.weights.family.gain_offset, student.get(norm).clone()
    seen = tap(student, 1, streams.student, outputs=writer.student.adds)
    u, goal = seen[f"{norm}:out"].double() / (stored + offset).double(), streams.ahead.flatten(0, 1)
    wanted = goal - streams.student.flatten(0, 1) - seen[f"{writer.student.adds[0]}:out"]
    weight = goal.abs().mean(dim=1).double()
    found = writer.refit_gain(streams, (0.25,))
    assert torch.equal(student.get(norm), stored)
    fit = slice(0, 8 * 20)
    for channel in range(len(stored)):
        x, y, w = u[fit, channel], wanted[fit, channel].double(), weight[fit]
        g = float(stored[channel]) + offset
        best = torch.linalg.lstsq((w.sqrt() * x)[:, None], w.sqrt() * y).solution
        tried = g + (float(best) - g) / 1.25
        x, y, w = u[8 * 20 :, channel], wanted[8 * 20 :, channel].double(), weight[8 * 20 :]
        better = float((w * (y - tried * x).square()).sum()) < float((w * (y - g * x).square()).sum())
        assert float(found[channel]) + offset == pytest.approx(tried if better else g, abs=1e-3)
