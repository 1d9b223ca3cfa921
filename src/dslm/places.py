"""Places that users name."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(place: str | Path) -> Path:
    """A path with ``~`` for the home folder; a name that begins with it and is no user's stays as it is."""
    return Path(os.path.expanduser(place))  # noqa: PTH111  (pathlib refuses users that there are not)
