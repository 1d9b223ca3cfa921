"""Asking ``dslm down`` in a test: a model with two texts beside it, and what ``shrink`` was then asked for."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest

import dslm.shrink.down as down_module
import pico
from calling import caller
from dslm.shrink.down import Shrunk
from dslm.sizes import count_parameters
from tokenizing import add_tokenizer

FITTED = ["--samples", "16", "--sequence-length", "32"]


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, pico.VOCAB)}" for _ in range(count))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("down") / "tiny")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def source(original, tmp_path) -> Path:
    """A model of the test's own, and two texts beside it; the test works in their folder."""
    folder = tmp_path / "tiny"
    shutil.copytree(original, folder)
    (tmp_path / "text.txt").write_text(words(1000))
    (tmp_path / "check.txt").write_text(words(500, seed=1))
    return folder


@pytest.fixture
def call(source, monkeypatch, capsys):
    """Run ``dslm down`` or another command on the model: exit code, stdout, stderr."""
    monkeypatch.chdir(source.parent)

    plain = caller(capsys)

    def call(*arguments, command: str = "down"):
        return plain(command, source, *arguments)

    return call


@pytest.fixture
def asked(monkeypatch):
    """What ``shrink`` was asked for, which then pretends to have done it."""
    seen: dict = {}

    def shrink(source, plan, out, **options):
        seen.update(options, plan=plan, out=out)
        counts = [count_parameters(source.family, s.into_config(source.family, source.config))["total"]
                  for s in (plan.source, plan.target)]  # fmt: skip
        seen["made"] = Shrunk(
            folder=out, parameters=tuple(counts), nbytes=4 * counts[1], removed={}, layers=(0, 1, 2),
            losses={"held-out": (math.log(20), math.log(25)), "check": (math.log(30), math.log(45))},
            errors=(0.01, 0.4, 0.02), tokens=448, origin="the file text.txt", seconds=1.5,
        )  # fmt: skip
        return seen["made"] if "result" not in seen else seen["result"](seen["made"])

    monkeypatch.setattr(down_module, "shrink_checkpoint", shrink)
    return seen


def one_line(err: str) -> str:
    assert err.count("\n") == 1, err
    assert err.startswith("dslm: error: ")
    assert "Traceback" not in err
    assert "unexpected" not in err
    return err
