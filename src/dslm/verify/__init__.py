"""Measurements of a resized model: is it the same function, and can all of it learn?"""

from dslm.verify.exactness import Comparison, compare_models
from dslm.verify.harness import load_tasks
from dslm.verify.liveness import Liveness, Space, certify
from dslm.verify.perplexity import evaluate_text
from dslm.verify.report import Report, compare_checkpoints, gate
from dslm.verify.tasks import evaluate_tasks

__all__ = [
    "Comparison",
    "Liveness",
    "Report",
    "Space",
    "certify",
    "compare_checkpoints",
    "compare_models",
    "evaluate_tasks",
    "evaluate_text",
    "gate",
    "load_tasks",
]
