"""Which units and heads stay: those whose output, as it arrives in the residual stream, the others cannot replace.

Where nothing is refitted the score of a unit is the root mean square of its activation times the norm of the column
that writes it ("activation norm times column norm"), the magnitudes of Minitron (arXiv 2407.14679, section 3) with the
writer's side put in. Where columns are refitted units go one by one, each time the one that costs least once the others
have made up for it: the optimal brain surgeon (Hassibi and Stork 1992, "Second order derivatives for network pruning")
with a unit's column in place of a weight. The score of a head is the root mean square of what it adds to the stream.

Shape letters: M FFN units, A units that are still there, P units looked at, J units that go, H query heads, K key-value
heads, G query heads of one key-value head, D stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dslm.shrink.fold import Fold, select

_DAMPING = 0.1
"""Added to the Gram, relative to each unit's own mean square: how much less than it seems the others make up for."""
_AT_ONCE, _ROUNDS = 16, 64
"""So many units go before all losses are computed again, or as many more as keep it to so many rounds."""


def unit_scores(power_M: Tensor, writer_DM: Tensor) -> Tensor:
    """Score of each FFN unit.

    Args:
        power_M: mean square of each unit's activation, of any scale.
        writer_DM: the matrix that reads the units and writes the stream.
    """
    scores: Tensor = power_M.double().clamp_min(0).sqrt() * writer_DM.double().norm(dim=0)
    return scores


def surviving_units(gram_MM: Tensor, writer_DM: Tensor, count: int) -> Tensor:
    """Positions of the units that stay, rising, if those that stay are refitted.

    With ``H = gram + damping``, leaving out unit j costs ``|w_j|^2 / (H^-1)_jj`` when the other columns change by
    ``-w_j (H^-1)_j: / (H^-1)_jj``, and ``H^-1`` loses row and column j by the same elimination.

    Args:
        gram_MM: second moment of the units' activations, of any scale.
        writer_DM: the matrix that reads the units and writes the stream.
        count: units to keep.
    """
    gram_MM, columns_DA = gram_MM.double(), writer_DM.double()
    diagonal_M = gram_MM.diagonal()
    damped_MM = gram_MM + torch.diag(_DAMPING * diagonal_M + 1e-9 * diagonal_M.mean() + 1e-30)
    inverse_AA = torch.cholesky_inverse(torch.linalg.cholesky(damped_MM))
    left_A = torch.arange(len(gram_MM), device=gram_MM.device)
    at_once = max(_AT_ONCE, -(-(len(left_A) - count) // _ROUNDS))
    while len(left_A) > count:
        going = min(at_once, len(left_A) - count)
        losses_A = columns_DA.square().sum(dim=0) / inverse_AA.diagonal()
        pool_P = losses_A.topk(min(4 * going, len(left_A)), largest=False).indices
        gone_J = pool_P[_first_to_go(inverse_AA[pool_P][:, pool_P], columns_DA[:, pool_P], going)]
        stay_A = torch.ones_like(left_A, dtype=torch.bool)
        stay_A[gone_J] = False
        share_JA = torch.linalg.solve(inverse_AA[gone_J][:, gone_J], inverse_AA[gone_J][:, stay_A])
        columns_DA = columns_DA[:, stay_A] - columns_DA[:, gone_J] @ share_JA
        inverse_AA = inverse_AA[stay_A][:, stay_A] - inverse_AA[stay_A][:, gone_J] @ share_JA
        left_A = left_A[stay_A]
    return left_A


def less_constant(gram_XX: Tensor) -> Tensor:
    """The second moment of all features but the last, which is always one, less what a bias makes up for.

    That is their covariance, times the weight of all tokens.
    """
    mean_X = gram_XX[:-1, -1]
    return gram_XX[:-1, :-1] - torch.outer(mean_X, mean_X) / gram_XX[-1, -1]


def _first_to_go(inverse_PP: Tensor, columns_DP: Tensor, count: int) -> Tensor:
    """Positions of the units that go first, one by one."""
    going: list[int] = []
    for _ in range(count):
        losses_P = columns_DP.square().sum(dim=0) / inverse_PP.diagonal().clamp_min(1e-300)
        losses_P[going] = torch.inf
        unit = int(losses_P.argmin())
        share_P = inverse_PP[unit] / inverse_PP[unit, unit]
        columns_DP = columns_DP - columns_DP[:, unit, None] * share_P
        inverse_PP = inverse_PP - inverse_PP[:, unit, None] * share_P
        going.append(unit)
    return torch.tensor(going, device=inverse_PP.device)


def head_scores(gram: Tensor, writer: Tensor, heads: int) -> Tensor:
    """Score of each query head: root mean square of what it adds to the stream.

    Args:
        gram: mean of ``z z^T`` over tokens, ``z`` the input of the output projection, ``[H h, H h]``; of any scale.
        writer: the output projection, ``[D, H h]``.
        heads: H.
    """
    width = gram.shape[0] // heads
    scores = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        columns = writer[:, own].double()
        scores.append(torch.trace(columns @ gram[own, own].double() @ columns.T))
    return torch.stack(scores).clamp_min(0).sqrt()


def top(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest scores, in their original order."""
    kept: Tensor = scores.topk(count).indices.sort().values
    return kept


def choose_units(scores_M: Tensor, count: int) -> Fold:
    """Keep the FFN units with the largest scores."""
    return select(top(scores_M, count), len(scores_M))


def keep_units(gram_MM: Tensor, writer_DM: Tensor, count: int, *, refitted: bool) -> Fold:
    """Keep so many FFN units, given the second moment of their activations."""
    if refitted:
        return select(surviving_units(gram_MM, writer_DM, count).cpu(), len(gram_MM))
    return choose_units(unit_scores(gram_MM.diagonal(), writer_DM).cpu(), count)


def choose_heads(scores_H: Tensor, kv_heads: int, target_heads: int, target_kv: int) -> dict[str, Fold]:
    """Keep whole key-value groups, and in each the query heads with the largest scores.

    Args:
        scores_H: score of each query head.
        kv_heads: K.
        target_heads: query heads to keep.
        target_kv: key-value heads to keep; it divides ``target_heads``.

    Returns:
        Folds of ``heads`` and ``kv_heads``.
    """
    scores_KG = scores_H.view(kv_heads, -1)
    group, kept_group = scores_KG.shape[1], target_heads // target_kv
    best_KG = scores_KG.topk(kept_group, dim=1)
    groups = top(best_KG.values.square().sum(dim=1), target_kv)
    within = best_KG.indices[groups].sort(dim=1).values
    heads = (groups[:, None] * group + within).flatten()
    return {"heads": select(heads, len(scores_H)), "kv_heads": select(groups, kv_heads)}


def choose_channels(scores_D: Tensor, power_D: Tensor, count: int) -> Fold:
    """Keep the channels of the stream with the largest scores, scaled so that its mean square stays.

    Args:
        scores_D: score of each channel.
        power_D: sum of each channel's square, of a stream whose tokens are scaled to a mean square of one.
        count: channels to keep.
    """
    keep = top(scores_D, count)
    amplitude = (power_D.mean() / power_D[keep].mean()).sqrt()
    return select(keep, len(scores_D), float(amplitude))
