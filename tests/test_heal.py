"""``dslm down --heal-tokens``: a short distillation straight after a shrink."""

import json

import pytest
import torch

import calling
import growing
import training
from calling import one_line

model, call, data = calling.model, calling.call, training.data  # fixtures
pytestmark = training.WARNINGS


def test_down_heals_in_one_go(call, model, data, tmp_path):
    out = tmp_path / "small"
    # One heals on what is given, not on what the model wrote.
    texts = ["--calibration", "self", "--calibration", data]
    options = ["--intermediate-size", 32, *texts, "--samples", 8, "--sequence-length", 32]
    code, said, err = call("down", model, "-o", out, *options, "--heal-tokens", "20k", "--json")
    assert code == 0, err
    healed = json.loads(said)["healed"]
    assert err.count("held-out perplexity") >= 10
    assert healed["perplexity"]["after"] < healed["perplexity"]["before"]
    assert growing.load(out, torch.float32).config.intermediate_size == 32
    record = json.loads((out / "dslm.json").read_text())
    assert record["plan"]["target"]["intermediate_size"] == 32
    assert record["trained"][0]["settings"]["teacher"] == "tiny"
    assert record["trained"][0]["settings"]["data"] == [data.name]
    card = (out / "README.md").read_text()
    assert card.count("base_model") <= 1
    assert card.index("reconstruct") < card.index("## Trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_healing_that_fails_leaves_the_shrunk_model(call, model, data, tmp_path):
    out = tmp_path / "small"
    (tmp_path / "short.txt").write_text("w3 w4")
    options = [
        "--intermediate-size",
        32,
        "--calibration",
        data,
        "--samples",
        8,
        "--sequence-length",
        32,
        "-q",
    ]
    code, _, err = call(
        "down", model, "-o", out, *options, "--heal-tokens", "20k", "--data", tmp_path / "short.txt"
    )
    assert code == 1
    assert "fewer than a block" in one_line(err)
    assert growing.load(out, torch.float32).config.intermediate_size == 32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "x.txt"], "--data is for healing; say how long with --heal-tokens"),
        (["--heal-tokens", "1k", "--data", "x.txt"], "there is no file x.txt"),
        (["--heal-tokens", "1k"], "there is no text to heal on"),
    ],
)
def test_healing_needs_text_and_length(options, said, call, model, tmp_path):
    code, _, err = call("down", model, "-o", tmp_path / "out", "--intermediate-size", 32, *options)
    assert (code, said in one_line(err)) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_seen_before_the_shrink(call, model, data, tmp_path):
    run = tmp_path / "out.run" / "run.json"
    run.parent.mkdir()
    run.write_text("{}")
    options = ["--intermediate-size", 32, "--calibration", data, "--heal-tokens", "1k"]
    code, _, err = call("down", model, "-o", tmp_path / "out", *options)
    assert (code, "an unfinished run is in" in one_line(err)) == (1, True)
    assert run.is_file()
