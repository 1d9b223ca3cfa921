"""Whom a student learns from: the model it was resized from, or any other that reads the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dslm.checkpoint.reader import Checkpoint
from dslm.checkpoint.source import open_checkpoint
from dslm.errors import DslmError, RecipeError
from dslm.load import load_tokenizer
from dslm.output import headers_hash, recorded
from dslm.progress import Progress

SOURCE = "source"
"""Names the model that the student was resized from."""
_TRIAL = "The 3 quick brown foxes' naïve café — 12,345.67 €\n\tdef f(x): return x**2  # 中文, русский"


def open_teacher(student: Checkpoint, asked: str, progress: Progress | None = None) -> Checkpoint:
    """Open a teacher and check that it reads the same tokens.

    Args:
        student: the model that learns.
        asked: how the teacher is named; `SOURCE` is the student's source, by its record.
        progress: called while it is fetched.

    Raises:
        RecipeError: the source is not known or not to be found, or the tokenizers differ.
        CheckpointError: the teacher cannot be opened.
    """
    teacher = _source(student, progress) if asked == SOURCE else open_checkpoint(asked, progress=progress)
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    if ours.get_vocab() != theirs.get_vocab() or ours(_TRIAL)["input_ids"] != theirs(_TRIAL)["input_ids"]:
        raise RecipeError(
            f"the tokenizers of {student.name} and its teacher {teacher.name} differ",
            "a teacher must read the same tokens",
        )
    return teacher


def _source(student: Checkpoint, progress: Progress | None) -> Checkpoint:
    record = recorded(student)
    plan: dict[str, Any] = record.get("plan") or {}
    name, print_ = plan.get("model"), (record.get("source") or {}).get("headers_sha256")
    if not isinstance(name, str):
        raise RecipeError(
            f"{student.name} has no record of what it was resized from (dslm.json)",
            "name the model with --teacher",
        )
    folders = [Path(name)] if student.folder is None else [student.folder.resolve().parent / name, Path(name)]
    for place in [*map(str, filter(Path.is_dir, folders)), name]:
        try:
            found = open_checkpoint(place, progress=progress)
        except DslmError:
            continue
        if print_ in (None, headers_hash(found)):
            return found
    raise RecipeError(
        f"{name}, which {student.name} was resized from, is not to be found", "say where it is with --teacher"
    )
