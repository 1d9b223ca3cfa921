"""Which units and heads stay: those whose output, as it arrives in the residual stream, the others cannot replace.

Where nothing is refitted the score of a unit is the root mean square of its activation times the norm of the column
that writes it ("activation norm times column norm"), the magnitudes of Minitron (arXiv 2407.14679, section 3) with the
writer's side put in; that of a head is the root mean square of what it adds to the stream. Where columns are refitted,
units and heads go one by one, each time what costs least once the others have made up for it: the optimal brain surgeon
(Hassibi and Stork 1992, "Second order derivatives for network pruning") with a unit's column, or a head's columns, in
place of a weight. What that costs is told by the loss (`dslm.shrink.importance`): of a unit by the metric that columns
are given in, of a head by a price. Tokens may be weighted, and where a bias makes up for the mean only what varies
counts.

Shape letters: M FFN units, P units looked at, J units that go, H query heads, K key-value heads, G query heads of one
key-value head, D stream, X what a writer reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dslm.shrink.fold import Fold, select

DAMPING = 0.1
"""Added to the Gram, relative to each unit's own mean square: how much less than it seems the others make up for."""
_AT_ONCE, _ROUNDS = 16, 64
"""So many units go before all losses are computed again, or as many more as keep it to so many rounds."""


def unit_scores(power_M: Tensor, columns_DM: Tensor) -> Tensor:
    """Score of each FFN unit.

    Args:
        power_M: mean square of each unit's activation, of any scale.
        columns_DM: what each unit writes, in any metric.
    """
    scores: Tensor = power_M.double().clamp_min(0).sqrt() * columns_DM.double().norm(dim=0)
    return scores


def surviving_units(gram_MM: Tensor, columns_DM: Tensor, count: int) -> Tensor:
    """Positions of the units that stay, rising, if those that stay are refitted.

    With ``H = gram + damping``, leaving out unit j costs ``|w_j|^2 / (H^-1)_jj`` when the other columns change by
    ``-w_j (H^-1)_j: / (H^-1)_jj``, and ``H^-1`` loses row and column j by the same elimination.

    Args:
        gram_MM: second moment of the units' activations, of any scale, in float64; it is overwritten.
        columns_DM: ``w``, what each unit writes, in any metric.
        count: units to keep.
    """
    columns_DM, inverse_MM = columns_DM.double(), _damped_inverse(gram_MM)
    left_M = torch.ones(len(gram_MM), dtype=torch.bool, device=gram_MM.device)
    at_once = max(_AT_ONCE, -(-(len(gram_MM) - count) // _ROUNDS))
    while (excess := int(left_M.sum()) - count) > 0:
        going = min(at_once, excess)
        losses_M = columns_DM.square().sum(dim=0) / inverse_MM.diagonal()
        losses_M[~left_M] = torch.inf
        pool_P = losses_M.topk(min(4 * going, going + count), largest=False).indices
        gone_J = pool_P[_first_to_go(inverse_MM[pool_P][:, pool_P], columns_DM[:, pool_P], going)]
        share_JM = _eliminate(inverse_MM, gone_J)
        columns_DM = torch.addmm(columns_DM, columns_DM[:, gone_J], share_JM, alpha=-1.0)
        left_M[gone_J] = False
    return left_M.nonzero().flatten()


def _eliminate(inverse_MM: Tensor, gone_J: Tensor) -> Tensor:
    """Take features out of the matrix whose inverse this is, in place, and say how the others stand in for them."""
    share_JM: Tensor = torch.linalg.solve(inverse_MM[gone_J][:, gone_J], inverse_MM[gone_J])
    inverse_MM.addmm_(inverse_MM[:, gone_J], share_JM, alpha=-1.0)
    return share_JM


def _damped_inverse(gram_MM: Tensor) -> Tensor:
    """In the Gram's own memory: it is the largest thing that choosing units needs."""
    diagonal_M = gram_MM.diagonal()
    diagonal_M += DAMPING * diagonal_M + 1e-9 * diagonal_M.mean() + 1e-30
    columns_first_MM = gram_MM.T  # as LAPACK wants it; otherwise it works on a copy
    torch.linalg.cholesky(columns_first_MM, out=columns_first_MM)
    return torch.cholesky_inverse(columns_first_MM, out=columns_first_MM)


def less_constant(gram_XX: Tensor) -> Tensor:
    """The second moment of all features but the last, which is always one, less what a bias makes up for.

    That is their covariance, times the weight of all tokens. What is left of a feature that does not vary is rounding,
    which is kept above zero.
    """
    sum_X, diagonal_X = gram_XX[:-1, -1], gram_XX.diagonal()[:-1]
    left_XX = gram_XX[:-1, :-1] - torch.outer(sum_X, sum_X) / gram_XX[-1, -1]
    rounding_X = 1e-12 * diagonal_X
    constant = left_XX.diagonal() < rounding_X
    left_XX[constant], left_XX[:, constant] = 0.0, 0.0
    left_XX.diagonal()[constant] = rounding_X[constant]
    return left_XX


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


def keep_units(gram_MM: Tensor, columns_DM: Tensor, count: int, *, refitted: bool) -> Fold:
    """Keep so many FFN units; arguments as of `surviving_units`, and whether those that stay are refitted."""
    if refitted:
        return select(surviving_units(gram_MM, columns_DM, count).cpu(), len(gram_MM))
    return choose_units(unit_scores(gram_MM.diagonal(), columns_DM).cpu(), count)


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


def surviving_heads(
    gram_XX: Tensor, writer_DX: Tensor, price_H: Tensor, kv_heads: int, target_heads: int, target_kv: int
) -> dict[str, Fold]:
    """Keep whole key-value groups, and in each as many query heads, if those that stay are refitted.

    What the others leave of some heads is the inverse of their part of ``(gram + damping)^-1``. In each group the heads
    go first that cost least, one by one over all groups, and then whole groups.

    Args:
        gram_XX: second moment of what the heads give, of any scale, in float64; it is overwritten.
        writer_DX: the output projection.
        price_H: what is lost per square, of what a head adds to the stream, that is left of it; of any scale.
        kv_heads: K.
        target_heads: query heads to keep.
        target_kv: key-value heads to keep; it divides ``target_heads``.

    Returns:
        Folds of ``heads`` and ``kv_heads``.
    """
    heads, inverse_XX = len(price_H), _damped_inverse(gram_XX)
    price_X = price_H.repeat_interleave(len(inverse_XX) // heads).to(writer_DX.device)
    columns_DX = writer_DX.double() * price_X.sqrt()
    groups = {k: [k * heads // kv_heads + i for i in range(heads // kv_heads)] for k in range(kv_heads)}
    numbers = torch.arange(len(inverse_XX), device=inverse_XX.device).view(heads, -1)

    def cost(gone: list[int]) -> float:
        own_X = numbers[gone].flatten()
        left_XX = torch.linalg.inv(inverse_XX[own_X][:, own_X])
        return float((columns_DX[:, own_X] @ left_XX).mul_(columns_DX[:, own_X]).sum())

    while wide := {k: own for k, own in groups.items() if len(own) > target_heads // target_kv}:
        group, head = min(
            ((k, head) for k, own in wide.items() for head in own), key=lambda kh: cost([kh[1]])
        )
        groups[group].remove(head)
        _eliminate(inverse_XX, numbers[head])
    while len(groups) > target_kv:
        gone = groups.pop(min(groups, key=lambda k: cost(groups[k])))
        _eliminate(inverse_XX, numbers[gone].flatten())
    kept = torch.tensor([head for own in groups.values() for head in own])
    return {"heads": select(kept, heads), "kv_heads": select(torch.tensor(list(groups)), kv_heads)}


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
