"""Refusing in a test: one line that says why, no output, the source untouched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import growing
import pico
from dslm.checkpoint.reader import open_folder
from dslm.cli.main import run
from dslm.plan import Plan, plan_growth
from dslm.resizing import resize


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    return pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture
def source(original, tmp_path) -> Path:
    """A checkpoint of the test's own, in the test's own folder."""
    folder = tmp_path / "tiny"
    shutil.copytree(original, folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything under a folder, hidden things too: path -> content."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def nothing_happens(folder: Path) -> Iterator[None]:
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    assert sorted(after) == sorted(before), "something was left behind, or is gone"
    assert after == before, "a file was changed"


def doubled(source: Path, **options) -> Plan:
    checkpoint = open_folder(source)
    return plan_growth(
        "tiny", checkpoint.family, checkpoint.config, growing.doubled(checkpoint.sizes), **options
    )


def grow(source: Path, out: Path, **options) -> None:
    resize(open_folder(source), doubled(source), out, **options)


def occupied_folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "out" / "config.json").write_text("{}")
    return tmp_path / "out"


def one_line(capsys, arguments: list[str], code: int) -> str:
    """Run a command line that fails; returns the one line it prints."""
    assert run(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("dslm: error: ")
    assert "Traceback" not in lines[0]
    assert "unexpected" not in lines[0], "an error that nobody foresaw"
    return lines[0]
