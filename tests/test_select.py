"""Which units stay when the others are refitted: backward elimination against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from dslm.shrink import select
from dslm.shrink.select import keep_units, less_constant, surviving_units

DAMPING = 0.1


def draw(units, tokens=400, seed=0):
    """The second moment of correlated activations, and prices."""
    generator = torch.Generator().manual_seed(seed)
    x_NM = torch.randn(tokens, units // 2, generator=generator) @ torch.randn(
        units // 2, units, generator=generator
    )
    x_NM += 0.5 * torch.randn(tokens, units, generator=generator)
    return (x_NM.T @ x_NM).double(), torch.rand(units, generator=generator).double()


def left_of(gram_MM, unit, others):
    """The square of what a unit gives that a combination of some others does not, the penalty included."""
    whole_MM = gram_MM + DAMPING * torch.diag(gram_MM.diagonal())
    root_MM = torch.linalg.cholesky(whole_MM).T
    solved = torch.linalg.lstsq(root_MM[:, others], root_MM[:, [unit]]).solution
    return float((root_MM[:, [unit]] - root_MM[:, others] @ solved).square().sum())


def one_by_one(gram_MM, price_M, count):
    left = list(range(len(gram_MM)))
    while len(left) > count:
        losses = {j: float(price_M[j]) * left_of(gram_MM, j, [k for k in left if k != j]) for j in left}
        left.remove(min(losses, key=losses.get))
    return left


@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_units_go_in_the_order_of_brute_force(seed, at_once, monkeypatch):
    monkeypatch.setattr(select, "_AT_ONCE", at_once)
    gram_MM, price_M = draw(14, seed=seed)
    for count in (13, 9, 4, 1):
        found = surviving_units(gram_MM.clone(), price_M, count)
        assert found.tolist() == one_by_one(gram_MM, price_M, count)


def test_the_number_of_rounds_is_limited(monkeypatch):
    gram_MM, price_M = draw(80)
    seen = []
    first = select._first_to_go
    monkeypatch.setattr(select, "_AT_ONCE", 1)
    monkeypatch.setattr(select, "_ROUNDS", 5)
    monkeypatch.setattr(select, "_first_to_go", lambda *arguments: seen.append(1) or first(*arguments))
    assert len(surviving_units(gram_MM.clone(), price_M, 30)) == 30
    assert len(seen) == 5


def test_many_rounds_choose_as_one_by_one_does():
    gram_MM, price_M = draw(90)
    price_M = (0.8 + 0.2 * price_M) / gram_MM.diagonal()
    found = surviving_units(gram_MM.clone(), price_M, 40).tolist()
    assert len(set(found) & set(one_by_one(gram_MM, price_M, 40))) >= 39
    alone = (price_M * gram_MM.diagonal()).topk(40).indices.tolist()
    assert len(set(found) & set(alone)) < 36


def test_of_two_equal_units_one_stays():
    gram_MM, price_M = draw(12)
    twins = torch.arange(12)
    twins[3] = 7
    price_M[[3, 7]] = 1.0
    assert len({3, 7} & set(surviving_units(gram_MM[twins][:, twins], price_M, 5).tolist())) == 1


def test_units_that_are_always_zero_go_first():
    gram_MM, price_M = draw(10)
    idle = torch.ones(10, dtype=torch.float64)
    idle[[2, 8]] = 0.0
    left = surviving_units(gram_MM * idle * idle[:, None], price_M, 8)
    assert left.tolist() == [0, 1, 3, 4, 5, 6, 7, 9]


def test_the_scale_of_the_gram_and_of_the_prices_does_not_matter():
    gram_MM, price_M = draw(20)
    left = surviving_units(gram_MM.clone(), price_M, 7)
    assert torch.equal(surviving_units(1e-6 * gram_MM, 1e9 * price_M, 7), left)


def test_a_bias_makes_up_for_the_mean():
    x_NX = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    with_one = torch.cat([x_NX, torch.ones(50, 1, dtype=torch.float64)], dim=1)
    covariance = 50 * torch.cov(x_NX.T, correction=0)
    assert torch.allclose(less_constant(with_one.T @ with_one), covariance)


def test_units_that_hardly_vary_go_first_where_a_bias_makes_up_for_them():
    """However much the loss feels of them."""
    generator = torch.Generator().manual_seed(0)
    x_NM = torch.randn(200, 8, generator=generator)
    x_NM[:, [1, 5]] = 4 + 1e-4 * x_NM[:, [1, 5]]
    x_NM[:, 6] = 7.0
    felt_M = torch.ones(8)
    felt_M[[1, 5, 6]] = 20.0
    with_one = torch.cat([x_NM, torch.ones(200, 1)], dim=1).double()
    assert keep_units(with_one.T @ with_one, felt_M, 5).keep_T.tolist() == [0, 2, 3, 4, 7]
    without = keep_units((x_NM.T @ x_NM).double(), felt_M, 5).keep_T.tolist()
    assert {1, 5, 6} & set(without)


def test_what_units_give_is_worth_what_the_loss_feels_of_it():
    """Units of any size: a unit and the column behind it can be scaled against each other."""
    gram_MM, felt_M = draw(20)
    left = keep_units(gram_MM.clone(), felt_M, 7).keep_T
    sizes_M = torch.linspace(0.01, 100, 20, dtype=torch.float64)
    assert torch.equal(keep_units(gram_MM * sizes_M * sizes_M[:, None], felt_M, 7).keep_T, left)


def test_units_that_are_silent_on_these_tokens_go_first_whatever_the_loss_felt_of_them_on_others():
    gram_MM, felt_M = draw(12)
    gram_MM[[2, 8]], gram_MM[:, [2, 8]] = 0.0, 0.0
    felt_M[[2, 8]] = 1e-3
    assert not {2, 8} & set(keep_units(gram_MM, felt_M + 0.1, 8).keep_T.tolist())
