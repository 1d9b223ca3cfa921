"""Command lines and plans that ask for what cannot be done: one clear line, no output."""

from __future__ import annotations

import re

import pytest

import refusing
from refusing import doubled, nothing_happens, one_line

original, source = refusing.original, refusing.source  # fixtures

COMMANDS = [
    # arguments beside the source and -o, exit code, what the line must say
    (["-edm", "0"], 1, "multiplier 0"),
    (["-edm", "-1"], 1, "multiplier -1"),
    (["-upm", "0.5"], 1, "multiplier 0.5.*dslm down"),
    (["-edm", "two"], 1, "multiplier 'two' is not a number"),
    (["-edm", "1/0"], 1, "multiplier '1/0' is not a number"),
    (["-upm", "nan"], 1, "multiplier 'nan'"),
    (["-edm", "", "-upm", "2"], 1, "multiplier ''"),
    (["-edm", "1e400"], 1, "1e400|hidden_size"),
    (["-upm", "1e400"], 1, "1e400|intermediate_size"),
    (["-edm", "1.01"], 1, "hidden_size.*nearest"),
    (["--hidden-size", "33"], 1, "hidden_size.*nearest legal hidden_size: 32 or 36"),
    (["--hidden-size", "16"], 1, "hidden_size 16 is smaller.*32.*dslm down"),
    (["--hidden-size", "0"], 1, "hidden_size 0"),
    (["--hidden-size", "-32"], 1, "hidden_size -32"),
    (["--hidden-size", "many"], 2, "many"),
    (["--intermediate-size", "47"], 1, "intermediate_size 47.*dslm down"),
    (["--intermediate-size", str(10**18)], 1, "disk|too large|intermediate_size"),
    (["--num-attention-heads", "5"], 1, "num_attention_heads.*nearest legal num_attention_heads"),
    (["--num-key-value-heads", "3"], 1, "num_key_value_heads|num_attention_heads"),
    (["--num-key-value-heads", "1"], 1, "num_key_value_heads 1.*dslm down"),
    (["--num-hidden-layers", "1"], 1, "num_hidden_layers 1.*dslm down"),
    (["--params", "1"], 1, "smaller than the source's.*dslm down"),
    (["--params", "0"], 1, "'0' is not a positive number"),
    (["--params", "-5M"], 1, "'-5M' is not a positive number"),
    (["--params", "big"], 1, "'big' is not a number of parameters"),
    (["--params", "1e400"], 1, "1e400|parameters"),
    (["--params", "900T"], 1, "900T"),
    (["--params", "900B"], 1, "900B|900,000,000,000"),
    (["--params", "1M", "-edm", "2"], 1, "--params and multipliers"),
    (["--like", "absent-model"], 1, "absent-model"),
    (["--plan", "absent.yaml"], 1, "absent.yaml"),
    (["--seed", "-1", "-edm", "2"], 1, "seed -1"),
    (["--seed", "x", "-edm", "2"], 2, "x"),
    (["--snr-db", "nan", "-edm", "2"], 1, "snr-db"),
    (["--snr-db", "inf", "-edm", "2"], 1, "snr-db"),
    (["--method", "magic", "-edm", "2"], 2, "magic"),
    (["--split", "both", "-edm", "2"], 2, "both"),
    (["--dtype", "int8", "-edm", "2"], 2, "int8"),
    (["--params", "1,5M"], 1, "'1,5M' is not a number of parameters"),
    (["--method", "padding", "--split", "even", "-upm", "2"], 1, "--split is for copies"),
    (["--method", "padding", "--snr-db", "10", "-upm", "2"], 1, "--snr-db is for copies"),
    (
        ["--split", "uneven", "--snr-db", "10", "-upm", "2"],
        1,
        "--snr-db is a split of its own.*leave out --split",
    ),
    (["--frobnicate"], 2, "--frobnicate"),
    ([], 1, "nothing to grow"),
    (["-edm", "1", "-upm", "1"], 1, "nothing to grow"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "named"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_command_that_cannot_be_done_says_why(arguments, code, named, source, tmp_path, capsys):
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["up", str(source), "-o", str(tmp_path / "out"), *arguments], code)
    assert re.search(named, line), line


@pytest.mark.parametrize("arguments", [["desc", ""], ["up", ""], ["desc", "-i", ""]])
def test_an_empty_name_is_no_model(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with nothing_happens(tmp_path):
        assert "the name of a model is empty" in one_line(capsys, arguments, 1)


@pytest.mark.parametrize(
    "arguments", [["up"], ["up", "a", "-i", "b"], ["upp", "a"], ["--params"], ["plan", "a"]]
)
def test_a_wrong_command_line_is_a_usage_error(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with nothing_happens(tmp_path):
        assert "--help" in one_line(capsys, arguments, 2)


PLAN_EDITS = {
    "smaller": ("hidden_size: 64", "hidden_size: 16", "hidden_size 16"),
    "illegal": ("hidden_size: 64", "hidden_size: 65", "hidden_size"),
    "other layers": ("num_hidden_layers: 3", "num_hidden_layers: 4", "num_hidden_layers|another model"),
    "other model": ("family: llama", "family: qwen2", "another model, the-other-one"),
    "unknown method": ("hidden_size: hypercloning", "hidden_size: magic", "magic"),
    "no method": ("  hidden_size: hypercloning\n", "", "hidden_size"),
    "unknown split": ("split: uneven", "split: sideways", "sideways"),
    "unknown dtype": ("dtype: null", "dtype: I4", "I4"),
    "negative seed": ("seed: 0", "seed: -3", "seed"),
    "seed a word": ("seed: 0", "seed: lucky", "seed|plan.yaml"),
}


@pytest.mark.parametrize(("before", "after", "named"), PLAN_EDITS.values(), ids=PLAN_EDITS)
def test_a_plan_that_was_edited_is_checked_again(before, after, named, source, tmp_path, capsys):
    text = re.sub("(?m)^model: .*$", "model: the-other-one", doubled(source).to_yaml())
    assert before in text
    head, _, tail = text.rpartition(before) if before in ("hidden_size: 64",) else text.partition(before)
    path = tmp_path / "plan.yaml"
    path.write_text(head + after + tail)
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["up", str(source), "-o", str(tmp_path / "out"), "--plan", str(path)], 1)
    assert re.search(named, line), line


@pytest.mark.parametrize(
    "option", [["--dtype", "float32"], ["--seed", "7"], ["-edm", "2"], ["--untie"]], ids=str
)
def test_a_plan_is_not_silently_mixed_with_options(option, source, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(doubled(source).to_yaml())
    with nothing_happens(tmp_path):
        command = ["up", str(source), "-o", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.yaml")]
        line = one_line(capsys, [*command, *option], 2)
    assert "--plan" in line
