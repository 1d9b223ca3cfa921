"""What a training run is asked for, and which requests make no sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from dslm.errors import RecipeError

_MOST, _LAST_SEED = 10**15, 2**32 - 1
"""No count is larger, and no seed."""
MODES = ("full", "lora", "qlora")
SCHEDULES = ("cosine", "linear", "constant")
RECIPES = ("auto", "plain", "growth")
PRECISIONS = ("auto", "float32", "bfloat16")
RUNS_ON = ("auto", "cpu")
LEARNING_RATES = {"full": 1e-4, "distilled": 3e-4, "lora": 2e-4, "qlora": 2e-4}
"""Where none is given. Full training: a careful rate, not tuned. With a teacher: the best of 1e-4, 3e-4 and 1e-3 for
SmolLM2-135M cut by 15 % without compensation, on 20,000 tokens and one seed
(``benchmarks/results/healing_rates.json``). Adapters: what QLoRA used for 7B and 13B models (arXiv 2305.14314)."""


@dataclass(frozen=True, slots=True)
class Training:
    """One training run, fully described.

    Attributes:
        data: text files, JSON-lines files, folders, or data sets on the hub.
        eval_data: the same for evaluation; None: a share of ``data`` is held out.
        held_out: that share.
        mode: ``full``, ``lora`` or ``qlora``.
        epochs: passes over the data; ``tokens`` and ``max_steps``, where given, decide instead.
        tokens: tokens to train on.
        max_steps: optimiser steps.
        block_size: tokens in a block, cut to the model's context.
        batch_size: blocks in a step of one device.
        gradient_accumulation: such batches in an optimiser step.
        learning_rate: of AdamW; None is the mode's of `LEARNING_RATES`.
        schedule: how it falls after the warm-up.
        warmup: share of the steps in which it rises.
        weight_decay: of matrices, decoupled.
        max_grad_norm: longer gradients are cut to this; 0 cuts none.
        recipe: ``growth`` scales rates by how the model was grown; ``auto`` does where that is known to end lower
            (`dslm.train.growth.chosen_recipe`).
        freeze_old: train only what a growth added.
        teacher: a model to learn from; ``source`` is the one that this was resized from.
        temperature: of the distillation.
        kl_weight: share of the distillation in the loss, the rest is that of the labels.
        lora_r: rank of the adapters.
        lora_alpha: their scale times the rank.
        lora_dropout: on what they read.
        lora_target: ``all-linear``, or names of modules with commas.
        merge: the result is a plain model instead of an adapter.
        gradient_checkpointing: compute activations twice instead of keeping them.
        precision: numbers to compute with; ``auto`` is bfloat16 where the accelerator has it. Weights stay float32.
        eval_every: steps between evaluations; None: ten in the run.
        save_every: steps between checkpoints; None: as the evaluations.
        seed: of the order of documents and blocks, and of new weights.
        device: ``auto`` or ``cpu``.
    """

    data: tuple[str, ...]
    eval_data: str | None = None
    held_out: float = 0.05
    mode: str = "full"
    epochs: float = 1.0
    tokens: int | None = None
    max_steps: int | None = None
    block_size: int = 512
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    recipe: str = "auto"
    freeze_old: bool = False
    teacher: str | None = None
    temperature: float = 1.0
    kl_weight: float = 0.9
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_target: str = "all-linear"
    merge: bool = False
    gradient_checkpointing: bool = False
    precision: str = "auto"
    eval_every: int | None = None
    save_every: int | None = None
    seed: int = 0
    device: str = "auto"

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        if self.learning_rate is not None:
            return self.learning_rate
        distilled = self.teacher is not None and self.mode == "full"
        return LEARNING_RATES["distilled" if distilled else self.mode]

    @property
    def adapts(self) -> bool:
        """Whether only adapters are trained."""
        return self.mode != "full"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in a fixed order."""
        return asdict(self) | {"data": list(self.data), "learning_rate": self.rate}


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> its two values, for those that differ and decide the numbers of a run.

    How much is computed at once does not: kept activations, and, in one process without dropout, blocks in a batch, as
    long as a step has as many.
    """
    keys = [*now, *(key for key in before if key not in now)]
    pairs = {key: (before.get(key), now.get(key)) for key in keys if key != "gradient_checkpointing"}
    step = [run.get("batch_size", 0) * run.get("gradient_accumulation", 0) for run in (before, now)]
    as_one = step[0] == step[1] and now.get("processes") == 1 and not now.get("lora_dropout")
    same = {"batch_size", "gradient_accumulation"} if as_one else set()
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in same}


def check_training(asked: Training) -> None:
    """Refuse what cannot be trained, before anything is read.

    Raises:
        RecipeError: a value is out of range or unknown, or two do not fit together.
    """
    for name, known in (
        ("mode", MODES),
        ("schedule", SCHEDULES),
        ("recipe", RECIPES),
        ("precision", PRECISIONS),
        ("device", RUNS_ON),
    ):
        if getattr(asked, name) not in known:
            raise RecipeError(f"unknown {name} {getattr(asked, name)!r}", f"known are {', '.join(known)}")
    if not asked.data:
        raise RecipeError("there is nothing to train on", "name text with --data")
    _check_numbers(asked)
    if asked.tokens is not None and asked.max_steps is not None:
        raise RecipeError("tokens and steps were both given", "one of them says when to stop")
    if asked.merge and not asked.adapts:
        raise RecipeError("there is nothing to merge in full training", "--merge goes with --lora or --qlora")
    if asked.adapts and (asked.recipe == "growth" or asked.freeze_old):
        what = "--freeze-old" if asked.freeze_old else "--recipe growth"
        raise RecipeError(f"{what} is for full training", "leave out --lora and --qlora, or it")


def _check_numbers(asked: Training) -> None:
    least: dict[str, float] = {
        "block_size": 2, "batch_size": 1, "gradient_accumulation": 1, "lora_r": 1, "max_steps": 1, "tokens": 1,
        "eval_every": 1, "save_every": 1, "max_grad_norm": 0, "weight_decay": 0, "seed": 0,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(asked, name)
        if value is not None and not value >= bound:
            raise RecipeError(f"{name} is {value}", f"it is at least {bound:g}")
        most = _LAST_SEED if name == "seed" else inf if name == "max_grad_norm" else _MOST
        if value is not None and not value <= most:
            raise RecipeError(f"{name} is {value}", f"it is at most {most:,}")
    for name in ("rate", "epochs", "temperature", "lora_alpha"):
        value = getattr(asked, name)
        if not 0 < value < inf:
            word = name.replace("rate", "learning_rate")
            raise RecipeError(
                f"{word} is {value}", "it is above 0" if not value > 0 else "it is a finite number"
            )
    ranges = {"held_out": (0, 0.5), "warmup": (0, 1), "kl_weight": (0, 1), "lora_dropout": (0, 0.9)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(asked, name) <= high:
            raise RecipeError(f"{name} is {getattr(asked, name)}", f"it is from {low} to {high}")
    if asked.held_out == 0 and asked.eval_data is None:
        raise RecipeError(
            "nothing is held out for evaluation", "give a share with --held-out, or --eval-data"
        )
