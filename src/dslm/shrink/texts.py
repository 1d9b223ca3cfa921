"""The documents of a calibration text: a text file, a JSON-lines file, or a data set on the hub."""

from __future__ import annotations

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from dslm.errors import MissingExtraError, RecipeError
from dslm.plan_shrink import names_data_set
from dslm.progress import Progress

CHARACTERS = 8
"""Read for each token that is wanted; most texts need four."""

_DOCUMENTS = 64  # at least so many from a hub data set
_ROWS = (".jsonl", ".json", ".ndjson", ".json-lines")
_TITLE = re.compile(r"^ ?= (?!= )[^\n]*(?<! =) = ?$", re.MULTILINE)  # " = Title = ", not " = = Section = = "


def read_documents(source: str, characters: int, progress: Progress | None = None) -> tuple[list[str], str]:
    """The documents of a source, each once, and in words what it is.

    Args:
        source: a text file, a JSON-lines file with ``text`` or ``messages``, or the id of a data set on the hub.
        characters: how many are enough, where reading all would take long.
        progress: called with a label, characters read and characters in all.

    Raises:
        RecipeError: it is missing, unreadable, empty, or not text.
        MissingExtraError: a hub data set needs a package that is not installed.
    """
    if names_data_set(source):
        return _hub_documents(source, characters, progress), f"the data set {source} on the hub"
    return file_documents(Path(source).expanduser()), f"the file {source}"


def file_documents(path: Path) -> list[str]:
    """The documents of a file, each once: its rows, or what begins at lines like `` = Title = ``, or all of it.

    Raises:
        RecipeError: it is missing, unreadable, empty, or not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(
            f"there is no file {path}", "give a text file or a data set's owner/name"
        ) from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", "give a text file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})", "give a text file") from error
    if "\0" in text:
        raise RecipeError(f"{path} is a binary file", "give a text file")
    if path.suffix.lower() in _ROWS:
        # Not splitlines: JSON strings may hold the other line ends of Unicode.
        lines = enumerate(text.split("\n"), start=1)
        documents = [_row_text(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    else:
        starts = [0, *(match.start() for match in _TITLE.finditer(text)), len(text)]
        documents = [text[a:b] for a, b in pairwise(starts)]
    kept = list(dict.fromkeys(document for document in documents if document.strip()))
    if not kept:
        raise RecipeError(f"{path} is empty", "give a file with text in it")
    return kept


def _row_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where} is not JSON: {error}", "write one JSON object on each line") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{where} is not a JSON object", 'write rows like {"text": "..."}')
    return _text_of(row, where)


def _text_of(row: dict[str, Any], where: str) -> str:
    """The text of a row, or what its messages say, a blank line between them."""
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return text
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        said = [message.get("content") for message in messages]
        return "\n\n".join(content for content in said if isinstance(content, str))
    keys = ", ".join(map(repr, row)) or "no keys"
    raise RecipeError(f"{where} has {keys}", "the text must be under 'text', or in 'messages'")


def _hub_documents(source: str, characters: int, progress: Progress | None) -> list[str]:
    """The first documents of a data set, enough for so many characters."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE to read it from the hub, or give a text file"
        raise RecipeError(f"{source} is no file here, and HF_HUB_OFFLINE is set", hint)
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtraError(
            f"reading {source} from the hub needs a package that is not installed", "pip install datasets"
        ) from error
    documents: dict[str, None] = {}
    size = 0
    try:
        for number, row in enumerate(datasets.load_dataset(source, split="train", streaming=True), start=1):
            text = _text_of(row, f"row {number} of {source}")
            if text.strip() and text not in documents:
                documents[text] = None
                size += len(text)
            if progress is not None:
                progress(f"reading {source}", min(size, characters), characters)
            if size >= characters and len(documents) >= _DOCUMENTS:
                break
    except (HTTPError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())[:300]
        hint = "check the spelling (owner/name) and the network, or give a text file"
        raise RecipeError(f"{source} is no file and cannot be read from the hub: {why}", hint) from error
    if not documents:
        raise RecipeError(f"the data set {source} is empty", "give one with text in it")
    return list(documents)
