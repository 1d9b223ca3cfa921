"""Resize pretrained language models.

The public API, loaded on first use: importing dslm does not import torch.

    source = dslm.open_checkpoint("demo:smollm2-135m")
    target = source.sizes.replace(intermediate_size=3072)
    plan = dslm.plan_growth(source.name, source.family, source.config, target)
    dslm.resize(source, plan, Path("bigger"))
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.checkpoint.source import open_checkpoint
    from dslm.errors import DslmError
    from dslm.generation import generate
    from dslm.plan import Plan, plan_growth, plan_shrink
    from dslm.resizing import resize
    from dslm.shrink.down import shrink_checkpoint
    from dslm.sizes import Sizes
    from dslm.targets import candidates, scaled
    from dslm.train.run import train_checkpoint
    from dslm.train.settings import Training
    from dslm.verify.harness import load_tasks
    from dslm.verify.perplexity import evaluate_text
    from dslm.verify.report import Report, compare_checkpoints, gate
    from dslm.verify.tasks import evaluate_tasks

_HOMES = {
    "Checkpoint": "dslm.checkpoint.reader",
    "DslmError": "dslm.errors",
    "Plan": "dslm.plan",
    "Report": "dslm.verify.report",
    "Sizes": "dslm.sizes",
    "Training": "dslm.train.settings",
    "candidates": "dslm.targets",
    "compare_checkpoints": "dslm.verify.report",
    "evaluate_tasks": "dslm.verify.tasks",
    "evaluate_text": "dslm.verify.perplexity",
    "gate": "dslm.verify.report",
    "generate": "dslm.generation",
    "load_tasks": "dslm.verify.harness",
    "open_checkpoint": "dslm.checkpoint.source",
    "plan_growth": "dslm.plan",
    "plan_shrink": "dslm.plan",
    "resize": "dslm.resizing",
    "scaled": "dslm.targets",
    "shrink_checkpoint": "dslm.shrink.down",
    "train_checkpoint": "dslm.train.run",
}

__all__ = [
    "Checkpoint",
    "DslmError",
    "Plan",
    "Report",
    "Sizes",
    "Training",
    "candidates",
    "compare_checkpoints",
    "evaluate_tasks",
    "evaluate_text",
    "gate",
    "generate",
    "load_tasks",
    "open_checkpoint",
    "plan_growth",
    "plan_shrink",
    "resize",
    "scaled",
    "shrink_checkpoint",
    "train_checkpoint",
]

__version__ = metadata.version("dslm")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dslm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
