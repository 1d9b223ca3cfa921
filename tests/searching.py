"""Searching in a test: the models, and a cache of the test's own."""

from __future__ import annotations

import pytest

import shrinking
from dslm.shrink.capture import Capture
from dslm.shrink.recipe import Recipe
from dslm.shrink.search import search
from dslm.shrink.weights import Stored
from dslm.sizes import Sizes, count_parameters

MODELS = [
    ("llama", "gqa-tied"),
    ("gemma2", "windows-softcaps"),
    ("opt", "pre-norm"),
    ("phi3", "gqa-partial-rotary"),
    ("gpt_neox", "parallel"),
    ("qwen3", "gqa-tied"),
]
NAMES = ["-".join(model) for model in MODELS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "captures"


@pytest.fixture
def llama(tmp_path):
    return Stored(shrinking.make_source(tmp_path / "tiny", "llama", "gqa-tied"))


def sizes_of(weights) -> Sizes:
    return Sizes.from_config(weights.family, weights.config)


def total(weights) -> int:
    return count_parameters(weights.family, weights.config)["total"]


def captured(weights, windows, recipe: Recipe | None = None) -> Capture:
    """What a search finds out before it builds anything."""
    wanted = round(0.9 * total(weights))
    return search(weights, wanted, windows, build=0, recipe=recipe, device="cpu").known
