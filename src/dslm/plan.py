"""Plans: what is resized to what, by which method, from which seed. YAML on disk, a dataclass in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dslm.errors import RecipeError, SizeError
from dslm.families import Family
from dslm.families.family import Config
from dslm.sizes import WORDS, Sizes, check_legal, differing

METHOD_NAMES = ("hypercloning", "net2net", "padding")
_GROWN = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in a fixed order."""
        return asdict(self) | {"methods": dict(self.methods)}

    def to_yaml(self) -> str:
        """The plan as YAML text."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> Plan:
        """Read a plan that `to_yaml` wrote.

        Raises:
            RecipeError: the file cannot be read or is not a plan.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            values["source"], values["target"] = Sizes(**values["source"]), Sizes(**values["target"])
            return cls(**values)
        except OSError as error:
            raise RecipeError(
                f"cannot read {path}: {error.strerror}", "write one with dslm plan --yaml"
            ) from error
        except (yaml.YAMLError, TypeError, KeyError) as error:
            raise RecipeError(f"{path} is not a plan: {error}", "write one with dslm plan --yaml") from error


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
        method: ``hypercloning``, ``net2net`` or ``padding``, for every dimension that grows.
        split: how copies share what they are read with.
        snr_db: level of the ``noise`` split, in decibels.
        seed: of all randomness, not negative.
        dtype: safetensors code of the output, or None to keep each tensor's.

    Raises:
        SizeError: the target is illegal, or smaller than the source anywhere.
        RecipeError: the options do not fit together.
    """
    source = Sizes.from_config(family, config)
    check_growth(source, target)
    check_legal(family, config, target)
    if method not in METHOD_NAMES:
        raise RecipeError(f"unknown method {method!r}", f"known are {', '.join(METHOD_NAMES)}")
    if seed < 0:
        raise RecipeError(f"--seed {seed} is negative", "give zero or a positive whole number")
    if snr_db is not None:
        split = "noise"
    changed = [word for word in _GROWN if word in differing(source, target)]
    methods = dict.fromkeys(changed, method)
    if "num_key_value_heads" in methods:
        methods.setdefault("num_attention_heads", method)
    return Plan(
        model=model,
        family=family.name,
        source=source,
        target=target,
        methods=methods,
        split=split,
        snr_db=snr_db,
        seed=seed,
        dtype=dtype,
    )


def check_growth(source: Sizes, target: Sizes) -> None:
    """Refuse a target that is not a growth of width.

    Raises:
        SizeError: a dimension would shrink, or is one that growing does not change.
    """
    for word in WORDS:
        before, after = getattr(source, word), getattr(target, word)
        if word in _GROWN and 0 < after < before:
            raise SizeError(
                f"{word} {after} is smaller than the source's {before}", "up only grows; dslm down shrinks"
            )
        if word not in _GROWN and after != before:
            raise SizeError(f"{word} cannot change from {before} to {after}", f"up grows {', '.join(_GROWN)}")
    if target.tied and not source.tied:
        raise SizeError("two separate tables cannot become a tied one", "leave tie_word_embeddings as it is")
