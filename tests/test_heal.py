"""``dslm down --heal-tokens``: a short distillation straight after a shrink."""

import json
import re
import shlex

import pytest
import torch

import calling
import growing
import training
from calling import one_line
from dslm.errors import RecipeError, VerificationError
from dslm.train.trainer import GroupTrainer
from training import metrics

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


@pytest.mark.parametrize(
    "error", [VerificationError("the loss is nan"), RecipeError("no such thing")], ids=repr
)
def test_healing_that_fails_leaves_the_shrunk_model(error, call, model, data, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr("dslm.train.run.train_checkpoint", fails)
    out = tmp_path / "small"
    options = ["--intermediate-size", 32, "--calibration", data, "--samples", 8, "--sequence-length", 32]
    code, _, err = call("down", model, "-o", out, *options, "--heal-tokens", "20k")
    assert code == 1
    train = f"dslm train {out} -o {out}-healed --teacher {model} --tokens 20k --data {data}"
    again = "" if isinstance(error, VerificationError) else f"; {train} does that"
    assert f"{out} is shrunk, not healed{again}\n" in err
    assert str(error) in err
    assert growing.load(out, torch.float32).config.intermediate_size == 32


def test_healing_that_broke_off_goes_on_as_it_says(call, model, data, tmp_path, monkeypatch):
    options = ["--intermediate-size", 32, "--calibration", data, "--samples", 8, "--sequence-length", 32]
    options += ["--heal-tokens", "20k", "--seed", 3, "-q"]
    assert call("down", model, "-o", tmp_path / "whole", *options)[0] == 0
    out = tmp_path / "small"
    with pytest.MonkeyPatch.context() as patch:
        step, steps = GroupTrainer.training_step, []

        def breaks(self, *args, **kwargs):
            steps.append(1)
            if len(steps) == 8:
                raise RecipeError("broken off")
            return step(self, *args, **kwargs)

        patch.setattr(GroupTrainer, "training_step", breaks)
        code, _, err = call("down", model, "-o", out, *options)
    assert (code, "broken off" in err, f"{out} is shrunk, not healed" in err) == (1, True, True)
    said = re.search("not healed; dslm (.*) does that", err)
    code, _, err = call(*shlex.split(said[1]), "-q")
    assert code == 0, err
    assert metrics(out) == metrics(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"w3 w4", "fewer than a block of 64; give more text, or another one, with --data"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_text_that_is_no_use_for_healing_is_seen_before_the_shrink(text, said, call, model, data, tmp_path):
    (tmp_path / "text.txt").write_bytes(text)
    options = ["--intermediate-size", 32, "--calibration", data, "--heal-tokens", "20k"]
    code, _, err = call("down", model, "-o", tmp_path / "out", *options, "--data", tmp_path / "text.txt")
    assert (code, said in one_line(err)) == (1, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--heal-tokens", "20k", "--seed", 2**32], "seed is 4294967296; it is at most"),
        (["--heal-tokens", "2000T"], "'2000T' is not a number of tokens"),
    ],
)
def test_healing_that_cannot_be_is_seen_before_the_shrink(options, said, call, model, data, tmp_path):
    options = ["--intermediate-size", 32, "--calibration", data, *options]
    code, _, err = call("down", model, "-o", tmp_path / "out", *options)
    assert (code, said in one_line(err)) == (1, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_no_text(call, model, tmp_path, monkeypatch):
    monkeypatch.setattr("dslm.train.run.check_data", lambda *args: pytest.fail("read"))
    options = ["--intermediate-size", 32, "--heal-tokens", "1k", "--data", "someone/something", "--dry-run"]
    code, out, err = call("down", model, *options)
    assert (code, "nothing written" in out) == (0, True), err


def test_an_unfinished_run_is_seen_before_the_shrink(call, model, data, tmp_path):
    run = tmp_path / "out.run" / "run.json"
    run.parent.mkdir()
    run.write_text("{}")
    options = ["--intermediate-size", 32, "--calibration", data, "--heal-tokens", "1k"]
    code, _, err = call("down", model, "-o", tmp_path / "out", *options)
    assert (code, "an unfinished run is in" in one_line(err)) == (1, True)
    assert run.is_file()
