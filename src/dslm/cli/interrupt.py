"""Ctrl-C that is never lost.

Python drops a KeyboardInterrupt that is raised inside a callback of its own, as in the middle of an import. So the
signal is also remembered, and whoever reports progress asks.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_asked = threading.Event()


def listen() -> None:
    """Remember Ctrl-C from now on; only the main thread may ask for signals."""
    _asked.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _remember)


def check() -> None:
    """Stop here if Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
