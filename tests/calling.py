"""Calling the command line in a test: a model with and one without a tokenizer, and what is printed."""

import pytest

import pico
from dslm.cli.main import run
from tokenizing import add_tokenizer


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


def caller(capsys):
    """A function that runs a command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def call(capsys):
    return caller(capsys)


def one_line(err):
    assert err.count("\n") == 1
    assert err.startswith("dslm: ")
    assert "Traceback" not in err
    return err
