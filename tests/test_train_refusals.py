"""What ``dslm train`` refuses, in one line, with nothing written or lost."""

import re
import shutil
import sys

import pytest
from transformers import AutoModelForCausalLM

import calling
import pico
import training
from calling import one_line
from tokenizing import add_tokenizer
from training import QUICK

model, call, data = calling.model, calling.call, training.data  # fixtures
pytestmark = training.WARNINGS


def test_a_model_that_is_too_narrow_for_four_bits_is_refused(call, model, data, tmp_path):
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "--qlora")
    assert code == 1
    assert "bitsandbytes cannot run here" in one_line(err)
    assert "train with --lora instead" in err


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Using `bitsandbytes` 4-bit needs a newer one"),
        RuntimeError("no such device is supported"),
    ],
)
def test_where_bitsandbytes_cannot_run_four_bits_are_refused(error, call, model, data, tmp_path, monkeypatch):
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    def unfit(*args, **options):
        raise error

    monkeypatch.setattr(Bnb4BitHfQuantizer, "validate_environment", unfit)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "--qlora")
    assert (code, f"bitsandbytes cannot run here: {error}; train with --lora" in one_line(err)) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_model_is_not_blamed_on_bitsandbytes(call, model, data, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def broken(*args, **options):
        raise OSError("model.safetensors is truncated")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "--qlora")
    assert (code, "cannot load tiny: model.safetensors is truncated" in one_line(err)) == (1, True)


REFUSED = {
    "no data": (["--data", "/no/such.txt"], "there is no file /no/such.txt"),
    "two ends": (["--tokens", "1k"], "tokens and steps were both given"),
    "merge": (["--merge"], "nothing to merge in full training"),
    "freeze": (["--lora", "--freeze-old"], "--freeze-old is for full training"),
    "growth": (["--recipe", "growth"], "has no record of how it was grown"),
    "source": (["--teacher", "source"], "has no record of what it was resized from"),
    "block": (["--block-size", 1], "block_size is 1; it is at least 2"),
    "rate": (["--lr", 0], "learning_rate is 0.0; it is above 0"),
    "held out": (["--held-out", 0], "nothing is held out for evaluation"),
    "kl": (["--kl-weight", 2], "kl_weight is 2.0; it is from 0 to 1"),
    "modules": (
        ["--lora", "--lora-target", "nothing"],
        "no modules called 'nothing' to put adapters on; take all-linear, or of down_proj",
    ),
    "a module": (["--lora", "--lora-target", "q_proj,typo"], "no modules called 'typo'"),
    "a pattern": (["--lora", "--lora-target", "[("], "no modules called '[('"),
    "no module": (["--lora", "--lora-target", ","], "no modules called ''"),
    "merging a table": (
        ["--lora", "--merge", "--lora-target", "q_proj,embed_tokens"],
        "what is learned by embed_tokens cannot be merged: table and head are one matrix",
    ),
    "merging a head": (
        ["--lora", "--merge", "--lora-target", "lm_head"],
        "what is learned by lm_head cannot",
    ),
    "endless": (["--epochs", "inf"], "epochs is inf; it is a finite number"),
    "rate without end": (["--lr", "inf"], "learning_rate is inf; it is a finite number"),
    "decay": (["--weight-decay", "inf"], "weight_decay is inf; it is at most"),
    "not alone": (["--lora", "--lora-target", "all-linear,q_proj"], "all-linear beside other modules"),
    "seed": (["--seed", 2**32], "seed is 4294967296; it is at most 4,294,967,295"),
    "batch": (["--batch-size", 10**20], "batch_size is 100000000000000000000; it is at most"),
    "resume": (["--resume"], "there is no unfinished run in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(case, call, model, data, tmp_path):
    options, said = REFUSED[case]
    code, out, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, *options)
    assert (code, out) == (1, "")
    assert said in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", 2], "--temperature needs --teacher"),
        (["--kl-weight", 0.5, "--lora"], "--kl-weight needs --teacher"),
        (["--lora-r", 3], "--lora-r needs --lora or --qlora"),
        (["--epochs", 7], "--epochs needs a run without --tokens and --max-steps"),
        (["--held-out", 0.3, "--eval-data", "x.txt"], "--held-out needs a run without --eval-data"),
    ],
)
def test_options_that_nothing_would_use_are_refused(options, said, call, model, data, tmp_path):
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, *options)
    assert (code, said in one_line(err)) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_text_to_evaluate_on_that_is_short_is_named(call, model, data, tmp_path):
    (tmp_path / "short.txt").write_text("w3 w4")
    asked = ["--data", data, "--eval-data", tmp_path / "short.txt"]
    code, _, err = call("train", model, "-o", tmp_path / "out", *asked, *QUICK)
    assert code == 1
    assert "short.txt has 3 tokens to evaluate on" in one_line(err)
    assert "--held-out" not in err


def test_a_teacher_that_reads_less_than_a_block_is_refused(call, data, tmp_path):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for folder, length in ((student, 64), (teacher, 8)):
        config = pico.make_config("opt", "pre-norm")
        config.max_position_embeddings = length
        pico.save(AutoModelForCausalLM.from_config(config), folder)
        add_tokenizer(folder)
    asked = ["--data", data, *QUICK, "--teacher", teacher]
    code, _, err = call("train", student, "-o", tmp_path / "out", *asked)
    assert code == 1
    assert "the teacher teacher reads 8 tokens at most, and a block has 16; give --block-size 8" in one_line(
        err
    )
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "w3 \\ud800 w4"}', "line 2 of .* holds half of a character"),
        ('{"text": 3}', "'text' of line 2 of .* is 3; it must be a text"),
        (
            '{"messages": [{"role": "user", "content": "w3 \\ud800 w4"}]}',
            "line 2 of .* holds half of a character",
        ),
        ("[" * 100000, "line 2 of .* is nested too deeply"),
    ],
    ids=["surrogate", "surrogate in a turn", "number", "nested"],
)
def test_a_row_that_cannot_be_read_is_named(line, said, call, model, tmp_path):
    (tmp_path / "d.jsonl").write_text(f'{{"text": "w3"}}\n{line}\n')
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", tmp_path / "d.jsonl", *QUICK)
    assert code == 1
    assert re.search(said, one_line(err)), err


def test_a_broken_line_is_named(call, model, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "w3"}\n{"text": \n')
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", tmp_path / "d.jsonl", *QUICK)
    assert code == 1
    assert "line 2 of" in one_line(err)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(call, data, tmp_path):
    other = pico.save(pico.make_model("llama", "mha"), tmp_path / "other")
    add_tokenizer(other, words=200)
    (tmp_path / "d.txt").write_text("w3 w150 w4")
    code, _, err = call("train", other, "-o", tmp_path / "out", "--data", tmp_path / "d.txt", *QUICK)
    assert code == 1
    assert "the tokenizer of other gives token 150, and the model has 96" in one_line(err)


def test_a_short_text_is_refused(call, model, tmp_path):
    (tmp_path / "d.txt").write_text("w3 w4")
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", tmp_path / "d.txt", *QUICK)
    assert code == 1
    assert "fewer than a block of 16" in one_line(err)


def test_an_existing_output_is_refused_before_anything_is_read(call, model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", "/no/such.txt", *QUICK)
    assert code == 1
    assert "exists and is not empty" in one_line(err)


def test_a_folder_in_the_place_of_the_run_is_not_deleted(call, model, tmp_path):
    mine = tmp_path / "out.run" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, _, err = call(
        "train", model, "-o", tmp_path / "out", "--data", "/no/such.txt", *QUICK, "--overwrite"
    )
    assert code == 1
    assert "out.run is not a run of dslm train" in one_line(err)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("what", ["model", "teacher", "data", "teacher in the output"])
def test_what_a_run_needs_is_neither_dropped_nor_replaced(what, call, model, data, tmp_path):
    run, out = tmp_path / "out.run", tmp_path / "out"
    point = shutil.copytree(model, run / "checkpoint-5")
    (run / "run.json").write_text("{}")
    shutil.copytree(model, out)
    mine = shutil.copy(data, point / "mine.jsonl")
    started = point if what == "model" else model
    options = {
        "model": ["--data", data],
        "teacher": ["--data", data, "--teacher", point],
        "data": ["--data", mine],
        "teacher in the output": ["--data", data, "--teacher", out],
    }[what]
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call("train", started, "-o", out, *options, *QUICK, "--overwrite")
    assert code == 1
    assert re.search("the run needs .*, and .* is replaced or dropped by it", one_line(err))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_one_is_in_is_no_output(call, model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--resume"]):
        code, _, err = call("train", model, "-o", ".", "--data", data, *QUICK, *more)
        assert code == 1
        assert "output . is the folder you are in" in one_line(err)


def test_a_teacher_with_another_tokenizer_is_refused(call, model, data, tmp_path):
    other = pico.save(pico.make_model("llama", "mha"), tmp_path / "other")
    add_tokenizer(other, words=50)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "--teacher", other)
    assert code == 1
    assert "the tokenizers of tiny and its teacher other differ" in one_line(err)


@pytest.mark.parametrize(
    ("package", "options", "line"),
    [
        ("accelerate", [], "pip install 'dslm[train]'"),
        ("peft", ["--lora"], "pip install 'dslm[train]'"),
        ("bitsandbytes", ["--qlora"], "pip install 'dslm[qlora]'"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    package, options, line, call, model, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, *options)
    assert code == 1
    assert line in one_line(err)
