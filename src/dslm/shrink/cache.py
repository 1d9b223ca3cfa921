"""What was found out about a model at some cost, kept in the user's cache for the next shrink."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from dslm.checkpoint.fingerprint import weights_hash
from dslm.checkpoint.reader import Checkpoint
from dslm.checkpoint.user_cache import cache_folder

_log = logging.getLogger(__name__)


def place_of(kind: str, source: Checkpoint, facts: Any) -> Path | None:
    """The file in which something about a model is kept.

    It is named by a hash of all of the model's weights (one row may be all that was trained), its config, this version,
    and whatever else decides what is found.

    Args:
        kind: a folder in the cache.
        source: the model, opened with its weights.
        facts: what else decides, as JSON.

    Returns:
        None where there is no cache, or the model is read through an adapter, of which the hash knows nothing.
    """
    try:
        folder = cache_folder() / kind
    except RuntimeError:
        return None
    if source.adapter is not None:
        return None
    parts = [metadata.version("dslm"), weights_hash(source), dict(source.config), facts]
    found = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
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
