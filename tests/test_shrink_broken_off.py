"""A shrink that is broken off, by Ctrl-C or a full disk, leaves nothing behind, and keeps what was there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError

import failing
import pico
from dslm.checkpoint.reader import open_folder
from dslm.checkpoint.writer import Writer
from dslm.shrink import down, rebuild, streams
from dslm.shrink.rebuild import Windows
from dslm.shrink.search import search
from dslm.shrink.weights import Stored
from dslm.sizes import count_parameters
from failing import refused, shrink
from refusing import nothing_happens, one_line

source, out = failing.source, failing.out  # fixtures

# ---------------------------------------------------------------- Ctrl-C

LABELS = [
    "looking for copies", "writing calibration text", "ranking channels", "measuring gradients", "ranking layers",
    "comparing layers", "refining", "shrinking", "writing",
]  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("late", [False, True], ids=["at the start", "at the end"])
def test_ctrl_c_leaves_everything_as_it_was(label, late, out, source, tmp_path):
    def progress(now: str, done: int, total: int) -> None:
        if now == label and (done == total or not late):
            raise KeyboardInterrupt

    with nothing_happens(tmp_path), pytest.raises(KeyboardInterrupt):
        shrink(source, out, progress)


def test_all_steps_are_reported(source, tmp_path):
    seen: dict[str, int] = {}
    shrink(source, tmp_path / "out", lambda label, done, total: seen.update({label: done}))
    middle = [
        label for label in seen if label not in ("refining", "shrinking")
    ]  # which of them first hangs on the gap
    assert middle == LABELS[:6] + LABELS[8:]
    assert set(seen) == set(LABELS)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


@pytest.mark.parametrize("label", ["measuring cuts", "shrinking"])
def test_ctrl_c_in_a_search_leaves_everything_as_it_was(label, source, tmp_path):
    ids = torch.randint(pico.VOCAB, (10, 16), generator=torch.Generator().manual_seed(0))
    weights = Stored(open_folder(source))
    wanted = round(0.7 * count_parameters(weights.family, weights.config)["total"])

    def progress(now: str, done: int, total: int) -> None:
        if now == label:
            raise KeyboardInterrupt

    with nothing_happens(tmp_path), pytest.raises(KeyboardInterrupt):
        search(weights, wanted, Windows(ids[:8], ids[8:], {}), build=1, folder=tmp_path, progress=progress)


# ---------------------------------------------------------------- full disks


def fails(owner: object, name: str, error: Exception) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*arguments, **options):
        raise error

    return lambda monkeypatch: monkeypatch.setattr(owner, name, fail)


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams lie in files, and there is no room for them: written to, they would kill the process."""
    monkeypatch.setattr(streams, "IN_MEMORY", 0)
    fails(os, "posix_fallocate", FULL_DISK)(monkeypatch)


FULL = {
    "a block": fails(rebuild, "save_file", FULL_IN_RUST),
    "a stream": in_files,
    "the output": fails(Writer, "write", FULL_DISK),
    "the sync": fails(os, "fsync", FULL_DISK),
    "the card": fails(Writer, "add_text", FULL_DISK),
}


def test_a_disk_that_fills_in_a_search_is_one_line(source, tmp_path, monkeypatch, capsys):
    FULL["a block"](monkeypatch)
    options = ["--keep-ratio", "0.7", "--search", "1", "--samples", "10", "--sequence-length", "16", "-q"]
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["down", str(source), "-o", str(tmp_path / "out"), *options], 1)
    assert "No space left on device" in line
    assert line.endswith("free some space and try again")


@pytest.mark.parametrize("fill", FULL.values(), ids=FULL)
def test_a_disk_that_fills_is_one_line_and_leaves_everything_as_it_was(
    fill, out, source, tmp_path, monkeypatch, capsys
):
    fill(monkeypatch)
    with nothing_happens(tmp_path):
        line = refused(capsys, source, out, "--overwrite")
    assert "No space left on device" in line
    assert line.endswith("free some space and try again")


def test_a_disk_without_room_for_the_streams_between_blocks_is_one_line(
    source, tmp_path, monkeypatch, capsys
):
    """They go to a file first where heads are chosen, however much memory there is."""
    fails(os, "posix_fallocate", FULL_DISK)(monkeypatch)
    with nothing_happens(tmp_path):
        heads = ["--num-attention-heads", "2", "--num-key-value-heads", "2"]
        line = refused(capsys, source, tmp_path / "out", *heads)
    assert "No space left on device" in line
    assert line.endswith("free some space and try again")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow past so many bytes: a disk that is full, as the kernel tells it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("in_memory", [True, False], ids=["a block", "a stream"])
def test_what_the_kernel_refuses_is_one_line_too(in_memory, source, tmp_path, monkeypatch, capsys):
    if not in_memory:
        monkeypatch.setattr(streams, "IN_MEMORY", 0)
    with nothing_happens(tmp_path), small_files(9_000):
        line = refused(capsys, source, tmp_path / "out")
    assert "File too large" in line


def test_too_little_disk_is_seen_before_anything_is_done(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 1000))
    monkeypatch.setattr(down, "exact_stage", None)
    with nothing_happens(tmp_path):
        assert "not enough disk" in refused(capsys, source, tmp_path / "out")


def test_room_for_what_lies_beside_the_output_is_asked_for_too(source, tmp_path, monkeypatch, capsys):
    """The output is float32 here as well, so half of what is free would be just enough for it alone."""
    checkpoint = open_folder(source)
    target = checkpoint.sizes.replace(intermediate_size=30, hidden_size=24, num_hidden_layers=2)
    config = target.into_config(checkpoint.family, checkpoint.config)
    room = 4 * count_parameters(checkpoint.family, config)["total"] + 2000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, room))
    monkeypatch.setattr(down, "calibration", None)
    with nothing_happens(tmp_path):
        assert "not enough disk" in refused(capsys, source, tmp_path / "out")


def test_a_failure_leaves_no_new_folders_above_the_output(source, tmp_path, monkeypatch):
    out = tmp_path / "a" / "b" / "out"
    with monkeypatch.context() as patched:
        FULL["the output"](patched)
        with nothing_happens(tmp_path), pytest.raises(OSError, match="No space"):
            shrink(source, out)
    assert shrink(source, out).folder.is_dir()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"out"}
