"""Training a grown model as its growth asks for (``docs/how-it-works.md``, "Training what was grown").

Adam ignores the scale of a gradient: of ``n`` copies that are summed each moves a full step, so the sum moves ``n``
times as far as the source would have. A matrix whose input was copied ``n`` times therefore takes ``lr / n``. The
gradient of what is copied ``m`` times is ``1 / m`` of the source's, and so is its epsilon; a decay of ``n wd`` keeps
the decoupled product ``lr wd``. What was scaled by ``a`` takes ``a lr``, and its epsilon goes with its gradient. For
even copies in an untied model the grown model then follows the small one's trajectory exactly. What was not there
before learns at `NEW` times the rate, after a warm-up of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dslm.checkpoint.reader import Checkpoint, torch_dtype
from dslm.errors import DslmError, RecipeError
from dslm.families import Tensor
from dslm.families.axes import Role
from dslm.grow.maps import Growth, build_growth
from dslm.output import recorded
from dslm.plan import Plan
from dslm.train.settings import Training

NEW = 1.3
"""Rate of new parameters beside that of old ones."""
REWARM = 0.1
"""Share of the run's steps in which the rate of new parameters rises to that."""
BETAS = (0.9, 0.95)
EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Scale:
    """What a tensor's rate, epsilon and weight decay are multiplied by, and the share of that rate for what is new."""

    rate: float = 1.0
    epsilon: float = 1.0
    decay: float = 1.0
    new: float = 0.0


def recorded_growth(checkpoint: Checkpoint) -> Growth:
    """The maps by which a checkpoint was grown, from its record.

    Raises:
        RecipeError: it has no record of a growth, or not of one that led to its sizes.
    """
    hint = "give a model that dslm up made, or leave out --recipe growth and --freeze-old"
    values = recorded(checkpoint).get("plan")
    if not isinstance(values, dict):
        raise RecipeError(f"{checkpoint.name} has no record of how it was grown (dslm.json)", hint)
    if "calibration" in values:
        raise RecipeError(f"{checkpoint.name} was shrunk, not grown", hint)
    try:
        plan = Plan.from_dict(values)
        config = plan.source.into_config(checkpoint.family, checkpoint.config)
        growth = build_growth(checkpoint.family, config, plan, torch_dtype(checkpoint.dtype))
    except (DslmError, KeyError, ValueError, TypeError) as error:
        raise RecipeError(
            f"the record of {checkpoint.name} (dslm.json) cannot be read: {error}", hint
        ) from error
    if plan.target != checkpoint.sizes:
        raise RecipeError(f"{checkpoint.name} does not have the sizes that its record says (dslm.json)", hint)
    return growth


def chosen_recipe(checkpoint: Checkpoint, asked: Training) -> str:
    """The recipe of a run; of ``auto`` the better one.

    In ``benchmarks/growing_pays.py`` ``growth`` ends lower with each seed where a growth only added, and higher where
    it copied. What was trained since it grew is new no more.
    """
    if asked.recipe != "auto":
        return asked.recipe
    if asked.adapts or asked.freeze_old or recorded(checkpoint).get("trained"):
        return "plain"
    try:
        growth = recorded_growth(checkpoint)
    except RecipeError:
        return "plain"
    copied = any(np.count_nonzero(~found.new) > found.size for found in growth.maps.values())
    return "plain" if copied else "growth"


def growth_scale(tensor: Tensor, growth: Growth) -> Scale:
    """How to train one tensor of a grown model.

    Where entries have unequally many copies, their mean counts.
    """
    if tensor.layer in growth.new_blocks:
        return Scale(rate=NEW, new=1.0)
    what = growth.tensor_map(tensor)
    rate, epsilon, added = what.factor, 1.0 / what.factor, 0.0
    for axis, found in zip(tensor.spec.axes, what.axes, strict=True):
        if found is None:
            continue
        kept = np.count_nonzero(~found.new)
        copies, amplitude = float(kept / found.size), float(found.amplitude[~found.new].mean())
        added = 1.0 - (1.0 - added) * float(kept / found.target)
        if axis.role is Role.READ:
            rate /= copies * amplitude
            epsilon *= amplitude
        elif axis.role is Role.GAIN:
            epsilon /= copies
        else:
            rate *= amplitude
            epsilon /= copies * amplitude
    whole = added * NEW + (1.0 - added) * rate
    return Scale(rate=whole, epsilon=epsilon, decay=1.0 / rate, new=added * NEW / whole)


def freeze_old(parameters: Iterable[tuple[torch.nn.Parameter, Tensor]], growth: Growth) -> int:
    """Let only what a growth added learn: the rest gets no gradient (LLaMA-Pro, arXiv 2401.02415).

    Args:
        parameters: each parameter and its line of the family's table.
        growth: the maps of the growth.

    Returns:
        How many numbers can still learn.
    """
    learning = 0
    for parameter, tensor in parameters:
        if tensor.layer in growth.new_blocks:
            learning += parameter.numel()
            continue
        axes = [None if axis is None else axis.added for axis in growth.tensor_map(tensor).axes]
        frozen = torch.ones(parameter.shape, dtype=torch.bool)
        for position, added in enumerate(axes):
            if added is not None:
                shape = [-1 if i == position else 1 for i in range(parameter.dim())]
                frozen = frozen & ~torch.from_numpy(added).view(shape)
        learning += int((~frozen).sum())
        if frozen.all():
            parameter.requires_grad_(False)
        else:
            parameter.register_hook(_Mask(frozen))  # type: ignore[no-untyped-call]
    return learning


class _Mask:
    """A gradient hook that zeroes a part."""

    def __init__(self, frozen: torch.Tensor) -> None:
        self._frozen = frozen

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self._frozen = self._frozen.to(gradient.device)
        return gradient.masked_fill(self._frozen, 0.0)


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    scales: Mapping[str, Scale],
    *,
    rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """AdamW's groups, parameters of the same treatment together, with the share ``new``. Only matrices decay.

    Args:
        named: the model's parameters by their names in the module.
        scales: the same names -> scale, 1 where there is none.
        rate: learning rate.
        weight_decay: decoupled.
    """
    groups: dict[tuple[float, float, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            scale = scales.get(name, Scale())
            decay = weight_decay * scale.decay if parameter.dim() > 1 else 0.0
            key = rate * scale.rate, EPSILON * scale.epsilon, decay, scale.new
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "eps": eps, "weight_decay": decay, "new": new}
        for (lr, eps, decay, new), parameters in groups.items()
    ]


def rewarmed(curve: Callable[[int], float], new: float, steps: int) -> Callable[[int], float]:
    """A group's curve of rates in which what is new warms up by itself.

    Args:
        curve: step -> factor of the rate, of the whole run.
        new: share of the group's rate that is for what is new.
        steps: of the run.
    """
    risen = REWARM * steps
    return lambda step: curve(step) * (1.0 - new * max(0.0, 1.0 - (step + 1) / (risen + 1)))
