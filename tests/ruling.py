"""A rule of shrinking, and how to leave it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pico import make_model

WRONG = 1e-3
Patch = Callable[[pytest.MonkeyPatch], None]
Plant = Callable[[PreTrainedModel], None]


def instead(owner: object, name: str, make: Callable) -> Patch:
    """Put ``make(what was there)`` in a function's place."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


@dataclass(frozen=True)
class Rule:
    """A model that needs a rule, as it is or with something planted, and sizes to grow or to cut to.

    For a fit, ``worse`` is how much larger the error of the stream on held-out tokens is without the rule.
    """

    family: str
    variant: str
    without: Patch
    sizes: dict = field(default_factory=dict)
    plant: Plant = lambda model: None
    method: str = "hypercloning"
    worse: float = 0.0

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        model = make_model(self.family, self.variant, dtype=dtype)
        with torch.no_grad():
            self.plant(model)
        model.save_pretrained(folder)
        return model
