"""What was found out about a model at some cost, kept in the user's cache for the next shrink."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from dslm.checkpoint.reader import Checkpoint
from dslm.checkpoint.user_cache import cache_folder
from dslm.output import headers_hash

_log = logging.getLogger(__name__)


def place_of(kind: str, source: Checkpoint, facts: Any) -> Path | None:
    """The file in which something about a model is kept.

    It is named by a fingerprint of the model's headers, the first row of every tensor (fine-tuned models have equal
    headers), this version, and whatever else decides what is found.

    Args:
        kind: a folder in the cache.
        source: the model, opened with its weights.
        facts: what else decides, as JSON.

    Returns:
        None where there is no cache, or the model is read through an adapter, of which the fingerprint knows nothing.
    """
    try:
        folder = cache_folder() / kind
    except RuntimeError:
        return None
    if source.adapter is not None:
        return None
    parts = [metadata.version("dslm"), headers_hash(source), dict(source.config), facts]
    found = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name in sorted(source.entries):
        found.update(source.read_rows(name, 0, 1).float().numpy().tobytes())
    return folder / f"{found.hexdigest()[:32]}.json"


def read_kept(place: Path | None) -> Any:
    """The JSON that lies there; None if there is none that can be read."""
    if place is None:
        return None
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(place: Path | None, found: Any) -> None:
    """Write JSON, whole or not at all; where it cannot be written it is done without."""
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Never half a file, whoever else writes it.
        with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as room:
            beside = Path(room) / place.name
            beside.write_text(json.dumps(found), encoding="utf-8")
            beside.replace(place)
    except OSError as error:
        _log.info("%s is not kept: %s", place, error)
