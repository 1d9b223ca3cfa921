"""What it costs to silence FFN units and heads in every block, the others standing in for them.

This is what cutting does to a block, short of what the blocks behind it make up for. Shape letters: B windows, T
tokens, N tokens of all windows, X what a writer reads, F that and a one for a bias, K what of it stays, L what goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    nothing = sizes.replace(intermediate_size=0, num_attention_heads=0)  # so that every writer is watched
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            modules = {name: m for m, name in walk.linears(layer).items() if writes_stream(walk, name)}
            survivors = Survivors(
                walk, sizes, nothing, list(modules), felt, refitted=refitted, weigh_tokens=recipe.weigh_tokens
            )
            for some in batches(0, *fit_BT.shape):
                whole_BTD[some], seen = watch(walk, layer, whole_BTD[some], survivors.watched)
                survivors.see(seen, whole_BTD[some].flatten(0, -2))
            for i, target in enumerate(targets):
                folds = {(word, layer): fold for word, fold in survivors.towards(target).folds().items()}
                cuts = {module: _cut(walk, layer, name, survivors, folds) for name, module in modules.items()}
                with _silenced(cuts):
                    streams[i] = walk.run(layer, streams[i])
        if progress is not None:
            progress("measuring cuts", layer + 1, len(walk.blocks))
    with walk.head():
        return [mean_loss(walk, stream, ids_BT) for stream in streams]


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """What becomes of the features that a writer reads.

    Attributes:
        kept_X: which stay as they are.
        fit_KL: from those, and a one where there is a row for it, those that go; None where they are silent.
    """

    kept_X: Tensor
    fit_KL: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The features ``[..., X]`` afterwards."""
        if self.fit_KL is None:
            return x * self.kept_X
        staying = x[..., self.kept_X]
        if len(self.fit_KL) > staying.shape[-1]:
            staying = with_one(staying)
        after = x.clone()
        after[..., ~self.kept_X] = staying @ self.fit_KL
        return after


def _cut(walk: Walk, layer: int, name: str, survivors: Survivors, folds: Mapping[Key, Fold]) -> _Cut | None:
    """What becomes of what a writer reads; None where nothing of that goes."""
    sizes = walk.weights.family.dimensions(walk.weights.config)
    fold = axis_fold(walk.places[name].line.spec.axes[1], layer, folds, sizes)
    if fold is None:
        return None
    kept_X = (fold.group_S >= 0).to(walk.device)
    if not survivors.refitted:
        return _Cut(kept_X, None)
    return _Cut(kept_X, stand_ins(survivors.second_moment(name), kept_X).float())


def stand_ins(gram_FF: Tensor, kept_X: Tensor) -> Tensor:
    """The features that go by damped least squares from those that stay.

    Args:
        gram_FF: second moment of the features, of any scale, in float64. If there is one more, that is a one, which
            stays, and only what varies is damped then.
        kept_X: which features stay.

    Returns:
        float64 ``[K, L]``: what goes is what stays, and behind it the one, times this.
    """
    features = len(kept_X)
    kept_F = torch.cat([kept_X, kept_X.new_ones(len(gram_FF) - features)])
    varying_F = gram_FF.diagonal().clone()
    if len(gram_FF) > features:
        varying_F -= gram_FF[-1].square() / gram_FF[-1, -1]
    rows_KF = gram_FF[kept_F]
    gram_KK, cross_KL = rows_KF[:, kept_F], rows_KF[:, :features][:, ~kept_X]
    gram_KK.diagonal().add_(DAMPING * varying_F[kept_F] + 1e-9 * gram_KK.diagonal().mean() + 1e-30)
    fit_KL: Tensor = torch.cholesky_solve(cross_KL, torch.linalg.cholesky(gram_KK))
    return fit_KL


@contextmanager
def _silenced(cuts: Mapping[nn.Module, _Cut | None]) -> Iterator[None]:
    """Change what some modules read."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        cut = cuts[module]
        assert cut is not None, "only those that change are hooked"
        return (cut(args[0]), *args[1:])

    handles = [module.register_forward_pre_hook(hook) for module, cut in cuts.items() if cut is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
