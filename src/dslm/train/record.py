"""What is written down about a finished run: settings, the command that repeats it, what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from dslm.places import expanded
from dslm.train.settings import Training

_WHAT = {"full": "all weights", "lora": "adapters", "qlora": "adapters on four-bit weights"}


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run made.

    Attributes:
        folder: the finished model or adapter.
        steps: optimiser steps.
        tokens: that it read, with what fills blocks of conversations.
        learning: parameters that could learn.
        perplexity: on held-out text, before and after.
        seconds: how long it took since it was started, or resumed.
        apart: whether documents in a block could not see each other.
    """

    folder: Path
    steps: int
    tokens: int
    learning: int
    perplexity: tuple[float, float]
    seconds: float
    apart: bool


def run_record(asked: Training, recipe: str, result: Trained, base: str) -> dict[str, Any]:
    """The facts of a run for card and record, without the places of files.

    Args:
        asked: how it was trained.
        recipe: what ``auto`` was.
        result: what came out.
        base: what the model that was trained is called.
    """
    settings = asked.as_dict()
    for key in ("data", "eval_data", "teacher"):
        value = settings[key]
        if isinstance(value, list):
            settings[key] = [_name(source) for source in value]
        elif value is not None:
            settings[key] = _name(value)
    before, after = result.perplexity
    return {
        "base": base,
        "what": _WHAT[asked.mode],
        "command": _command(asked, settings, base),
        "settings": settings | {"recipe": recipe},
        "measured": {
            "perplexity on held-out text, before": before,
            "perplexity on held-out text, after": after,
            "tokens": result.tokens,
            "steps": result.steps,
            "parameters that could learn": result.learning,
        },
    }


def _command(asked: Training, settings: dict[str, Any], base: str) -> str:
    default = Training(data=()).as_dict()
    words = [f"dslm train {quote(base)}", *(f"--data {quote(source)}" for source in settings["data"])]
    words += [] if asked.mode == "full" else [f"--{asked.mode}"]
    for key, value in settings.items():
        if key in ("data", "mode", "learning_rate") or value == default[key]:
            continue
        option = "--" + key.replace("_", "-")
        words.append(option if value is True else f"{option} {quote(str(value))}")
    return " ".join([*words, f"--learning-rate {asked.rate:g}"])


def _name(source: str) -> str:
    """A data set or a model by its id, a file or folder by its name: where it lies is nobody's business."""
    path = expanded(source)
    return path.name if path.exists() else source
