"""Least squares is right: moments against stacked activations, solutions against brute force in float64."""

from __future__ import annotations

import pytest
import torch

from dslm.errors import VerificationError
from dslm.shrink.solve import Moments, Ridge, solve

WHOLE = {"w": slice(None)}


def draw(tokens: int, inputs: int, outputs: int, *, noise: float, seed: int = 0):
    """Correlated inputs, targets ``W x`` with noise, and ``W``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true_YX, mixing_XX = normal(outputs, inputs), normal(inputs, inputs)
    x_NX = normal(tokens, inputs) @ mixing_XX
    return x_NX, x_NX @ true_YX.T + noise * normal(tokens, outputs), true_YX


def moments_of(x_NX, y_NY, weight_N=None) -> Moments:
    found = Moments.zero(x_NX.shape[1], y_NY.shape[1])
    for rows in torch.arange(len(x_NX)).split(17):
        found.add(x_NX[rows], y_NY[rows], None if weight_N is None else weight_N[rows])
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_those_of_the_stacked_activations(weighted):
    x_NX, y_NY, w_YX = draw(100, 7, 3, noise=1.0)
    weight_N = torch.rand(100, dtype=torch.float64) if weighted else torch.ones(100, dtype=torch.float64)
    found = moments_of(x_NX, y_NY, weight_N if weighted else None)
    scaled = weight_N[:, None]
    assert torch.allclose(found.gram_XX, x_NX.T @ (scaled * x_NX))
    assert torch.allclose(found.cross_YX, y_NY.T @ (scaled * x_NX))
    expected_Y = (scaled * (y_NY - x_NX @ w_YX.T).square()).sum(dim=0)
    assert torch.allclose(found.error_Y(w_YX), expected_Y)


def test_moments_of_mapped_targets():
    x_NX, y_NY, _ = draw(50, 6, 4, noise=1.0)
    map_ZY = torch.randn(5, 4, dtype=torch.float64)
    mapped = moments_of(x_NX, y_NY).through(map_ZY, y_NY.T @ y_NY)
    direct = moments_of(x_NX, y_NY @ map_ZY.T)
    assert torch.allclose(mapped.cross_YX, direct.cross_YX)
    assert torch.allclose(mapped.power_Y, direct.power_Y)


@pytest.mark.parametrize("strength", [0.01, 0.3, 3.0])
def test_a_ridge_is_the_brute_force_least_squares(strength):
    """The penalty written out as extra rows: ``sqrt(strength) D (W - W0)`` against zero."""
    x_NX, y_NY, _ = draw(60, 8, 5, noise=1.0)
    prior_YX = torch.randn(5, 8, dtype=torch.float64)
    fit = moments_of(x_NX, y_NY)
    diagonal = (strength * fit.gram_XX.diagonal()).sqrt().diag()
    stacked_x, stacked_y = torch.cat([x_NX, diagonal]), torch.cat([y_NY, diagonal @ prior_YX.T])
    expected_YX = torch.linalg.lstsq(stacked_x, stacked_y).solution.T
    found_YX = Ridge.prepare(fit, prior_YX).weights(prior_YX, strength)
    assert torch.allclose(found_YX, expected_YX, rtol=1e-9, atol=1e-9)


def test_the_chosen_ridge_is_the_best_on_held_out_tokens():
    x_NX, y_NY, _ = draw(400, 30, 4, noise=20.0)
    prior_YX = torch.zeros(4, 30, dtype=torch.float64)
    fit, held_out = moments_of(x_NX[:60], y_NY[:60]), moments_of(x_NX[60:], y_NY[60:])
    ridges = (0.001, 0.1, 1.0, 10.0)
    found = solve(fit, held_out, prior_YX, WHOLE, ridges=ridges)["w"]
    system = Ridge.prepare(fit, prior_YX)
    total = float(held_out.power_Y.sum())
    errors = {r: float(held_out.error_Y(system.weights(prior_YX, r)).sum()) / total for r in ridges}
    assert found.ridge == min(errors, key=errors.get)
    assert found.after == pytest.approx(errors[found.ridge])
    assert found.before == pytest.approx(float(held_out.error_Y(prior_YX).sum()) / total)


def test_a_planted_overfit_is_refused():
    """Few tokens, many features, a prior that is right: weak ridges fit noise, and the held-out tokens say so."""
    x_NX, y_NY, true_YX = draw(500, 40, 3, noise=5.0)
    fit, held_out = moments_of(x_NX[:41], y_NY[:41]), moments_of(x_NX[41:], y_NY[41:])
    overfit_YX = Ridge.prepare(fit, true_YX).weights(true_YX, 1e-9)
    assert fit.error_Y(overfit_YX).sum() < 0.05 * fit.error_Y(true_YX).sum(), "in sample it looks far better"
    assert held_out.error_Y(overfit_YX).sum() > 2 * held_out.error_Y(true_YX).sum()
    assert solve(fit, held_out, true_YX, WHOLE, ridges=(1e-9, 1e-6))["w"].ridge is None
    found = solve(fit, held_out, true_YX, WHOLE)["w"]
    assert found.after <= found.before


def test_each_matrix_has_its_own_ridge():
    """The first output is all signal, the second all noise."""
    x_NX, y_NY, _ = draw(300, 10, 2, noise=0.0)
    y_NY[:, 1] = 100 * torch.randn(300, dtype=torch.float64)
    prior_YX = torch.zeros(2, 10, dtype=torch.float64)
    fit, held_out = moments_of(x_NX[:15], y_NY[:15]), moments_of(x_NX[15:], y_NY[15:])
    found = solve(fit, held_out, prior_YX, {"signal": slice(0, 1), "noise": slice(1, 2)})
    assert found["signal"].ridge == 0.003
    assert found["noise"].ridge is None or found["noise"].ridge >= 1.0
    assert found["signal"].after < 0.01
    assert found["noise"].after > 0.5


def test_the_ridge_is_that_of_the_outputs_that_count():
    """Of one matrix: signal in the first output, a hundred times as much noise in the second."""
    x_NX, y_NY, _ = draw(300, 10, 2, noise=0.0)
    y_NY[:, 1] = 100 * torch.randn(300, dtype=torch.float64)
    prior_YX = torch.zeros(2, 10, dtype=torch.float64)
    fit, held_out = moments_of(x_NX[:15], y_NY[:15]), moments_of(x_NX[15:], y_NY[15:])
    parts = {"signal": slice(0, 1), "noise": slice(1, 2)}
    alone = solve(fit, held_out, prior_YX, parts)
    for counted, name in enumerate(parts):
        count_Y = torch.zeros(2)
        count_Y[counted] = 0.25
        found = solve(fit, held_out, prior_YX, WHOLE, count_Y=count_Y)["w"]
        assert found.ridge == alone[name].ridge
        assert (found.before, found.after) == pytest.approx((alone[name].before, alone[name].after))
    assert alone["signal"].ridge != alone["noise"].ridge


def test_singular_moments_give_finite_weights():
    """A feature that is always zero and one that repeats another."""
    x_NX, y_NY, _ = draw(50, 6, 3, noise=0.1)
    x_NX[:, 2] = 0.0
    x_NX[:, 4] = x_NX[:, 1]
    prior_YX = torch.randn(3, 6, dtype=torch.float64)
    found = solve(moments_of(x_NX[:30], y_NY[:30]), moments_of(x_NX[30:], y_NY[30:]), prior_YX, WHOLE)["w"]
    assert torch.isfinite(found.weight_YX).all()
    assert torch.allclose(found.weight_YX[:, 2], prior_YX[:, 2]), "nothing is known of it, so the prior stays"


def test_activations_that_are_not_numbers_are_named():
    x_NX, y_NY, w_YX = draw(20, 4, 2, noise=0.0)
    y_NY[3] = float("inf")
    with pytest.raises(VerificationError, match=r"activations at model\.w are NaN or infinite"):
        solve(moments_of(x_NX, y_NY), moments_of(x_NX, y_NY), w_YX, {"model.w": slice(None)})
