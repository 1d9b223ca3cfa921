"""Every family's table in a test: all families, all their tiny variants, and the shapes that the table gives."""

from __future__ import annotations

import copy

import pytest

import pico
from dslm.families import family_names, load_family

FAMILIES = family_names()
every_family = pytest.mark.parametrize("name", FAMILIES)
every_variant = pytest.mark.parametrize(("name", "variant"), pico.CASES, ids=pico.IDS)


def plain_config(name: str, variant: str) -> dict:
    """A config with the variant's keys alone, as an old checkpoint has it."""
    return {"model_type": name, **copy.deepcopy(pico.PICO[name][variant])}


def shapes_of(name: str, config: dict) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in load_family(name).layout(config).values()}
