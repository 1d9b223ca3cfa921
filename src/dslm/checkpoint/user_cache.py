"""Where what took time is kept for the next run: converted models, what cuts cost, text that models wrote."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache: ``DSLM_CACHE``, else ``dslm`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: there is no home folder.
    """
    if own := os.environ.get("DSLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dslm"
