"""The search on the command line: ``dslm plan`` with a text, and ``dslm down --search``."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pico
import searching
from asking import words
from calling import caller
from dslm.checkpoint.reader import open_folder
from dslm.errors import SizeError
from dslm.report.shapes import SizePoint, size_picture
from dslm.shrink import capture as capture_module
from dslm.shrink import search
from tokenizing import add_tokenizer

cache = searching.cache  # a fixture


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("dial") / "tiny")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def call(original, tmp_path, monkeypatch, capsys):
    shutil.copytree(original, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(words(1200))
    monkeypatch.chdir(tmp_path)
    return caller(capsys)


MEASURED = ("--calibration", "text.txt", "--sequence-length", 32)


def test_plan_shows_predictions_measurements_and_a_picture(call):
    code, out, err = call("plan", "tiny", "--params", "21k", *MEASURED, "--build", 2, "--yaml", "p.yaml")
    assert (code, err) == (0, "")
    assert re.search(r"layers +hidden +FFN +heads +kv heads +parameters +off +predicted +measured", out)
    rows = [line.split() for line in out.splitlines() if re.match(r"\d+ +3 ", line)]
    assert ["-" in row[-1] for row in rows] == [False, False] + [True] * (len(rows) - 2)
    assert re.search(r"^ 100% +26\.3k +#{20,}", out, re.MULTILINE)
    assert re.search(r"^ +50% +1\d\.\dk +#{20,} +[\d.]+ nats, perplexity", out, re.MULTILINE)
    assert "first shape written to p.yaml" in out
    assert call("down", "tiny", "--plan", "p.yaml", "-o", "out", "--device", "cpu")[0] == 0
    assert yaml.safe_load(Path("p.yaml").read_text())["calibration"]["texts"] == ["text.txt"]
    made = open_folder(Path("out")).sizes
    assert [made.num_hidden_layers, made.hidden_size, made.intermediate_size] == [
        int(n) for n in rows[0][1:4]
    ]


def test_plan_has_it_all_in_json(call):
    code, out, _ = call("plan", "tiny", "--params", "21k", *MEASURED, "--build", 1, "--json", "-n", 3)
    found = json.loads(out)
    assert (code, found["schema"], found["target"], found["parameters"]) == (0, 1, 21000, 26336)
    assert len(found["candidates"]) <= 3
    first, *others = found["candidates"]
    assert first["measured"]["perplexity"] == pytest.approx(math.exp(first["measured"]["loss"]))
    assert first["layers"] == list(range(3))
    assert all(other["measured"] is None and other["layers"] is None for other in others)
    assert [p["share"] for p in found["picture"]] == [1, 0.95, 0.9, 0.85, 0.75, 0.6, 0.5]
    assert found["picture"][0]["predicted"] == found["before"]
    losses = [p["predicted"]["loss"] for p in found["picture"]]
    assert losses[0] == min(losses)


def test_down_takes_the_best_of_what_was_built(call, tmp_path):
    asked = ("down", "tiny", "--params", "21k", *MEASURED, "--samples", 16, "--search", 2, "--device", "cpu")
    code, out, err = call(*asked, "-o", "out", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    measured = [s["measured"]["loss"] for s in found["shapes"] if s["measured"]]
    assert len(measured) == 2
    assert found["shapes"][0]["measured"]["loss"] == min(measured)
    assert found["parameters"]["after"] == found["shapes"][0]["parameters"]
    made = open_folder(tmp_path / "out").sizes.as_dict()
    assert made == {word: found["shapes"][0][word] for word in made}
    code, out, _ = call(*asked, "--dry-run")
    assert code == 0
    assert re.search(r"predicted +measured", out)
    assert "nothing written (--dry-run)" in out


REFUSED = [
    (["plan", "--params", "30k", *MEASURED], 1, "--calibration ranks smaller shapes"),
    (["plan", "--params", "21k", "--build", 2], 2, "--build needs --calibration"),
    (["plan", "--params", "21k", "--samples", 8], 2, "--samples needs --calibration"),
    (["plan", "--params", "10", *MEASURED], 1, "too few"),
    (["plan", "--params", "21k", "--calibration", "absent.txt"], 1, "absent.txt"),
    (["plan", "--params", "21k", *MEASURED, "--samples", 1], 1, "samples is 1"),
    (["down", "-upd", "2", "--search", 2], 1, "--search has nothing to choose from"),
    (["down", "--params", "21k", "--keep-ratio", "0.5", "--search", 2], 1, "were given"),
    (["down", "--params", "21k", "--search", -1], 2, "-1"),
    (["down", "--params", "21k", "--search", 1, "-o", "text.txt", *MEASURED], 1, "text.txt"),
]


@pytest.mark.parametrize(("arguments", "code", "named"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_refused_before_anything_is_measured(arguments, code, named, call, monkeypatch):
    monkeypatch.setattr(capture_module, "capture", None)
    command, *options = arguments
    found, _, err = call(command, "tiny", *options)
    assert found == code
    assert named in err
    assert "Traceback" not in err


def test_planning_without_a_text_imports_no_torch(original):
    code = (
        "import sys; from dslm.cli.main import run\n"
        f"assert run(['plan', {str(original)!r}, '--params', '21k']) == 0\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_picture_of_losses_beyond_numbers_has_bars():
    lines = size_picture([SizePoint(1, 2_000_000, 2.0), SizePoint(0.5, 1_000_000, 1e6)])
    assert [line.count("#") for line in lines] == [40, 40]
    assert "perplexity inf" in lines[1]


@pytest.mark.parametrize(("asked", "steps"), [((), 600), (("--refine", 0), 0), (("--refine", 9), 600)])
def test_shapes_are_compared_as_they_will_be_built(call, monkeypatch, asked, steps):
    """At the closed form if that is what is asked for; no search waits for steps on every block."""
    recipes, folders = [], []

    def note(*arguments, recipe, folder, **options):
        recipes.append((recipe.gap_steps, recipe.last_steps, recipe.refine))
        folders.append(folder)
        raise SizeError("enough", "that is all")

    monkeypatch.setattr(search, "search", note)
    assert call("down", "tiny", "-o", "new/out", "--params", "21k", "--search", 1, *asked, *MEASURED)[0] == 1
    assert recipes == [(steps, steps, 0)]
    assert folders == [Path.cwd()], "on the disk of the output"
