"""Full disks, failed checks and Ctrl-C: whenever it stops, everything is as it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import dslm.checkpoint.writer as writer_module
import pico
import refusing
from dslm.checkpoint.reader import open_folder
from dslm.cli import interrupt
from dslm.errors import CheckpointError, DslmError, VerificationError
from refusing import grow, nothing_happens, occupied_folder, one_line, snapshot

original, source = refusing.original, refusing.source  # fixtures


@pytest.mark.parametrize("after", [1, 2])
def test_ctrl_c_between_the_two_renames_loses_nothing(after, source, tmp_path, monkeypatch):
    """The old folder steps aside, the new one takes its place: one of the two is there whenever it stops."""
    out, rename, calls = occupied_folder(tmp_path), Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        found = rename(self, target)
        calls.append(target)
        if len(calls) == after:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grow(source, out, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (out / "thesis.txt").exists() is (after == 1)
    assert (out / "model.safetensors").exists() is (after == 2)


def test_too_little_disk_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    needed = sum(tensor.numel() * 4 for tensor in pico.make_model("llama", "gqa-tied").state_dict().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, needed))
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="not enough disk"):
        grow(source, tmp_path / "out")


class _Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.file.write(memoryview(data)[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _fills_after(room: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        opened = Path.open

        def filling(self, mode="r", *arguments, **keys):
            file = opened(self, mode, *arguments, **keys)
            return _Full(file, room) if "w" in mode and ".partial" in str(self) else file

        monkeypatch.setattr(Path, "open", filling)

    return patch


def _fails(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*arguments, **keys):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda monkeypatch: monkeypatch.setattr(owner, name, fail)


FULL = {
    "at the header": _fills_after(10),
    "in the middle": _fills_after(60_000),
    "at the sync": _fails(writer_module.os, "fsync"),
    "at the small files": _fails(writer_module.shutil, "copyfile"),
}


@pytest.mark.parametrize("fill", FULL.values(), ids=FULL)
@pytest.mark.parametrize("occupied", [False, True])
def test_a_disk_that_fills_leaves_everything_as_it_was(fill, occupied, source, tmp_path, monkeypatch, capsys):
    out = occupied_folder(tmp_path) if occupied else tmp_path / "out"
    with monkeypatch.context() as patched, nothing_happens(tmp_path):
        fill(patched)
        line = one_line(
            capsys,
            ["up", str(source), "-o", str(out), "-edm", "2", *(["--overwrite"] if occupied else [])],
            1,
        )
    assert "No space left" in line


def test_a_failure_leaves_no_new_folders_above_the_output(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, nothing_happens(tmp_path):
        FULL["in the middle"](patched)
        with pytest.raises((DslmError, OSError)):
            grow(source, tmp_path / "a" / "b" / "out")


def _raise_at(call: int, error: BaseException) -> Callable[[str, int, int], None]:
    calls = iter(range(10**6))

    def progress(label: str, done: int, total: int) -> None:
        if next(calls) == call or (call == -1 and done == total):
            raise error

    return progress


@pytest.mark.parametrize("call", [0, 7, -1])
@pytest.mark.parametrize("occupied", [False, True])
def test_an_interruption_leaves_everything_as_it_was(call, occupied, source, tmp_path):
    out = occupied_folder(tmp_path) if occupied else tmp_path / "out"
    with nothing_happens(tmp_path), pytest.raises(KeyboardInterrupt):
        grow(source, out, overwrite=True, progress=_raise_at(call, KeyboardInterrupt()))


@pytest.mark.parametrize("error", [VerificationError("not the same", "look"), KeyboardInterrupt()])
def test_a_result_that_fails_its_check_never_appears(error, source, tmp_path):
    def check(folder: Path) -> dict[str, str]:
        assert open_folder(folder).sizes.hidden_size == 64, "the check sees the finished checkpoint"
        raise error

    out = occupied_folder(tmp_path)
    with nothing_happens(tmp_path), pytest.raises(type(error)):
        grow(source, out, check=check, overwrite=True)


@pytest.fixture
def heeded(number):
    """The signal is not ignored by what is started, as it would be where the tests themselves run under nohup."""
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "dslm: interrupted; no unfinished output is left"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
    ],
)
def test_what_ends_it_leaves_nothing(number, code, said, source, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "dslm.cli.main",
        "up",
        str(source),
        "-o",
        str(out),
        "-edm",
        "2",
        "-upm",
        "2",
    ]
    before = snapshot(tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*")):  # the transformers import beside it takes seconds
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "it never began to write"
            time.sleep(0.02)
        process.send_signal(number)
        printed, complaint = process.communicate(timeout=60)
    assert process.returncode == code, complaint
    assert printed == ""
    assert complaint.strip() == said  # after the line of the ^C
    assert snapshot(tmp_path) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_end_that_python_drops_is_remembered(monkeypatch):
    """As in the middle of an import: what a callback of Python's own raises is printed and forgotten."""

    class Short:
        pass

    monkeypatch.delenv("RANK", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        interrupt.listen()
        short = Short()
        gone = weakref.ref(short, lambda _: signal.raise_signal(signal.SIGTERM))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del short
        assert gone() is None
        with pytest.raises(SystemExit) as left:
            interrupt.check()
        assert left.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, handler)
        interrupt.listen()
