"""Measurements of a resized model: is it the same function, and can all of it learn?"""

from dslm.verify.exactness import Comparison, compare_models
from dslm.verify.liveness import Liveness, Space, certify
from dslm.verify.report import Report, compare_checkpoints, gate

__all__ = [
    "Comparison",
    "Liveness",
    "Report",
    "Space",
    "certify",
    "compare_checkpoints",
    "compare_models",
    "gate",
]
