"""What it costs to silence FFN units and heads in every block, the others standing in for them.

This is what cutting does to a block, short of what the blocks behind it make up for. Shape letters: B windows, T
tokens, N tokens of all windows, X what a writer reads, F that and a one for a bias, K what of it stays, L what goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dslm.progress import Progress
from dslm.shrink.fold import Fold, Key, axis_fold
from dslm.shrink.recipe import Recipe
from dslm.shrink.select import DAMPING
from dslm.shrink.streams import batches
from dslm.shrink.survivors import Survivors, enough
from dslm.shrink.tap import watch, with_one, writes_stream
from dslm.shrink.walk import Walk, mean_loss
from dslm.sizes import Sizes


def silenced_losses(
    walk: Walk,
    fit_BT: Tensor,
    ids_BT: Tensor,
    targets: Sequence[Sizes],
    recipe: Recipe,
    felt: Mapping[str, Tensor],
    progress: Progress | None = None,
) -> list[float]:
    """Loss with FFN units and heads silenced in every block as cutting to each target would, in one pass over all.

    Args:
        walk: the model.
        fit_BT: windows on which is chosen what goes, and fitted what stands in for it, int64.
        ids_BT: the windows that losses are measured on.
        targets: sizes with fewer units or heads, of which others are not looked at.
        recipe: whether anything stands in, and how is chosen what goes.
        felt: what `dslm.shrink.importance` gave; nothing where norms choose.
        progress: called with a label, blocks done and blocks in all.

    Returns:
        Mean cross-entropy in nats per predicted token, per target.
    """
    sizes = Sizes.from_config(walk.weights.family, walk.weights.config)
    whole_BTD = walk.embed(fit_BT)
    streams = [walk.embed(ids_BT)] * len(targets)
    refitted = recipe.solve and enough(fit_BT.numel(), sizes)
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            modules = {name: m for m, name in walk.linears(layer).items() if writes_stream(walk, name)}
            survivors = Survivors(
                walk, sizes, sizes.replace(intermediate_size=0, num_attention_heads=0), list(modules), felt,
                refitted=refitted, weigh_tokens=recipe.weigh_tokens,
            )  # fmt: skip
            for some in batches(0, *fit_BT.shape):
                whole_BTD[some], seen = watch(walk, layer, whole_BTD[some], survivors.watched)
                survivors.see(seen, whole_BTD[some].flatten(0, -2))
            for i, target in enumerate(targets):
                folds = {(word, layer): fold for word, fold in survivors.towards(target).folds().items()}
                fits = {
                    module: _stand_ins(walk, layer, name, survivors, folds)
                    for name, module in modules.items()
                }
                with _silenced(fits):
                    streams[i] = walk.run(layer, streams[i])
        if progress is not None:
            progress("measuring cuts", layer + 1, len(walk.blocks))
    with walk.head() as logits:
        return [mean_loss(logits, stream, ids_BT, walk.device) for stream in streams]


def _stand_ins(
    walk: Walk, layer: int, name: str, survivors: Survivors, folds: Mapping[Key, Fold]
) -> Tensor | None:
    """What a writer shall read, from what it reads, ``[F, X]``; None where nothing of that goes."""
    sizes = walk.weights.family.dimensions(walk.weights.config)
    fold = axis_fold(walk.places[name].line.spec.axes[1], layer, folds, sizes)
    if fold is None:
        return None
    kept_X = (fold.group_S >= 0).to(walk.device)
    if survivors.refitted:
        return stand_ins(survivors.second_moment(name), kept_X).float()
    return kept_X.float().diag()


def stand_ins(gram_FF: Tensor, kept_X: Tensor) -> Tensor:
    """The features that stay as they are, and those that go by damped least squares from those that stay.

    Args:
        gram_FF: second moment of the features, of any scale, in float64. If there is one more, that is a one, which
            stays, and only what varies is damped then.
        kept_X: which features stay.

    Returns:
        float64 ``[F, X]``: new features are the old ones, and the one, times this.
    """
    features, lost_X = len(kept_X), ~kept_X
    kept_F = torch.cat([kept_X, kept_X.new_ones(len(gram_FF) - features)])
    varying_F = gram_FF.diagonal().clone()
    if len(gram_FF) > features:
        varying_F -= gram_FF[-1].square() / gram_FF[-1, -1]
    gram_KK = gram_FF[kept_F][:, kept_F]
    gram_KK.diagonal().add_(DAMPING * varying_F[kept_F] + 1e-9 * gram_KK.diagonal().mean() + 1e-30)
    cross_KL = gram_FF[kept_F][:, :features][:, lost_X]
    found_FX = torch.eye(len(gram_FF), features, dtype=gram_FF.dtype, device=gram_FF.device)
    found_FX[:, lost_X] = 0.0
    found_KX = found_FX[kept_F]
    found_KX[:, lost_X] = torch.cholesky_solve(cross_KL, torch.linalg.cholesky(gram_KK))
    found_FX[kept_F] = found_KX
    return found_FX


@contextmanager
def _silenced(fits: Mapping[nn.Module, Tensor | None]) -> Iterator[None]:
    """Change what some modules read."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        fit_FX, x = fits[module], args[0]
        assert fit_FX is not None, "only those that change are hooked"
        return ((x if len(fit_FX) == x.shape[-1] else with_one(x)) @ fit_FX, *args[1:])

    handles = [module.register_forward_pre_hook(hook) for module, fit in fits.items() if fit is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
