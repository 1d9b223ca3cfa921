"""The folder of an unfinished run: what was asked for, checkpoints to go on from, metrics; and who may go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dslm.errors import CheckpointError, DslmError, RecipeError, enough_memory
from dslm.train.settings import Training, differing_settings

_ASKED = "run.json"


def run_folder(out: Path) -> Path:
    """Where a run is kept until its output is whole: beside it."""
    place = out if out.name not in ("", "..") else out.resolve()
    return place.with_name(f"{place.name}.run")


def has_begun(out: Path) -> bool:
    """Whether there is a run that has not ended."""
    return (run_folder(out) / _ASKED).is_file()


def prepare_run(
    folder: Path, asked: Mapping[str, Any], *, below: int, resume: bool, overwrite: bool
) -> Path | None:
    """Make the folder of a run, or find where an earlier one is to go on.

    Args:
        folder: of the run.
        asked: everything that decides the run's numbers.
        below: go on from a step before this one.
        resume: go on with what is there.
        overwrite: what is there may go.

    Returns:
        The checkpoint to go on from; None for a fresh start.

    Raises:
        CheckpointError: an unfinished run is there, or none where one is to go on.
        RecipeError: the run that is there was asked for otherwise.
    """
    record = folder / _ASKED
    check_run(folder, resume=resume, overwrite=overwrite)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        return None
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{record} is damaged", "start over with --overwrite") from error
    changed = differing_settings(before, json.loads(json.dumps(asked)))
    if changed:
        words = ", ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in changed.items())
        raise RecipeError(
            f"the run in {folder} was asked for otherwise: {words}",
            "resume with its settings, or use --overwrite",
        )
    return last_checkpoint(folder, below)


def check_run(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse the place of a run before anything is read.

    Raises:
        CheckpointError: an unfinished run is there, or none where one is to go on, or something else.
    """
    record = folder / _ASKED
    if resume and not record.is_file():
        raise CheckpointError(f"there is no unfinished run in {folder}", "leave out --resume to start one")
    if resume or not folder.exists():
        return
    if any(folder.iterdir()) and not record.is_file():
        raise CheckpointError(f"{folder} is not a run of dslm train", "choose another place with -o")
    if not overwrite:
        raise CheckpointError(
            f"an unfinished run is in {folder}", "go on with it with --resume, or drop it with --overwrite"
        )


def check_untouched(folders: Sequence[Path], used: Sequence[Path]) -> None:
    """Refuse to replace or drop a folder that holds what a run needs.

    Args:
        folders: that will be replaced or dropped.
        used: what the run reads; what does not exist is passed over.

    Raises:
        CheckpointError: one of these lies in one of those.
    """
    for folder in folders:
        for path in used:
            if path.exists() and path.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(
                    f"the run needs {path}, and {folder} is replaced or dropped by it",
                    "choose another place with -o",
                )


def as_the_first(processes: Any, find: Callable[[], Path | None]) -> Path | None:
    """What the first process finds, or is refused with, for all of them.

    Args:
        processes: accelerate's ``PartialState``.
        find: called on the first one.

    Raises:
        DslmError: it was refused; the others have it as one that is told already.
    """
    found: Path | None = None
    error: DslmError | None = None
    if processes.is_main_process:
        try:
            found = find()
        except DslmError as refused:
            error = refused
    if processes.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        found, error = broadcast_object_list([found, error])
    if error is not None:
        error.told = not processes.is_main_process
        raise error
    return found


def enough_for(
    asked: Training, begun: Path | None = None, *, alone: bool = True
) -> AbstractContextManager[None]:
    """What a lack of memory is told as, with what needs less.

    Args:
        asked: how to train.
        begun: the folder of the run, once it has begun, which it can then go on with.
        alone: there is no other process.
    """
    batch, batches, kept = asked.batch_size, asked.gradient_accumulation, ""
    ways = [] if asked.gradient_checkpointing else ["--gradient-checkpointing"]
    if batch > 1 and alone:
        part = next(n for n in range(2, batch + 1) if batch % n == 0)
        ways.append(f"--batch-size {batch // part} --gradient-accumulation {batches * part}")
    hint = f"give {' or '.join(ways)}" if ways else ""
    if begun is not None:
        kept = f"; checkpoints are kept in {begun}"
        hint += ", with which --resume goes on" if ways else ""
    return enough_memory(
        f"for {batch} blocks of {asked.block_size} tokens at once{kept}",
        f"{hint}; or lower --block-size" if ways else "lower --block-size",
    )


def goes_on_in_place(model: Path | None, out: Path) -> bool:
    """Whether an unfinished run is one that replaces the model itself, as ``down --heal-tokens`` does."""
    return has_begun(out) and model is not None and model.resolve() == out.resolve()


def last_checkpoint(folder: Path, below: int) -> Path | None:
    """The latest checkpoint before a step that is whole: its state is what the Trainer writes last."""
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdigit() and int(step) < below}
    for path in sorted(found, key=lambda path: -found[path]):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None
