"""Ctrl-C that is never lost, and an end that is asked for otherwise which leaves nothing behind either.

Python drops a KeyboardInterrupt that is raised inside a callback of its own, as in the middle of an import. So the
signal is also remembered, and whoever reports progress asks.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class _Memory:
    """Plain values: a lock, as an Event has, could be held by the very code that the signal interrupts."""

    asked: bool = False
    held: bool = False
    ended: int = 0


_memory = _Memory()


def listen() -> None:
    """Remember Ctrl-C from now on, and end in order when told to; only the main thread may ask for signals."""
    _memory.asked = _memory.held = False
    _memory.ended = 0
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, _remember)
    if "RANK" in os.environ:  # one of several processes: whoever started them must end them at once
        return
    for name in ("SIGTERM", "SIGHUP"):  # of kill and timeout, and of a terminal that closes
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # under nohup it is ignored
            signal.signal(number, _end)


def check() -> None:
    """Stop here if Ctrl-C was pressed, or an end was asked for.

    Raises:
        KeyboardInterrupt: it was pressed.
        SystemExit: the end was asked for.
    """
    if _memory.ended:
        raise SystemExit(128 + _memory.ended)
    if _memory.asked:
        raise KeyboardInterrupt


def clear() -> None:
    """Forget the Ctrl-C that was pressed: it has done what it was meant to do."""
    _memory.asked = False


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C raises nothing: who works there asks the function it is given whether to stop.

    A second one, pressed because the first was not heard, raises KeyboardInterrupt as everywhere. Both are forgotten
    at the end.
    """
    clear()
    _memory.held = True
    try:
        yield lambda: _memory.asked
    finally:
        _memory.held = False
        clear()


def _end(number: int, frame: FrameType | None) -> None:
    _memory.ended = number
    raise SystemExit(128 + number)


def _remember(number: int, frame: FrameType | None) -> None:
    patient = _memory.held and not _memory.asked
    _memory.asked = True
    if not patient:
        raise KeyboardInterrupt
