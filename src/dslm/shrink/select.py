"""Which units and heads stay: those whose output, as it arrives in the residual stream, is largest.

The score of a unit is the root mean square of its activation times the norm of the column that writes it ("activation
norm times column norm"); of a head the root mean square of what it adds to the stream. Magnitudes are those of
Minitron (arXiv 2407.14679, section 3) with the writer's side put in.

Shape letters: M FFN units, H query heads, K key-value heads, G query heads of one key-value head, D stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dslm.shrink.fold import Fold, select


def unit_scores(power_M: Tensor, writer_DM: Tensor) -> Tensor:
    """Score of each FFN unit.

    Args:
        power_M: mean square of each unit's activation.
        writer_DM: the matrix that reads the units and writes the stream.
    """
    scores: Tensor = power_M.double().clamp_min(0).sqrt() * writer_DM.double().norm(dim=0)
    return scores


def head_scores(gram: Tensor, writer: Tensor, heads: int) -> Tensor:
    """Score of each query head: root mean square of what it adds to the stream.

    Args:
        gram: mean of ``z z^T`` over tokens, ``z`` the input of the output projection, ``[H h, H h]``.
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
