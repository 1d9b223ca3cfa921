"""Calling the command line in a test: a model with and one without a tokenizer, and what is printed."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pico
from dslm.cli.main import run


def add_tokenizer(folder, words=pico.VOCAB):
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model without a tokenizer."""
    return pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("bare") / "bare")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with a tokenizer."""
    folder = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("model") / "tiny")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def call(capsys):
    """Run a command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_line(err):
    assert err.count("\n") == 1
    assert err.startswith("dslm: ")
    assert "Traceback" not in err
    return err
