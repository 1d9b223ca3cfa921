"""Which units and heads stay when the others are refitted: backward elimination against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from dslm.shrink import select
from dslm.shrink.select import less_constant, surviving_heads, surviving_units, unit_scores

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


def head_cost(gram_XX, writer_DX, price_H, gone, kept):
    """What some heads cost that the others leave of them, by regression of their features on the others'."""
    whole_XX = gram_XX + DAMPING * torch.diag(gram_XX.diagonal())
    root_XX, width = torch.linalg.cholesky(whole_XX).T, len(gram_XX) // len(price_H)
    own, others = (
        torch.cat([torch.arange(h * width, (h + 1) * width) for h in some]) for some in (gone, kept)
    )
    left = (
        root_XX[:, own]
        - root_XX[:, others] @ torch.linalg.lstsq(root_XX[:, others], root_XX[:, own]).solution
    )
    price_X = price_H.sqrt().repeat_interleave(width)
    return float(((left * price_X[own]) @ writer_DX[:, own].double().T).square().sum())


def heads_one_by_one(gram_XX, writer_DX, price_H, kv_heads, target_heads, target_kv):
    group = len(price_H) // kv_heads
    left = list(range(len(price_H)))
    while len(left) > kv_heads * target_heads // target_kv:
        counts = [sum(head // group == k for head in left) for k in range(kv_heads)]
        free = [head for head in left if counts[head // group] > target_heads // target_kv]
        left.remove(
            min(free, key=lambda h: head_cost(gram_XX, writer_DX, price_H, [h], [k for k in left if k != h]))
        )
    while len(left) > target_heads:
        groups = {
            k: [head for head in left if head // group == k] for k in sorted({h // group for h in left})
        }
        costs = {
            k: head_cost(gram_XX, writer_DX, price_H, own, [head for head in left if head not in own])
            for k, own in groups.items()
        }
        left = [head for head in left if head not in groups[min(costs, key=costs.get)]]
    return left


@pytest.mark.parametrize("numbers", [(4, 8, 4), (4, 4, 4), (4, 6, 2), (4, 2, 2), (2, 6, 2), (12, 5, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heads_go_in_the_order_of_brute_force(numbers, seed):
    gram_XX, writer_DX = draw(36, 5, seed=seed)
    price_H = torch.rand(12, generator=torch.Generator().manual_seed(seed)).double()
    found = surviving_heads(gram_XX.clone(), writer_DX, price_H, *numbers)
    left = heads_one_by_one(gram_XX, writer_DX, price_H, *numbers)
    assert found["heads"].keep_T.tolist() == left
    assert found["kv_heads"].keep_T.tolist() == sorted({head // (12 // numbers[0]) for head in left})


def test_of_two_equal_heads_one_stays():
    """Though what the others leave of each is little while both are there."""
    generator = torch.Generator().manual_seed(0)
    x_NX, writer_DX = torch.randn(400, 24, generator=generator), torch.randn(6, 24, generator=generator)
    gram_XX, twins = (x_NX.T @ x_NX).double(), torch.arange(24)
    twins[18:21] = torch.arange(3)  # of eight heads in two groups the first and the seventh
    price_H = torch.tensor([4.0, 1, 1, 1, 1, 1, 4, 1]).double()
    found = surviving_heads(gram_XX[twins][:, twins], writer_DX[:, twins], price_H, 2, 6, 2)
    assert len({0, 6} & set(found["heads"].keep_T.tolist())) == 1


def test_heads_without_a_price_go_first():
    gram_XX, writer_DX = draw(24, 6)
    price_H = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1]).double()
    found = surviving_heads(gram_XX, writer_DX, price_H, 2, 6, 2)
    assert found["heads"].keep_T.tolist() == [0, 1, 3, 5, 6, 7]
