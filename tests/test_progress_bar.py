"""The bar on a terminal: what is done, how far, and how long it still takes."""

import io
import re
import time

import pytest

from dslm.cli import common


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO, *, quiet: bool = False) -> str:
    """What is on stderr after some slow steps."""
    monkeypatch.setattr(common, "_DELAY", 0.0)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with common.progress_bar(quiet=quiet) as progress:
        for done in range(1, 5):
            time.sleep(0.02)
            progress("shrinking\tloss 1.5", done, 8)
    return stream.getvalue()


def test_it_says_what_is_done_how_far_and_how_long_it_takes(monkeypatch):
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(monkeypatch, Terminal()))
    assert re.search(r"shrinking  loss 1\.5 .* 50% 0:\d\d:\d\d", said), said


@pytest.mark.parametrize(("stream", "quiet"), [(Terminal(), True), (io.StringIO(), False)])
def test_nothing_is_drawn_when_quiet_or_into_a_file(stream, quiet, monkeypatch):
    assert shown(monkeypatch, stream, quiet=quiet) == ""
