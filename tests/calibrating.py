"""Calibration in a test: tiny models with and without a tokenizer, texts, a stand-in for the package of data sets."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import pytest

import pico
from dslm.checkpoint.reader import open_folder
from tokenizing import add_tokenizer

SIZES = {"samples": 16, "length": 32, "seed": 0}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """An opened tiny model, with the tokenizer that is asked for; None is none."""
    model = pico.make_model("llama", "gqa-tied")

    def make(**tokenizer):
        folder = pico.save(model, tmp_path_factory.mktemp("model") / "tiny")
        if tokenizer:
            add_tokenizer(folder, **tokenizer)
        return open_folder(folder)

    return make


@pytest.fixture(scope="module")
def plain(make):
    return make(bos=False)


@pytest.fixture(scope="module")
def bare(make):
    return make()


def words(count, seed=0):
    return " ".join(f"w{random.Random(seed * 10_007 + i).randrange(3, pico.VOCAB)}" for i in range(count))


def ids(text):
    return [int(word[1:]) for word in text.split()]


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows(windows):
    return {tuple(row) for row in windows.tolist()}


class DatasetsError(Exception):
    """The package's own base of errors."""


def install_datasets(monkeypatch, found, configuration=None):
    """Stand in for the optional package: gives rows, or raises."""

    def load_dataset(name, chosen, *, split, streaming):
        assert (name, chosen, split, streaming) == ("someone/something", configuration, "train", True)
        if isinstance(found, Exception):
            raise found
        return iter(found)

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError)),
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
