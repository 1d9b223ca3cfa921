"""Low-rank adapters beside a model: opened with it, and put on when it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import CheckpointError
from dslm.output import headers_hash, record_of


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A model that is loaded with an adapter of peft on it.

    Args:
        checkpoint: the model, opened with its weights.
        folder: the adapter: what ``dslm train --lora`` or peft wrote.

    Raises:
        CheckpointError: it is no adapter, or was trained on another model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is no adapter: it has no adapter_config.json",
            "give a folder that dslm train --lora wrote",
        )
    trained: list[dict[str, Any]] = record_of(folder).get("trained") or [{}]
    if trained[-1].get("base_headers_sha256") not in (None, headers_hash(checkpoint)):
        raise CheckpointError(
            f"{folder} was trained on another model than {checkpoint.name}",
            "give the model that it was trained on",
        )
    return replace(checkpoint, adapter=folder, name=f"{checkpoint.name}+{folder.resolve().name}")
