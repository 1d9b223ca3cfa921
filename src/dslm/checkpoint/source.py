"""MODEL, as a user writes it, to a checkpoint: a folder, a hub id, a GGUF file or a built-in model."""

from __future__ import annotations

import re
from collections.abc import Callable

from dslm.checkpoint.gguf import open_demo, open_gguf
from dslm.checkpoint.hub import open_hub
from dslm.checkpoint.reader import Checkpoint, open_folder
from dslm.errors import CheckpointError
from dslm.places import expanded

_DEMO = "demo:"
_LOOKS_LOCAL = ("/", "./", "../", "~")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\S+)?")


def open_checkpoint(
    model: str, *, weights: bool = True, progress: Callable[[str, int, int], None] | None = None
) -> Checkpoint:
    """Open a model from wherever it lies.

    Args:
        model: a checkpoint folder, a ``.gguf`` file, a hub id (``owner/name`` or ``owner/name@revision``),
            or ``demo:NAME``. A folder that exists comes before a hub id of the same name.
        weights: whether the weights must be on this machine. False fetches kilobytes from the hub and
            gives a checkpoint that can be described but not read.
        progress: called as ``progress(what, done, total)``; bytes for a download, steps for a conversion.

    Raises:
        CheckpointError: there is no such model, or it is damaged or out of reach.
        UnsupportedFamilyError: it is a model that cannot be resized.
        MissingExtraError: opening it needs a package that is not installed.
    """
    if not model.strip():
        raise CheckpointError("the name of a model is empty", "give a path, a hub id, or demo:smollm2-135m")
    if model.startswith(_DEMO):
        return open_demo(model.removeprefix(_DEMO), progress=progress)
    path = expanded(model)
    if model.lower().endswith(".gguf"):
        return open_gguf(path, progress=progress)
    if path.exists() or model.startswith(_LOOKS_LOCAL) or model in (".", ".."):
        return open_folder(path)
    if _HUB_ID.fullmatch(model):
        return open_hub(model, weights=weights, progress=progress)
    raise CheckpointError(
        f"{model!r} is neither a folder here, nor a .gguf file, a hub id or demo:NAME",
        "give a path, a hub id such as Qwen/Qwen3-0.6B, or demo:smollm2-135m",
    )
