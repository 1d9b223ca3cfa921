"""Places for the output: which are refused, and what overwriting takes away and leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import refusing
from dslm.checkpoint.reader import open_folder
from dslm.checkpoint.writer import Writer
from dslm.errors import CheckpointError, DslmError
from refusing import grow, nothing_happens, occupied_folder, snapshot

original, source = refusing.original, refusing.source  # fixtures


def _file(tmp_path: Path) -> Path:
    (tmp_path / "out").write_text("irreplaceable")
    return tmp_path / "out"


def _link(tmp_path: Path, to: str, name: str = "link") -> Path:
    (tmp_path / name).symlink_to(tmp_path / to)
    return tmp_path / name


PLACES: dict[str, tuple[Callable[[Path], Path], bool, str]] = {
    # where, whether --overwrite is given, what the message says
    "not empty": (occupied_folder, False, "not empty.*--overwrite"),
    "a file": (_file, False, "is a file"),
    "a file, overwrite": (_file, True, "is a file"),
    "the source": (lambda t: t / "tiny", False, "source"),
    "the source, overwrite": (lambda t: t / "tiny", True, "source"),
    "the source by another path": (lambda t: t / "tiny" / ".." / "tiny", True, "source"),
    "the source by a link": (lambda t: _link(t, "tiny"), True, "source"),
    "inside the source": (lambda t: t / "tiny" / "out", True, "source"),
    "deep inside the source": (lambda t: t / "tiny" / "a" / "b" / "out", True, "source"),
    "inside the source by a link": (lambda t: _link(t, "tiny") / "out", True, "source"),
    "the source's parent": (lambda t: t, True, "source"),
    "the source's parent by a link": (lambda t: _link(t, "."), True, "source"),
    "under a file": (lambda t: _file(t) / "below", False, "out"),
}


@pytest.mark.parametrize(("place", "overwrite", "named"), PLACES.values(), ids=PLACES)
def test_a_place_that_must_not_be_written_is_refused(place, overwrite, named, source, tmp_path):
    out = place(tmp_path)
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match=named) as caught:
        grow(source, out, overwrite=overwrite)
    assert caught.value.hint


def test_any_folder_above_the_source_is_refused(original, tmp_path):
    shutil.copytree(original, tmp_path / "a" / "b" / "tiny")
    for out in (tmp_path / "a" / "b", tmp_path / "a"):
        with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="source"):
            grow(tmp_path / "a" / "b" / "tiny", out, overwrite=True)


def test_the_source_by_a_link_is_the_source_too(source, tmp_path):
    """The source named through a link, the output in the folder it really lies in."""
    link = _link(tmp_path, "tiny")
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="source"):
        grow(link, source / "out")


def test_a_relative_place_is_judged_where_it_lies(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    for out in (Path(), Path("out"), Path("..")):
        with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="source"):
            grow(Path(), out, overwrite=True)


def test_an_empty_folder_is_a_place(source, tmp_path):
    (tmp_path / "out").mkdir()
    grow(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]
    assert open_folder(tmp_path / "out").sizes.hidden_size == 64


def test_a_folder_below_folders_that_do_not_exist_is_a_place(source, tmp_path):
    grow(source, tmp_path / "a" / "b" / "out")
    assert open_folder(tmp_path / "a" / "b" / "out").sizes.hidden_size == 64
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.parametrize("linked", [False, True])
def test_overwrite_leaves_nothing_stale(linked, source, tmp_path):
    out = occupied_folder(tmp_path)
    (out / "model-00001-of-00009.safetensors").write_text("stale")
    (out / "sub").mkdir()
    before = snapshot(source)
    if linked:
        out = _link(tmp_path, "out")
    grow(source, out, overwrite=True)
    assert not (out / "thesis.txt").exists()
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "dslm.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert snapshot(source) == before


def test_overwrite_never_deletes_what_is_not_a_model(source, tmp_path, monkeypatch):
    out = occupied_folder(tmp_path)
    (out / "config.json").unlink()
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="not a model"):
        grow(source, out, overwrite=True)
    (out / "config.json").write_text("{}")
    (out / "below").mkdir()
    for here in (out, out / "below"):
        monkeypatch.chdir(here)
        with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="folder you are in"):
            grow(source, out, overwrite=True)


def test_what_appeared_while_writing_is_not_overwritten(source, tmp_path):
    out = tmp_path / "out"

    def meanwhile(label: str, done: int, total: int) -> None:
        if not out.exists():
            occupied_folder(tmp_path)

    with pytest.raises((DslmError, OSError)):
        grow(source, out, progress=meanwhile)
    assert (out / "thesis.txt").read_text() == "irreplaceable"


def test_what_a_killed_run_left_is_no_obstacle(source, tmp_path):
    """A container gives every run the same process id, so the same hidden name comes again."""
    left = Writer(tmp_path / "out", []).folder
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    grow(source, tmp_path / "out")
    assert open_folder(tmp_path / "out").sizes.hidden_size == 64
