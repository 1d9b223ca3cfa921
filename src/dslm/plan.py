"""Plans: what is resized to what, by which method, from which seed. YAML on disk, a dataclass in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dslm.errors import RecipeError, SizeError
from dslm.families import Family
from dslm.families.family import Config
from dslm.shrink_plan import SELF, check_calibration, check_methods, check_shrink, wrong_calibration
from dslm.shrink_plan import SHRINK_METHODS as SHRINK_METHODS
from dslm.shrink_plan import SHRUNK as SHRUNK
from dslm.sizes import WORDS, Sizes, check_legal, differing

COPYING = ("hypercloning", "net2net")
METHOD_NAMES = (*COPYING, "padding")
SPLIT_NAMES = ("uneven", "even", "noise")
DTYPE_CODES = ("F64", "F32", "F16", "BF16")
DEPTH_METHOD = "blocks"
_DEEPEST = 10_000
GROWN = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One resize, fully resolved.

    Attributes:
        model: name of the source.
        family: its family.
        source: its sizes.
        target: the sizes to reach.
        methods: dimension that changes -> method.
        split: how copies share what they are read with: ``uneven``, ``even`` or ``noise``.
        snr_db: level of the ``noise`` split in decibels.
        seed: of all randomness.
        dtype: safetensors code of the output's weights, or None to keep each tensor's.
        calibration: what a shrink is fitted on: ``texts`` (files, data sets on the hub, or ``self``: the model writes
            it; each has an equal share), ``samples`` (windows), ``length`` (tokens in each) and ``refine`` (steps, or
            None). None for a growth.
    """

    model: str
    family: str
    source: Sizes
    target: Sizes
    methods: Mapping[str, str]
    split: str = "uneven"
    snr_db: float | None = None
    seed: int = 0
    dtype: str | None = None
    calibration: Mapping[str, Any] | None = None

    @property
    def shrinks(self) -> bool:
        """Whether this is a shrink; otherwise it is a growth."""
        return self.calibration is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in a fixed order, without those that only the other direction has."""
        values = asdict(self) | {"methods": dict(self.methods)}
        if self.calibration is None:
            others = {"calibration"}
        else:
            others = {"split", "snr_db"}
            values["calibration"] = dict(self.calibration)
        return {key: value for key, value in values.items() if key not in others}

    def to_yaml(self) -> str:
        """The plan as YAML text."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan of what `as_dict` gave.

        Raises:
            KeyError, TypeError: these are not a plan's values.
        """
        sizes = {side: Sizes(**values[side]) for side in ("source", "target")}
        return cls(**{**values, **sizes})

    @classmethod
    def from_yaml(cls, path: Path) -> Plan:
        """Read a plan that `to_yaml` wrote.

        Raises:
            RecipeError: the file cannot be read or is not a plan.
        """
        try:
            plan = cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RecipeError(
                f"cannot read {path}: {error.strerror}", "write one with dslm plan --yaml"
            ) from error
        except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"{path} is not a plan: {error}", "write one with dslm plan --yaml") from error
        wrong = _wrong_types(plan)
        if wrong:
            raise RecipeError(f"{path} is not a plan: {wrong}", "write one with dslm plan --yaml")
        return plan


def _wrong_types(plan: Plan) -> str:
    """The first value of a plan that is not of its kind, in words; empty when all are."""
    for sizes in (plan.source, plan.target):
        for word, value in sizes.as_dict().items():
            if type(value) is not (bool if word == "tied" else int):
                return f"{word} is {value!r}"
    kinds: dict[str, type | tuple[type, ...]] = {
        "model": str,
        "family": str,
        "methods": dict,
        "split": str,
        "snr_db": (int, float, type(None)),
        "seed": int,
        "dtype": (str, type(None)),
    }
    wrong = (k for k, kind in kinds.items() if not isinstance(getattr(plan, k), kind))
    return next((f"{k} is {getattr(plan, k)!r}" for k in wrong), "") or wrong_calibration(plan.calibration)


def plan_growth(
    model: str,
    family: Family,
    config: Config,
    target: Sizes,
    *,
    method: str = "hypercloning",
    split: str = "uneven",
    snr_db: float | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> Plan:
    """Resolve and check a growth.

    Args:
        model: name of the source.
        family: the family's table.
        config: the source's config.
        target: the sizes to reach.
        method: ``hypercloning``, ``net2net`` or ``padding``, for every width that grows; depth has one method.
        split: how copies share what they are read with.
        snr_db: level of the ``noise`` split, in decibels.
        seed: of all randomness, not negative.
        dtype: safetensors code of the output, or None to keep each tensor's.

    Raises:
        SizeError: the target is illegal, or smaller than the source anywhere.
        RecipeError: the options do not fit together.
    """
    source = Sizes.from_config(family, config)
    words = _dimensions_to_grow(source, target)
    plan = Plan(
        model=model,
        family=family.name,
        source=source,
        target=target,
        methods={word: DEPTH_METHOD if word == "num_hidden_layers" else method for word in words},
        split="noise" if snr_db is not None else split,
        snr_db=snr_db,
        seed=seed,
        dtype=dtype,
    )
    check_plan(plan, family, config)
    return plan


def plan_shrink(
    model: str,
    family: Family,
    config: Config,
    target: Sizes,
    *,
    method: str = "reconstruct",
    texts: Sequence[str] = (SELF,),
    samples: int = 64,
    length: int = 512,
    refine: int | None = None,
    seed: int = 0,
) -> Plan:
    """Resolve and check a shrink.

    Args:
        model: name of the source.
        family: the family's table.
        config: the source's config.
        target: the sizes to reach.
        method: ``reconstruct`` or ``slice``, for every dimension that shrinks.
        texts: calibration texts: files, data sets on the hub, or ``self``: the model writes it.
        samples: windows of calibration text, from each text an equal share.
        length: tokens in a window.
        refine: optimiser steps on each block after the closed form, 0 for none at all; None: only on the last one
            and beside layers that are dropped, as many as the text is good for.
        seed: of all randomness, not negative.

    Raises:
        SizeError: the target is illegal, larger than the source anywhere, or cannot be reached.
        RecipeError: the options do not fit together.
    """
    if isinstance(texts, str):
        raise RecipeError(f"texts is {texts!r}, one word", "give a list of texts")
    source = Sizes.from_config(family, config)
    plan = Plan(
        model=model,
        family=family.name,
        source=source,
        target=target,
        methods=dict.fromkeys(_dimensions_to_shrink(source, target), method),
        seed=seed,
        calibration={"texts": list(texts), "samples": samples, "length": length, "refine": refine},
    )
    check_plan(plan, family, config)
    return plan


def _dimensions_to_shrink(source: Sizes, target: Sizes) -> list[str]:
    changed = differing(source, target)
    return [word for word in SHRUNK if word in changed]


def _dimensions_to_grow(source: Sizes, target: Sizes) -> list[str]:
    """The dimensions that need a method; both head counts are one matter."""
    changed = differing(source, target)
    words = [word for word in GROWN if word in changed]
    if "num_key_value_heads" in words and "num_attention_heads" not in words:
        words.append("num_attention_heads")
    return words


def check_plan(plan: Plan, family: Family, config: Config) -> None:
    """Refuse a plan that is for another model or cannot be carried out.

    Raises:
        SizeError: the target is illegal, or not a growth; for a shrink, not one that can be reached.
        RecipeError: it starts from another model, or an option is none that exists.
    """
    if plan.family != family.name or plan.source != Sizes.from_config(family, config):
        raise RecipeError(
            f"the plan is for another model, {plan.model}", "make one for this model with dslm plan --yaml"
        )
    if plan.calibration is None:
        _check_growth_plan(plan, family, config)
    else:
        _check_shrink_plan(plan, plan.calibration, family, config)
    if plan.seed < 0:
        raise RecipeError(f"seed {plan.seed} is negative", "give zero or a positive whole number")


def _check_shrink_plan(plan: Plan, calibration: Mapping[str, Any], family: Family, config: Config) -> None:
    check_shrink(plan.source, plan.target, family, config)
    _check_same_tensors(plan.target, family, config)
    check_methods(plan.methods, _dimensions_to_shrink(plan.source, plan.target))
    check_calibration(calibration)
    if plan.dtype is not None:
        raise RecipeError(f"a shrink to dtype {plan.dtype!r}", "a shrink keeps the source's; leave dtype out")


def _check_growth_plan(plan: Plan, family: Family, config: Config) -> None:
    check_growth(plan.source, plan.target)
    check_legal(family, config, plan.target)
    _check_same_tensors(plan.target, family, config)
    for word in _dimensions_to_grow(plan.source, plan.target):
        known = (DEPTH_METHOD,) if word == "num_hidden_layers" else METHOD_NAMES
        if plan.methods.get(word) not in known:
            raise RecipeError(
                f"unknown method {plan.methods.get(word)!r} for {word}", f"known are {', '.join(known)}"
            )
    if plan.target.num_hidden_layers != plan.source.num_hidden_layers and not family.keeps_stream(config):
        raise SizeError(
            f"num_hidden_layers cannot grow: this {family.name} has norms over its stream, and a block that adds "
            "nothing would still change it",
            "grow its widths instead",
        )
    if plan.split not in SPLIT_NAMES:
        raise RecipeError(f"unknown split {plan.split!r}", f"known are {', '.join(SPLIT_NAMES)}")
    if (plan.split == "noise") is not (plan.snr_db is not None):
        raise RecipeError(
            f"split {plan.split!r} with snr_db {plan.snr_db}", "the noise split, and only it, has a level"
        )
    if plan.dtype is not None and plan.dtype not in DTYPE_CODES:
        raise RecipeError(f"unknown dtype {plan.dtype!r}", f"known are {', '.join(DTYPE_CODES)}")


def _check_same_tensors(target: Sizes, family: Family, config: Config) -> None:
    """A tensor whose existence depends on sizes (OPT's projections) must not vanish or appear on the way."""
    before, after = dict(family.present(config)), dict(family.present(target.into_config(family, config)))
    for template in (before.keys() ^ after.keys()) - {family.head}:
        condition = (before | after)[template].condition
        raise SizeError(
            f"{template!r} exists only if {condition}, which these sizes change",
            "choose a slightly different size",
        )


def check_growth(source: Sizes, target: Sizes) -> None:
    """Refuse a target that is not a growth.

    Raises:
        SizeError: a dimension would shrink, or is one that growing does not change.
    """
    for word in WORDS:
        before, after = getattr(source, word), getattr(target, word)
        if word in GROWN and 0 < after < before:
            mixed = any(getattr(target, other) > getattr(source, other) for other in GROWN)
            hint = "up only grows; dslm down shrinks"
            raise SizeError(
                f"{word} {after} is smaller than the source's {before}",
                f"leave it at {before}, or shrink with dslm down first" if mixed else hint,
            )
        if word not in GROWN and after != before:
            raise SizeError(f"{word} cannot change from {before} to {after}", f"up grows {', '.join(GROWN)}")
    if target.num_hidden_layers > _DEEPEST:
        raise SizeError(
            f"num_hidden_layers {target.num_hidden_layers} is more than any model has", "give fewer"
        )
    if target.tied and not source.tied:
        raise SizeError("two separate tables cannot become a tied one", "leave tie_word_embeddings as it is")
