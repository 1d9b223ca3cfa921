"""Failing to shrink in a test: a model, a place for the output, the call and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import pico
from dslm.checkpoint.reader import open_folder
from dslm.plan import plan_shrink
from dslm.shrink import down
from refusing import one_line
from shrinking import smaller_in_all

SIZES = ["--intermediate-size", "30", "--hidden-size", "24", "--num-hidden-layers", "2", "--samples", "8"]
SIZES += ["--sequence-length", "16", "-q"]


@pytest.fixture
def source(tmp_path) -> Path:
    return pico.save(pico.make_model("llama", "mha"), tmp_path / "source")


@pytest.fixture(params=["nothing there", "a model there"])
def out(request, tmp_path) -> Path:
    """A place for the output; an older model that may be replaced may be there."""
    if request.param == "a model there":
        pico.save(pico.make_model("qwen2", "mha"), tmp_path / "out")
    return tmp_path / "out"


def shrink(source: Path, out: Path, progress: Callable | None = None, **options) -> down.Shrunk:
    checkpoint = open_folder(source)
    target = smaller_in_all(checkpoint.sizes)
    plan = plan_shrink("tiny", checkpoint.family, checkpoint.config, target, samples=8, length=16, **options)
    return down.shrink_checkpoint(checkpoint, plan, out, overwrite=True, device="cpu", progress=progress)


def refused(capsys, source: Path, out: Path, *options: str) -> str:
    """The one line that the command prints."""
    return one_line(capsys, ["down", str(source), "-o", str(out), *SIZES, *options], 1)
