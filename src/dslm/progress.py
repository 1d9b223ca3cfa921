"""How the library says how far it is: whoever wants to know gives it a callback."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called while the library works with a label, what is done and what there is in all.

A label may carry a note behind a tab, which changes while the label stays."""
