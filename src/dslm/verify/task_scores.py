"""What lm-eval found, metric by metric, and the differences of two models with their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import hypot
from numbers import Real
from typing import Any

from dslm.verify.measured import Measured, apart, ratio

Results = dict[str, Any]
"""What ``lm_eval.evaluate`` returns, samples included."""

_SAME = 1e-9  # two ways to compute one mean agree to so much


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task, for the model and, where there is one, the other.

    Attributes:
        task: the task's or group's name.
        metric: the metric's name, with lm-eval's filter in brackets where it used one.
        examples: how many examples it was measured on.
        shots: solved examples in each prompt; None for a group whose tasks differ.
        higher_is_better: None where lm-eval does not say.
        model: the figure of the model.
        against: the figure of the other model.
        difference: model minus other.
        paired: whether the error of the difference is over the differences of the same examples; otherwise both
            errors are taken as independent, which makes it too wide.
    """

    task: str
    metric: str
    examples: int
    shots: int | None
    higher_is_better: bool | None
    model: Measured
    against: Measured | None = None
    difference: Measured | None = None
    paired: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        figures = {"model": self.model, "against": self.against, "difference": self.difference}
        return {
            "task": self.task,
            "metric": self.metric,
            "examples": self.examples,
            "shots": self.shots,
            "higher_is_better": self.higher_is_better,
            **{name: None if figure is None else figure.as_dict() for name, figure in figures.items()},
            "paired": self.paired,
        }


def scores_of(model: Results, against: Results | None) -> list[TaskScore]:
    """A score for each metric of each task, groups before their tasks.

    Args:
        model: the results of the model.
        against: the results of another model on the same tasks.
    """
    tasks = [score for task in model["n-samples"] for score in _of_task(model, against, task)]
    groups = [
        score if against is None else _paired_group(score, _leaves(model, name), tasks)
        for name in model.get("groups", {})
        for score in _of_task(model, against, name)
    ]
    return [*groups, *tasks]


def _of_task(model: Results, against: Results | None, task: str) -> Iterator[TaskScore]:
    figures = model["results"][task]
    for key, value in figures.items():
        metric, comma, used = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        score = TaskScore(
            task=task,
            metric=metric if used == "none" else f"{metric} ({used})",
            examples=figures.get("sample_len", 0),
            shots=model["n-shot"].get(task),
            higher_is_better=model["higher_is_better"].get(task, {}).get(metric),
            model=_figure(model, task, metric, used),
        )
        if against is not None:
            other = _figure(against, task, metric, used)
            difference = apart(score.model, other)
            score = replace(score, against=other, difference=difference)
            pairs = _pairs(model, against, task, metric, used)
            if len(pairs) > 1 and abs(sum(pairs) / len(pairs) - difference.value) < _SAME:
                error = ratio(pairs, [1.0] * len(pairs)).error
                score = replace(score, difference=Measured(difference.value, error), paired=True)
        yield score


def _figure(results: Results, task: str, metric: str, used: str) -> Measured:
    figures = results["results"][task]
    error = figures.get(f"{metric}_stderr,{used}")  # "N/A" where lm-eval has none
    return Measured(float(figures[f"{metric},{used}"]), float(error) if isinstance(error, Real) else None)


def _pairs(model: Results, against: Results, task: str, metric: str, used: str) -> list[float]:
    """Differences of a metric example by example; empty where an example's metric is not one number."""
    first, second = (
        {
            sample["doc_id"]: sample[metric]
            for sample in results["samples"].get(task, ())
            if sample["filter"] == used and metric in sample
        }
        for results in (model, against)
    )
    if first.keys() != second.keys():
        return []
    if not all(isinstance(value, Real) for value in (*first.values(), *second.values())):
        return []
    return [float(first[example]) - float(second[example]) for example in first]


def _leaves(results: Results, group: str) -> list[str]:
    """The tasks of a group and of the groups in it."""
    children = results["group_subtasks"].get(group)
    return [group] if children is None else [leaf for child in children for leaf in _leaves(results, child)]


def _paired_group(score: TaskScore, leaves: Sequence[str], tasks: Sequence[TaskScore]) -> TaskScore:
    """A group's score with the error of its difference from those of its tasks, if it is their weighted mean."""
    parts = [task for task in tasks if task.paired and task.task in leaves and task.metric == score.metric]
    if not parts or score.difference is None:
        return score
    for weights in (
        [task.examples for task in parts],
        [1] * len(parts),
    ):  # lm-eval averages in one of these ways
        shares = [
            (task.difference or Measured(0.0)).times(weight / sum(weights))
            for task, weight in zip(parts, weights, strict=True)
        ]
        if abs(sum(share.value for share in shares) - score.difference.value) < _SAME:
            error = hypot(*(share.error or 0.0 for share in shares))
            return replace(score, difference=Measured(score.difference.value, error), paired=True)
    return score
