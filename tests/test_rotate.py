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
from dslm.shrink.rotate import Rotation, rotation
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
    found = rotation(x.T @ x, gain, 7, {})
    seen = found.basis_TS @ gain.diag() @ found.basis_TS.T
    assert torch.allclose(seen, found.gain(gain, over_heads=False).diag())
    assert torch.allclose(found.basis_TS @ found.basis_TS.T, torch.eye(7, dtype=torch.float64))


def test_a_rotation_keeps_the_directions_with_the_largest_mean_square():
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    gram = basis @ torch.tensor([9.0, 8.0, 7.0, 0.3, 0.2, 0.1]).double().diag() @ basis.T
    found = rotation(gram, torch.ones(6), 3, {})
    assert torch.allclose(found.basis_TS.T @ found.basis_TS, basis[:, :3] @ basis[:, :3].T)
    assert found.amplitude == pytest.approx((3 / 6 / (24 / 24.6)) ** 0.5)
