"""Tiny models that chat: the turns of a template are words of the tokenizer, so a prompt can be written by hand."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import pico
from dslm.chat import Chatter, Conversation
from dslm.checkpoint.reader import open_folder
from dslm.sampler import Loaded, Sampling, load
from tokenizing import EOS, add_tokenizer

SYSTEM, USER, MODEL, TURN_END = "w90", "w91", "w92", "w93"
END_ID = 93
GREEDY = Sampling(temperature=0)
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w90', 'user': 'w91', 'assistant': 'w92'}[m['role']] }} {{ m['content'] }}"
    " w93 {% endfor %}{% if add_generation_prompt %}w92 {% endif %}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
)
IGNORING = TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'")


def chat_model(folder: Path, template: str | None = TEMPLATE, *, seed: int = 0, **config: int) -> Path:
    """Write a tiny model that never says a special token, and its tokenizer; returns the folder."""
    model = pico.make_model("llama", "mha", seed=seed)
    with torch.no_grad():  # logits of 0, and the largest of all the others is above
        model.lm_head.weight[[0, 1, EOS, 90, 91, 92, END_ID]] = 0
    model.config.update(config)
    return add_template(pico.save(model, folder), template)


def add_template(folder: Path, template: str | None) -> Path:
    """Put a tokenizer into a model's folder that has a chat template; returns the folder."""
    add_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_END]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Loaded:
    """The model of a folder, in memory."""
    return load(open_folder(folder), device="cpu")


def spied(chatter: Chatter, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the model is given from now on: token ids, whether it goes on from a cache, and the end tokens."""
    model, seen = chatter.loaded.model, []
    generate = model.generate

    def spy(inputs, **options):
        ends = model.generation_config.eos_token_id
        cached = options["past_key_values"] is not None
        seen.append({"ids": inputs[0].tolist(), "cached": cached, "ends": ends})
        return generate(inputs, **options)

    monkeypatch.setattr(model, "generate", spy)
    return seen


def ids(*words: str) -> list[int]:
    """The token ids of words written with spaces."""
    return [int(word[1:]) for text in words for word in text.split()]


def talked(folder: Path, *messages: str, system: str = "", tokens: int = 4) -> Conversation:
    """What the library makes of messages, drawing nothing at random."""
    chatter, talk = Chatter(loaded(folder)), Conversation(system)
    for message in messages:
        talk = talk.with_exchange(message, chatter.answer(talk, message, tokens=tokens, sampling=GREEDY).text)
    return talk


def texts(talk: Conversation) -> list[str]:
    """The answers of a conversation."""
    return [exchange.answer for exchange in talk.exchanges]


class Lines(io.StringIO):
    """A person at a terminal, who may press Ctrl-C instead of typing on."""

    def isatty(self) -> bool:
        return True

    def readline(self, *size) -> str:
        line = super().readline(*size)
        if line == "^C\n":
            os.kill(os.getpid(), signal.SIGINT)
        return line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def script(call, monkeypatch):
    """A function that runs dslm chat on lines from a pipe, or from a person."""

    def run(model, *lines, options=(), stdin=io.StringIO):
        monkeypatch.setattr("sys.stdin", stdin("".join(f"{line}\n" for line in lines)))
        return call("chat", model, "--temperature", 0, "-n", 4, *options)

    return run
