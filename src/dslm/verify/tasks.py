"""Benchmark tasks through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): its own tasks and local files.

lm-eval writes the prompts and computes the metrics; dslm hands it a loaded model, and pairs the answers of two models.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from math import isnan
from typing import Any

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import DslmError, RecipeError, VerificationError
from dslm.load import first_line, load_model, load_tokenizer, pick_device
from dslm.progress import Progress
from dslm.verify.harness import Suite, failures, quiet
from dslm.verify.task_scores import TaskScore, scores_of

_EXAMPLE = 256  # tokens of a typical example
_LOGITS = {"cuda": 2**28}  # of a batch of such examples: 1 GiB in float32, twice, on a GPU
_FEWER_LOGITS = 2**26  # elsewhere, where larger batches gain little
_LARGEST_BATCH = 64
_BOOTSTRAPS = 1000  # for the errors of metrics that are no mean; lm-eval's own 100,000 take minutes
_SEED = 1234  # of the few-shot examples: lm-eval's own, so that both models and lm-eval itself see the same


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One model or two on the same tasks.

    Attributes:
        model: name of the model.
        against: name of the other, if there is one.
        harness: lm-eval's version.
        limit: examples of each task at most; None for all.
        device: where it was computed.
        dtypes: of the numbers that each model was computed with.
        scores: a metric of a task each, groups first.
    """

    model: str
    against: str | None
    harness: str
    limit: int | None
    device: str
    dtypes: tuple[str, ...]
    scores: tuple[TaskScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "model": self.model,
            "against": self.against,
            "lm_eval": self.harness,
            "limit": self.limit,
            "device": self.device,
            "dtypes": list(self.dtypes),
            "scores": [score.as_dict() for score in self.scores],
        }


def evaluate_tasks(
    model: Checkpoint,
    suite: Suite,
    *,
    against: Checkpoint | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> TaskReport:
    """Run tasks on a model, or on two, one after the other.

    Args:
        model: the model, opened with its weights.
        suite: the tasks, from `load_tasks`.
        against: another model to run the same examples on.
        limit: examples of each task at most, from the first on.
        batch_size: examples at once; by default as many as keep their logits small.
        device: one of `dslm.load.DEVICES`.
        dtype: one of `dslm.load.DTYPES`.
        progress: called with a label, what is done and what there is in all.

    Raises:
        CheckpointError: a model or its tokenizer cannot be loaded.
        RecipeError: the tasks cannot be run on a model.
        VerificationError: a model gives logits that are NaN.
        DslmError: there is no such device.
    """
    models = [model] if against is None else [model, against]
    runs = [_run(one, suite, limit, batch_size, device, dtype, progress) for one in models]
    found = [results for results, _ in runs]
    return TaskReport(
        model=model.name,
        against=None if against is None else against.name,
        harness=metadata.version("lm_eval"),
        limit=limit,
        device=str(pick_device(device)),
        dtypes=tuple(used for _, used in runs),
        scores=tuple(scores_of(found[0], found[1] if against is not None else None)),
    )


def _run(
    checkpoint: Checkpoint,
    suite: Suite,
    limit: int | None,
    batch_size: int | None,
    device: str,
    dtype: str,
    progress: Progress | None,
) -> tuple[dict[str, Any], str]:
    """Lm-eval's results for one model, and the dtype it was computed in."""
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, dtype=dtype, device=device)
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    batch = batch_size or _batch(model.device.type, checkpoint.sizes.vocab_size)
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)  # again for each model: the same examples for both
    try:
        with quiet(progress, f"{checkpoint.name}: "):
            wrapped = huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch
            )
            results: dict[str, Any] = evaluator.evaluate(
                lm=wrapped, task_dict=suite.loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS
            )
    except failures() as error:
        if "out of memory" in str(error).lower():
            hint = "take a smaller --batch-size" if batch > 1 else "take a smaller model, or --device cpu"
            raise DslmError(f"batches of {batch} examples do not fit into memory", hint) from error
        raise RecipeError(
            f"lm-eval cannot run these tasks on {checkpoint.name}: {type(error).__name__}: {first_line(error)}",
            "try the tasks one by one",
        ) from error
    _check(checkpoint.name, results)
    return results, str(model.dtype).removeprefix("torch.")


def _batch(device: str, vocab: int) -> int:
    return max(1, min(_LARGEST_BATCH, _LOGITS.get(device, _FEWER_LOGITS) // (_EXAMPLE * vocab)))


def _check(name: str, results: dict[str, Any]) -> None:
    """Refuse answers that are NaN: lm-eval would take the first choice, and report an accuracy.

    Raises:
        VerificationError: there is one.
    """
    for task, samples in results["samples"].items():
        for sample in samples:
            answers = [answer for repeats in sample["resps"] for answer in repeats]
            likelihoods = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
            if any(isinstance(value, float) and isnan(value) for value in likelihoods):
                raise VerificationError(
                    f"{name} gives logits that are NaN, in task {task}",
                    "its weights are damaged, or overflow in this dtype: try --dtype float32",
                )
