"""Which units stay when the others are refitted: backward elimination against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from dslm.shrink import select
from dslm.shrink.select import less_constant, surviving_units, unit_scores

DAMPING = 0.1


def draw(units, outputs, tokens=400, seed=0):
    """Correlated activations and a writer."""
    generator = torch.Generator().manual_seed(seed)
    x_NM = torch.randn(tokens, units // 2, generator=generator) @ torch.randn(
        units // 2, units, generator=generator
    )
    x_NM += 0.5 * torch.randn(tokens, units, generator=generator)
    return (x_NM.T @ x_NM).double(), torch.randn(outputs, units, generator=generator)


def loss_without(gram_MM, writer_DM, gone):
    """What leaving some units out costs after the columns of the others were solved for, the penalty included."""
    whole_MM = gram_MM + DAMPING * torch.diag(gram_MM.diagonal())
    kept = [unit for unit in range(len(gram_MM)) if unit not in gone]
    root_MM = torch.linalg.cholesky(whole_MM).T
    goal_MD = root_MM @ writer_DM.double().T
    solved = torch.linalg.lstsq(root_MM[:, kept], goal_MD).solution
    return float((goal_MD - root_MM[:, kept] @ solved).square().sum())


def one_by_one(gram_MM, writer_DM, count):
    gone = []
    while len(gram_MM) - len(gone) > count:
        losses = {
            j: loss_without(gram_MM, writer_DM, [*gone, j]) for j in range(len(gram_MM)) if j not in gone
        }
        gone.append(min(losses, key=losses.get))
    return gone


@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_units_go_in_the_order_of_brute_force(seed, at_once, monkeypatch):
    monkeypatch.setattr(select, "_AT_ONCE", at_once)
    gram_MM, writer_DM = draw(14, 5, seed=seed)
    for count in (13, 9, 4, 1):
        gone = one_by_one(gram_MM, writer_DM, count)
        found = surviving_units(gram_MM.clone(), writer_DM, count)
        assert found.tolist() == [unit for unit in range(14) if unit not in gone]


def test_the_number_of_rounds_is_limited(monkeypatch):
    gram_MM, writer_DM = draw(80, 4)
    seen = []
    first = select._first_to_go
    monkeypatch.setattr(select, "_AT_ONCE", 1)
    monkeypatch.setattr(select, "_ROUNDS", 5)
    monkeypatch.setattr(select, "_first_to_go", lambda *arguments: seen.append(1) or first(*arguments))
    assert len(surviving_units(gram_MM.clone(), writer_DM, 30)) == 30
    assert len(seen) == 5


def test_many_rounds_lose_no_more_than_one_by_one():
    gram_MM, writer_DM = draw(90, 8)
    found = surviving_units(gram_MM.clone(), writer_DM, 40).tolist()
    loss = loss_without(gram_MM, writer_DM, [unit for unit in range(90) if unit not in found])
    assert loss <= 1.02 * loss_without(gram_MM, writer_DM, one_by_one(gram_MM, writer_DM, 40))
    alone = unit_scores(gram_MM.diagonal() / 400, writer_DM).topk(40).indices.tolist()
    assert loss < 0.8 * loss_without(gram_MM, writer_DM, [unit for unit in range(90) if unit not in alone])


def test_of_two_equal_units_one_stays():
    gram_MM, writer_DM = draw(12, 6)
    twins = torch.arange(12)
    twins[3] = 7
    writer_DM[:, [3, 7]] *= 3
    assert len({3, 7} & set(surviving_units(gram_MM[twins][:, twins], writer_DM, 5).tolist())) == 1


def test_units_that_are_always_zero_go_first():
    gram_MM, writer_DM = draw(10, 4)
    idle = torch.ones(10, dtype=torch.float64)
    idle[[2, 8]] = 0.0
    left = surviving_units(gram_MM * idle * idle[:, None], writer_DM, 8)
    assert left.tolist() == [0, 1, 3, 4, 5, 6, 7, 9]


def test_the_scale_of_the_gram_does_not_matter():
    gram_MM, writer_DM = draw(20, 4)
    left = surviving_units(gram_MM.clone(), writer_DM, 7)
    assert torch.equal(surviving_units(1e-6 * gram_MM, writer_DM, 7), left)


def test_a_bias_makes_up_for_the_mean():
    x_NX = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    with_one = torch.cat([x_NX, torch.ones(50, 1, dtype=torch.float64)], dim=1)
    covariance = 50 * torch.cov(x_NX.T, correction=0)
    assert torch.allclose(less_constant(with_one.T @ with_one), covariance)


def test_units_that_hardly_vary_go_first_where_a_bias_makes_up_for_them():
    generator = torch.Generator().manual_seed(0)
    x_NM = torch.randn(200, 8, generator=generator)
    x_NM[:, [1, 5]] = 4 + 1e-4 * x_NM[:, [1, 5]]
    x_NM[:, 6] = 7.0
    with_one = torch.cat([x_NM, torch.ones(200, 1)], dim=1).double()
    left = surviving_units(less_constant(with_one.T @ with_one), torch.randn(3, 8, generator=generator), 5)
    assert left.tolist() == [0, 2, 3, 4, 7]
