"""Rotating the stream: which families can, and that a stream of few directions comes out whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import CheckpointError
from dslm.families import Family
from dslm.families.axes import Role
from dslm.shrink.encoder import survey_stream
from dslm.shrink.fold import Fold
from dslm.shrink.rotate import Rotation, geometric_mean, rotation
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Folded, Stored
from growing import load, logits, off

ROTATING = {"gemma", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}


def few_directions(folder, count: int = 24) -> None:
    """Make a checkpoint whose stream lies in some directions, none of them along a channel."""
    source = open_folder(folder)
    width = source.sizes.hidden_size
    square = torch.randn(width, width, generator=torch.Generator().manual_seed(5))
    some = torch.linalg.qr(square).Q[:, :count]
    tensors = load_file(folder / "model.safetensors")
    for name, line in source.family.layout(source.config).items():
        for position, axis in enumerate(line.spec.axes):
            if axis.dimensions == ("hidden",) and axis.role in (Role.WRITE, Role.BIAS):
                tensors[name] = (tensors[name].transpose(position, -1) @ some @ some.T).transpose(
                    position, -1
                )
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


NARROWED = [
    case for case in pico.CASES if case[0] in ROTATING and case[1] != "longrope"
]  # its factors fit one width


@pytest.mark.parametrize("method", ["slice", "reconstruct"])
@pytest.mark.parametrize(("family", "variant"), NARROWED)
def test_a_stream_of_few_directions_comes_out_whole(family, variant, method, tmp_path):
    pico.save(pico.make_model(family, variant), tmp_path / "source")
    few_directions(tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(hidden_size=24)
    shrinking.down(source, tmp_path / "out", target, method=method)
    ids = pico.tokens(6)
    before, after = (logits(load(tmp_path / name, torch.float32), ids) for name in ("source", "out"))
    assert off(before, after) < 1e-4


@pytest.mark.parametrize(("family", "variant"), pico.CASES)
def test_families_whose_norms_follow_a_rotation_are_rotated(family, variant, tmp_path):
    source = shrinking.make_source(tmp_path, family, variant)
    survey = survey_stream(Walk(Stored(source)), pico.tokens(1), tied=source.sizes.tied)
    assert type(survey.encoder(source.sizes.hidden_size - 1)) is (Rotation if family in ROTATING else Fold)


@pytest.mark.parametrize(("family", "variant"), [case for case in pico.CASES if case[0] in ROTATING])
def test_a_full_rotation_keeps_the_function_of_a_model_with_two_tables(family, variant, tmp_path):
    """Of one with a tied table too, once the output has its own."""
    source = shrinking.make_source(tmp_path, family, variant)
    weights, ids, sizes = Stored(source), pico.tokens(6), source.sizes.replace(tied=False)
    turned = survey_stream(Walk(weights), ids, tied=False).encoder(sizes.hidden_size)
    assert turned.basis_TS.abs().max() < 0.99  # no channel stays by itself
    folded = Folded(weights, sizes, tuple(range(sizes.num_hidden_layers)), {}, turned)
    before, after = (shrinking.rebuilt_logits(Walk(one), ids) for one in (weights, folded))
    assert off(before, after) < 1e-4


def test_a_table_that_does_not_fit_the_model_is_refused(tmp_path, monkeypatch):
    source = shrinking.make_source(tmp_path, "olmo2", "mha")
    monkeypatch.setattr(Family, "rotates", True)
    with pytest.raises(CheckpointError, match="norms of block 0 are not where the table of olmo2 says"):
        survey_stream(Walk(Stored(source)), pico.tokens(1), tied=False)


def test_the_last_gain_is_diagonal_in_the_basis_that_a_tied_table_gets():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=draw, dtype=torch.float64) * torch.arange(1, 13)
    gain = torch.rand(12, generator=draw, dtype=torch.float64)
    found = rotation(x.T @ x, None, gain, 7, {})
    seen = found.basis_TS @ gain.diag() @ found.basis_TS.T
    assert torch.allclose(seen, found.gain(gain, over_heads=False).diag())
    assert torch.allclose(found.basis_TS @ found.basis_TS.T, torch.eye(7, dtype=torch.float64))


def test_a_rotation_keeps_the_directions_with_the_largest_mean_square():
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    gram = basis @ torch.tensor([9.0, 8.0, 7.0, 0.3, 0.2, 0.1]).double().diag() @ basis.T
    found = rotation(gram, None, torch.ones(6), 3, {})
    assert torch.allclose(found.basis_TS.T @ found.basis_TS, basis[:, :3] @ basis[:, :3].T)
    assert found.amplitude == pytest.approx((3 / 6 / (24 / 24.6)) ** 0.5)


def test_a_rotation_keeps_directions_by_what_the_loss_feels_of_the_stream_in_them():
    basis = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    gram = basis @ torch.tensor([9.0, 8.0, 1.0, 0.6, 0.5, 0.0]).double().diag() @ basis.T
    felt = basis @ torch.tensor([0.1, 3.0, 0.1, 0.2, 7.0, 99.0]).double().diag() @ basis.T
    kept = basis[:, [0, 1, 4]]  # products of 0.9, 24, 0.1, 0.12, 3.5 and 0
    for scale in (1e-8, 1.0, 1e8):
        found = rotation(gram, scale * felt, torch.ones(6), 3, {})
        assert torch.allclose(found.basis_TS.T @ found.basis_TS, kept @ kept.T)
        assert found.amplitude == pytest.approx((3 / 6 / (17.5 / 19.1)) ** 0.5)


def test_the_geometric_mean_is_the_one_that_solves_its_equation():
    """``M A^-1 M = B``, on what the first does not leave out."""
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(9, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    first, second = first.T @ first, second.T @ second
    mean = geometric_mean(first, second)
    assert torch.allclose(mean @ torch.linalg.inv(first) @ mean, second)
    assert torch.allclose(mean, geometric_mean(second, first))
    flat = torch.zeros(6, 6, dtype=torch.float64)
    flat[:5, :5] = first
    wide = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    wide = wide @ wide.T
    wide[:5, :5] = second
    assert torch.allclose(geometric_mean(flat, wide)[:5, :5], mean)
    assert geometric_mean(flat, wide)[5].abs().max() < 1e-6


def test_what_is_dropped_costs_hardly_more_than_the_least_that_is_found():
    """Against descent over all bases, for moments that do not quite commute."""
    draw = torch.Generator().manual_seed(0)
    turn, free = (torch.randn(12, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(turn).Q
    gram = turn @ (torch.logspace(0, -3, 12, dtype=torch.float64)[:, None] * turn.T)
    turn = turn @ torch.linalg.matrix_exp(0.03 * (free - free.T))
    spread = torch.logspace(0, -3, 12, dtype=torch.float64)[torch.randperm(12, generator=draw)]
    felt = turn @ (spread[:, None] * turn.T)

    def cost(basis):
        dropped = torch.eye(12, dtype=torch.float64) - basis.T @ basis
        return torch.trace(dropped @ gram @ dropped @ felt)

    free = free[:, :5].clone().requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.02)
    for _ in range(800):
        basis = torch.linalg.qr(free).Q.T
        optimiser.zero_grad()
        cost(basis).backward()
        optimiser.step()
    least = float(cost(basis.detach()))
    found, alone = (rotation(gram, f, None, 5, {}).basis_TS for f in (felt, None))
    assert cost(found) < 1.5 * least
    assert cost(alone) > 2 * least
