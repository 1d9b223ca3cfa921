"""Which weights a model has: two models may have equal headers, configs and names."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from dslm.checkpoint.reader import Checkpoint


def weights_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of all files that hold a checkpoint's tensors, in hexadecimal; one row may be all that was trained.

    Args:
        checkpoint: opened with its weights. An adapter on it is not looked at.
    """
    paths = sorted({entry.file for entry in checkpoint.entries.values() if entry.file is not None})
    whole = hashlib.sha256()
    for path in paths:
        state = path.stat()
        whole.update(_file_hash(path, state.st_size, state.st_mtime_ns))
    return whole.hexdigest()


@lru_cache(maxsize=128)
def _file_hash(path: Path, size: int, changed: int) -> bytes:
    """Of a file that has not changed since it had this state."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
