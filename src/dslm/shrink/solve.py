"""Least squares towards a prior, from accumulated moments (``docs/how-it-works.md``, "Re-reading").

Shape letters: N tokens, X input features, Y outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dslm.errors import VerificationError

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths that are tried, relative to each feature's own second moment."""

_ROWS = 512
"""Rows of a matrix of moments that are added at once."""


@dataclass(slots=True, eq=False)
class Moments:
    """Second moments of inputs and targets over tokens, in float64.

    Attributes:
        gram_XX: ``sum w x x^T``.
        cross_YX: ``sum w y x^T``.
        power_Y: ``sum w y^2``.
    """

    gram_XX: Tensor
    cross_YX: Tensor
    power_Y: Tensor

    @classmethod
    def zero(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Moments:
        """No tokens yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(inputs, inputs), zeros(outputs, inputs), zeros(outputs))

    def add(self, x_NX: Tensor, y_NY: Tensor, weight_N: Tensor | None = None) -> None:
        """Add some tokens: products in the inputs' dtype, sums in float64."""
        weighted_NX = x_NX if weight_N is None else x_NX * weight_N[:, None]
        _add_product(self.gram_XX, weighted_NX, x_NX)
        _add_product(self.cross_YX, y_NY, weighted_NX)
        weighted_NY = y_NY if weight_N is None else y_NY * weight_N[:, None]
        self.power_Y += (weighted_NY * y_NY).sum(dim=0)

    def summed(self) -> Moments:
        """The moments over the tokens of all processes of a distributed run; of this one where it is alone."""
        for sums in (self.gram_XX, self.cross_YX, self.power_Y):
            sum_over_processes(sums)
        return self

    def through(self, map_ZY: Tensor, gram_YY: Tensor) -> Moments:
        """The moments of the targets ``map y``, given ``sum w y y^T``."""
        map_64 = map_ZY.double()
        power_Z = (map_64 @ gram_YY * map_64).sum(dim=1)
        return Moments(self.gram_XX, map_64 @ self.cross_YX, power_Z)

    def error_Y(self, weight_YX: Tensor) -> Tensor:
        """``sum w (y - W x)^2`` over all tokens for each output, from the moments alone."""
        w_YX = weight_YX.double()
        return (
            self.power_Y - 2.0 * (w_YX * self.cross_YX).sum(dim=1) + (w_YX @ self.gram_XX * w_YX).sum(dim=1)
        )


def _add_product(sums_PQ: Tensor, a_NP: Tensor, b_NQ: Tensor) -> None:
    """Add ``a^T b`` some rows at a time: whole, the product and its float64 copy would take more than the sums do."""
    for start in range(0, len(sums_PQ), _ROWS):
        rows = slice(start, start + _ROWS)
        sums_PQ[rows] += a_NP[:, rows].T @ b_NQ


def sum_over_processes(sums: Tensor) -> Tensor:
    """Add a tensor over all processes, in place; nothing where there is only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


def place_of_share(count: int) -> tuple[int, int]:
    """Where the share of this process begins among those of all, and how many they are together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, count
    rank = torch.distributed.get_rank()
    counts = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64)
    counts[rank] = count
    sum_over_processes(counts)
    return int(counts[:rank].sum()), int(counts.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What a regression found.

    Attributes:
        weight_YX: the weights.
        ridge: the strength that was best on held-out tokens; None where the prior was.
        before: relative squared error of the prior on held-out tokens.
        after: the same of the weights.
    """

    weight_YX: Tensor
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """``argmin sum w |y - W x|^2 + strength |(W - W0) D|^2`` with ``D^2`` the diagonal of the Gram, for any strength.

    The closed form is ``W0 + (C_yx - W0 C_xx) (C_xx + strength D^2)^-1``. With ``D^-1 C_xx D^-1 = Q diag(v) Q^T``, from
    one eigendecomposition in float64, it is ``W0 + R diag(1 / (v + strength)) Q^T D^-1`` for every strength.

    Attributes:
        values_X: ``v``.
        basis_XX: ``D^-1 Q``.
        residual_YX: ``R = (C_yx - W0 C_xx) D^-1 Q``.
    """

    values_X: Tensor
    basis_XX: Tensor
    residual_YX: Tensor

    @classmethod
    def prepare(cls, moments: Moments, prior_YX: Tensor) -> Ridge:
        """Decompose once.

        Args:
            moments: of the tokens to fit.
            prior_YX: ``W0``.
        """
        diagonal_X = moments.gram_XX.diagonal()
        smallest = diagonal_X.mean().clamp_min(torch.finfo(torch.float64).tiny) * 1e-12
        scale_X = diagonal_X.clamp_min(smallest).rsqrt()
        values_X, vectors_XX = torch.linalg.eigh(scale_X[:, None] * moments.gram_XX * scale_X)
        basis_XX = scale_X[:, None] * vectors_XX
        residual_YX = (moments.cross_YX - prior_YX.double() @ moments.gram_XX) @ basis_XX
        return cls(values_X.clamp_min(0.0), basis_XX, residual_YX)

    def factors(self, strength: float) -> Tensor:
        """``1 / (v + strength)``, which makes ``W - W0`` of ``R``, in the eigenbasis."""
        return 1.0 / (self.values_X + strength)

    def weights(self, prior_YX: Tensor, strength: float, rows: slice = slice(None)) -> Tensor:
        """Some rows of the solution for one strength, in float64."""
        step_YX = self.residual_YX[rows] * self.factors(strength)
        return prior_YX[rows].double() + step_YX @ self.basis_XX.T


def solve(
    fit: Moments,
    held_out: Moments,
    prior_YX: Tensor,
    parts: Mapping[str, slice],
    *,
    ridges: Sequence[float] = RIDGES,
    count_Y: Tensor | None = None,
) -> dict[str, Solution]:
    """For each matrix, the ridge that does best on held-out tokens, or the prior if none does better.

    Args:
        fit: moments of the tokens to fit.
        held_out: moments of other tokens, which only choose the strength.
        prior_YX: the analytic maps of all matrices that read the same input, one below the other.
        parts: name of each matrix -> its rows.
        ridges: strengths to try.
        count_Y: what the squared error of each output counts on held-out tokens; None where all count alike.

    Raises:
        VerificationError: the activations hold NaN or infinite numbers.
    """
    if not all(torch.isfinite(m).all() for m in (fit.gram_XX, fit.cross_YX)):
        raise VerificationError(
            f"activations at {', '.join(parts)} are NaN or infinite",
            "the model is broken there; check it with dslm diff",
        )
    system = Ridge.prepare(fit, prior_YX)
    before_Y = held_out.error_Y(prior_YX)
    counts_Y = torch.ones_like(before_Y) if count_Y is None else count_Y.to(before_Y)
    # The error of W0 + R F B^T on held-out tokens, with F = diag(1 / (v + strength)), is that of W0 and
    # tr(F R^T R F H) - 2 tr(F R^T G), where H and G are the held-out moments in the eigenbasis.
    gram_XX = system.basis_XX.T @ held_out.gram_XX @ system.basis_XX
    gain_YX = (held_out.cross_YX - prior_YX.double() @ held_out.gram_XX) @ system.basis_XX
    factors_X = {strength: system.factors(strength) for strength in ridges}
    found = {}
    for name, rows in parts.items():
        residual_YX = system.residual_YX[rows]
        counted_YX = residual_YX * counts_Y[rows, None]
        quadratic_XX = (residual_YX.T @ counted_YX) * gram_XX
        linear_X = (counted_YX * gain_YX[rows]).sum(dim=0)
        change: dict[float | None, float] = {None: 0.0}
        for strength, factor_X in factors_X.items():
            change[strength] = float(factor_X @ quadratic_XX @ factor_X - 2.0 * linear_X @ factor_X)
        best = min(change, key=change.__getitem__)
        total = max(float(held_out.power_Y[rows] @ counts_Y[rows]), torch.finfo(torch.float64).tiny)
        before = float(before_Y[rows] @ counts_Y[rows])
        weight_YX = prior_YX[rows]
        if best is not None:
            weight_YX = system.weights(prior_YX, best, rows).to(prior_YX.dtype)
        found[name] = Solution(
            weight_YX=weight_YX,
            ridge=best,
            before=max(before, 0.0) / total,
            after=max(before + change[best], 0.0) / total,
        )
    return found
