"""``dslm eval`` on texts: what it prints, and every refusal."""

import json
import subprocess
import sys

import pytest
import torch

import calling
import evaluating
import pico
from calling import one_line
from dslm.checkpoint.reader import open_folder
from dslm.errors import CheckpointError, DslmError, RecipeError, VerificationError
from dslm.verify.measured import Measured
from dslm.verify.perplexity import evaluate_text
from dslm.verify.text import PASSAGE
from dslm.verify.words import with_error
from evaluating import LENGTH, words
from tokenizing import add_tokenizer

bare, model, call = calling.bare, calling.model, calling.call  # fixtures
other, foreign = evaluating.other, evaluating.foreign  # fixtures


def test_eval_reads_the_built_in_passage(call, model):
    code, out, err = call("eval", model)
    assert (code, err) == (0, "")
    assert f"({len(PASSAGE.encode()):,} bytes) of the built-in passage" in out
    assert out.splitlines()[0].startswith("perplexity ")
    assert f"up to {pico.POSITIONS} tokens; float32 on cpu" in out
    assert "± is one standard error over windows" in out


def test_one_window_has_no_error(call, model, tmp_path):
    (tmp_path / "text.txt").write_text(words(20))
    code, out, _ = call("eval", model, "--text", tmp_path / "text.txt")
    assert code == 0
    assert "one window gives no standard error" in out
    assert "±" not in out
    facts = json.loads(call("eval", model, "--text", tmp_path / "text.txt", "--json")[1])
    assert facts["text"]["model"]["perplexity"]["error"] is None


def test_eval_json(call, model, other, tmp_path):
    (tmp_path / "text.txt").write_text(words(100))
    arguments = ["--text", tmp_path / "text.txt", "--sequence-length", LENGTH, "--json"]
    code, out, err = call("eval", model, "--against", other, *arguments)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["schema"], facts["model"], facts["against"], facts["tasks"]) == (1, "tiny", "other", None)
    text = facts["text"]
    report = evaluate_text(
        open_folder(model),
        tmp_path / "text.txt",
        against=open_folder(other),
        sequence_length=LENGTH,
        device="cpu",
    )
    assert text == json.loads(json.dumps(report.as_dict()))
    assert (text["model"]["tokens"], text["model"]["bytes"], text["model"]["windows"]) == (
        100,
        len(words(100)),
        7,
    )
    assert text["difference"]["loss"]["value"] == pytest.approx(
        text["model"]["loss"]["value"] - text["against"]["loss"]["value"]
    )
    code, out, _ = call("eval", model, "--against", other, *arguments[:-1])
    assert out.splitlines()[:2] == ["model     tiny ", "against   other"]
    assert f"x {with_error(report.perplexity_ratio)}" in out


def test_help_does_not_import_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom dslm.cli.main import run\ncode = run(['eval', '--help'])\n"
            "assert not {'torch', 'transformers', 'numpy', 'lm_eval'} & set(sys.modules)\nsys.exit(code)",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_another_tokenizer_leaves_bits_per_byte(call, model, foreign, tmp_path):
    (tmp_path / "text.txt").write_text(words(60))
    options = ["--text", tmp_path / "text.txt", "--sequence-length", LENGTH, "-q"]
    code, out, _ = call("eval", model, "--against", foreign, *options)
    assert code == 0
    assert "the tokenizers differ: " in out
    perplexity = next(line for line in out.splitlines() if line.startswith("perplexity"))
    assert perplexity.split()[-1] == "-"
    difference = json.loads(call("eval", model, "--against", foreign, *options, "--json")[1])["text"][
        "difference"
    ]
    assert (difference["same_tokenizer"], difference["loss"], difference["perplexity_ratio"]) == (
        False,
        None,
        None,
    )
    assert difference["bits_per_byte"]["error"] > 0


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (Measured(2.7233, 0.02764), "2.723 ± 0.028"),
        (Measured(21.567, 4.2), "21.6 ± 4.2"),
        (Measured(1234567.8, 4321.0), "1,234,568 ± 4,321"),
        (Measured(0.0, 0.0), "0.0000 ± 0.0000"),
        (Measured(1e-9, 1e-9), "0.000000 ± 0.000000"),
        (Measured(3.14159), "3.1416"),
        (Measured(float("inf"), float("inf")), "infinite"),
        (None, "-"),
    ],
)
def test_figures_have_the_digits_of_their_errors(figure, shown):
    assert with_error(figure) == shown


# --- refusals ----------------------------------------------------------------------------------------------

BAD_TEXTS = {
    "empty.txt": (b"", "is empty"),
    "binary.txt": (b"w3\0w4", "is a binary file"),
    "latin.txt": (b"caf\xe9", "is not UTF-8 text"),
    "one.txt": (b"w5", "has fewer than two tokens to predict; give a longer text"),
    "broken.jsonl": (b'{"text": ', "line 1 of"),
    "gone.txt": (None, "there is no file"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_refused(call, model, tmp_path, name):
    content, said = BAD_TEXTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = call("eval", model, "--text", tmp_path / name)
    assert (code, out) == (1, "")
    assert said in one_line(err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-fewshot", "2"], "--num-fewshot needs --tasks"),
        (["--batch-size", "2"], "--batch-size needs --tasks"),
        (["--tasks", "arc_easy", "--sequence-length", "64"], "--sequence-length needs --text"),
        (["--sequence-length", "7"], "--sequence-length"),
        (["--limit", "0"], "--limit"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_a_wrong_command_line_is_refused(call, model, arguments, said):
    code, out, err = call("eval", model, *arguments)
    assert (code, out) == (2, "")
    assert said in one_line(err)


def test_a_model_without_a_tokenizer_is_refused(call, model, bare):
    for arguments in ([bare], [model, "--against", bare]):
        code, out, err = call("eval", *arguments)
        assert (code, out) == (1, "")
        assert "bare has no tokenizer; copy tokenizer.json" in one_line(err)


def broken_model(folder, change):
    network = pico.make_model("llama", "mha")
    with torch.no_grad():
        change(network)
    pico.save(network, folder)
    add_tokenizer(folder)
    return open_folder(folder)


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    broken = broken_model(tmp_path / "broken", lambda network: network.lm_head.weight[5].fill_(float("nan")))
    with pytest.raises(
        VerificationError, match="broken gives logits that are NaN or infinite, in window 1 of 2"
    ):
        evaluate_text(broken, words(20), sequence_length=LENGTH, device="cpu")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = pico.save(pico.make_model("llama", "mha"), tmp_path / "m")
    add_tokenizer(folder, words=pico.VOCAB + 50)
    with pytest.raises(CheckpointError, match="gives token 120, and the model has 96"):
        evaluate_text(open_folder(folder), "w5 w120 w7", device="cpu")


def test_short_windows_are_refused(model):
    with pytest.raises(RecipeError, match="windows of 4 tokens are too short; at least 8"):
        evaluate_text(open_folder(model), words(20), sequence_length=4, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(model):
    with pytest.raises(DslmError, match="no device 'cuda' here"):
        evaluate_text(open_folder(model), words(20), device="cuda")
