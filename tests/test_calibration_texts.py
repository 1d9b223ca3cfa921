"""Where calibration text is read: files and data sets, and every refusal."""

from __future__ import annotations

import sys

import pytest

import calibrating
from calibrating import SIZES, DatasetsError, install_datasets, words
from dslm.errors import MissingExtraError, RecipeError
from dslm.shrink.calibrate import calibration

make, plain = calibrating.make, calibrating.plain  # fixtures


def test_of_a_long_data_set_only_the_head_is_read(plain, monkeypatch):
    read = []

    def endless():
        while True:
            read.append(None)
            yield {"text": words(20, seed=len(read))}

    install_datasets(monkeypatch, endless())
    told = []
    found = calibration(plain, ["someone/something"], **SIZES, progress=lambda *a: told.append(a))
    assert (len(found.train), len(found.held_out)) == (14, 2)
    assert len(read) < 200
    assert told[-1][0] == "reading someone/something"
    assert told[-1][1] == told[-1][2]


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\n", "is empty"),
    "empty.jsonl": (b'{"text": ""}\n', "is empty"),
    "silent.jsonl": (b'{"messages": [{"role": "user", "content": null}]}\n', "holds no text"),
    "latin.txt": (b"caf\xe9 ", "not UTF-8 text (byte 3)"),
    "binary.txt": (b"w3\0w4", "is a binary file"),
    "broken.jsonl": (b'{"text": "w3"}\n\n{"text": \n', "line 3 of "),
    "list.jsonl": (b"[1]\n", "line 1 of "),
    "keys.jsonl": (b'{"text": "w3"}\n{"body": "w3", "id": 7}\n', "has 'body', 'id'; the text must be under"),
    "number.jsonl": (b'{"text": 3}\n', "is 3; it must be a text"),
    "short.txt": (b"w3 " * 63, "has 63 tokens, and 2 windows of 32 need 64"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(plain, tmp_path, name):
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        calibration(plain, [str(tmp_path / name)], **SIZES)
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["/no/such.txt", "./such", "data/such.jsonl", "such", "~/no such/file"])
def test_a_missing_file_is_refused(plain, source):
    with pytest.raises(RecipeError, match=r"there is no file .*such"):
        calibration(plain, [source], **SIZES)


def test_a_folder_without_text_is_refused(plain, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(RecipeError, match="holds no text"):
        calibration(plain, [str(tmp_path)], **SIZES)


def test_the_hub_is_not_asked_when_offline(plain):
    with pytest.raises(
        RecipeError, match="someone/something is no file here, and HF_HUB_OFFLINE is set; unset"
    ):
        calibration(plain, ["someone/something"], **SIZES)


def test_the_hub_needs_a_package(plain, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        calibration(plain, ["someone/something"], **SIZES)
    assert caught.value.hint == "pip install datasets"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            FileNotFoundError("no such\nthing"),
            "cannot be read from the hub: no such thing; check the spelling",
        ),
        (DatasetsError("no such split"), "cannot be read from the hub: no such split"),
        (ValueError("Config name is missing"), "cannot be read from the hub: Config name is missing"),
        ([{"body": "w3"}], "row 1 of someone/something has 'body'; the text must be under"),
        ([], "the data set someone/something is empty"),
    ],
)
def test_a_bad_data_set_is_refused(plain, monkeypatch, found, said):
    install_datasets(monkeypatch, found)
    with pytest.raises(RecipeError) as caught:
        calibration(plain, ["someone/something"], **SIZES)
    assert said in str(caught.value)
