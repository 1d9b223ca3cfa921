"""The documents of a text: a file, a JSON-lines file, a folder of both, or a data set on the hub."""

from __future__ import annotations

import importlib
import json
import logging
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dslm.errors import MissingExtraError, RecipeError
from dslm.places import expanded
from dslm.progress import Progress
from dslm.shrink_plan import names_data_set

log = logging.getLogger(__name__)

CHARACTERS = 8
"""Read for each token that is wanted; most texts need four."""
ROWS = (".jsonl", ".json", ".ndjson", ".json-lines")
"""Endings of files whose lines are JSON objects, a document each."""

_DOCUMENTS = 64  # at least so many from a hub data set
_TITLE = re.compile(r"^ ?= (?!= )[^\n]*(?<! =) = ?$", re.MULTILINE)  # " = Title = ", not " = = Section = = "


@dataclass(frozen=True, slots=True)
class Row:
    """One document.

    Attributes:
        text: all that is said in it.
        messages: its turns with ``role`` and ``content``, where it is a conversation; the content of one that is not
            text is None.
        where: in words, where it was read.
    """

    text: str
    messages: tuple[dict[str, Any], ...] = ()
    where: str = ""


def read_documents(source: str, characters: int, progress: Progress | None = None) -> tuple[list[str], str]:
    """The documents of a source as `read_rows` finds them, each once, and in words what it is."""
    rows, origin = read_rows(source, characters, progress)
    return _unique(rows, origin), origin


def read_rows(source: str, characters: int, progress: Progress | None = None) -> tuple[list[Row], str]:
    """The documents of a source, and in words what it is.

    Args:
        source: a text file, a JSON-lines file with ``text`` or ``messages``, a folder of such files, or a data set
            on the hub, ``owner/name[:configuration]``.
        characters: how many are enough, where reading all would take long.
        progress: called with a label, what is read and what there is in all.

    Raises:
        RecipeError: it is missing, unreadable, empty, or not text.
        MissingExtraError: a hub data set needs a package that is not installed.
    """
    if not source.strip():
        raise RecipeError("the name of a text is empty", "name a file, a folder, or a data set's owner/name")
    path = expanded(source)
    if path.is_dir():
        return _folder_rows(path, progress), f"the folder {source}"
    if names_data_set(source):
        return _hub_rows(source, characters, progress), f"the data set {source} on the hub"
    return _file_rows(path, "a text file or a data set's owner/name[:configuration]"), f"the file {source}"


def file_documents(path: Path) -> list[str]:
    """The documents of a file, each once: its rows, or what begins at lines like `` = Title = ``, or all of it.

    Raises:
        RecipeError: it is missing, unreadable, empty, or not text.
    """
    return _unique(_file_rows(path), f"the file {path}")


def _unique(rows: list[Row], origin: str) -> list[str]:
    found = list(dict.fromkeys(row.text for row in rows if row.text.strip()))
    if not found:
        raise RecipeError(f"{origin} holds no text", "give one with text in it")
    return found


def _folder_rows(folder: Path, progress: Progress | None) -> list[Row]:
    """The documents of all text files below a folder, in the order of their paths; others are passed over."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    rows: list[Row] = []
    passed: list[Path] = []
    for number, path in enumerate(paths, start=1):
        text = _plain_text(path)
        if text is None or (path.suffix.lower() == ".json" and not _holds_rows(text)):
            passed.append(path)
        else:
            rows += _rows_of(text, path)
        if progress is not None:
            progress("reading files", number, len(paths))
    if not rows:
        raise RecipeError(f"{folder} holds no text", "give a folder with text or JSON-lines files")
    if passed:
        log.info(
            "%d files in %s are neither text nor JSON lines and were left out, as %s",
            len(passed),
            folder,
            passed[0].name,
        )
    return rows


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _holds_rows(text: str) -> bool:
    """Whether the first line is a document; otherwise the file is likely one value, over one line or many."""
    try:
        first = json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and bool({"text", "messages"} & first.keys())


def _plain_text(path: Path) -> str | None:
    """The text of a file; None if it is binary."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _file_rows(path: Path, wanted: str = "a text file") -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"there is no file {path}", f"give {wanted}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", "give a text file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})", "give a text file") from error
    if "\0" in text:
        raise RecipeError(f"{path} is a binary file", "give a text file")
    rows = _rows_of(text, path)
    if not rows:
        raise RecipeError(f"{path} is empty", "give a file with text in it")
    return rows


def _rows_of(text: str, path: Path) -> list[Row]:
    """The documents of a file that has been read, those that count."""
    if path.suffix.lower() in ROWS:
        # Not splitlines: JSON strings may hold the other line ends of Unicode.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_json_row(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    else:
        rows = [Row(document, where=str(path)) for document in _split_titles(text)]
    return [row for row in rows if _counts(row)]


def _counts(row: Row) -> bool:
    """Whether it says something, or holds something else than text, which is refused where it would be trained on."""
    return bool(row.text.strip()) or any(turn["content"] is None for turn in row.messages)


def _split_titles(text: str) -> list[str]:
    starts = [0, *(match.start() for match in _TITLE.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(starts)]


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise RecipeError(f"{where} is nested too deeply", 'write rows like {"text": "..."}') from error
    except ValueError as error:
        raise RecipeError(f"{where} is not JSON: {error}", "write one JSON object on each line") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{where} is not a JSON object", 'write rows like {"text": "..."}')
    found = _row_of(row, where)
    try:
        found.text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"{where} holds half of a character: {error.reason}", "write it whole") from error
    return found


def _row_of(row: dict[str, Any], where: str) -> Row:
    """A row's text, or its conversation, whose text is what is said, a blank line between turns."""
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return Row(text, where=where)
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        turns = tuple({**message, "content": _said(message.get("content"))} for message in messages)
        said = "\n\n".join(turn["content"] for turn in turns if turn["content"] is not None)
        return Row(said, turns, where)
    for key, kind in (("text", "a text"), ("messages", "a list of turns")):
        if key in row:
            raise RecipeError(f"{key!r} of {where} is {row[key]!r:.40}", f"it must be {kind}")
    keys = ", ".join(map(repr, row)) or "no keys"
    raise RecipeError(f"{where} has {keys}", "the text must be under 'text', or in 'messages'")


def _said(content: object) -> str | None:
    """What is said in a turn, which may come in parts; None if not all of it is text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return None if None in parts else "".join(map(str, parts))


def _hub_rows(source: str, characters: int, progress: Progress | None) -> list[Row]:
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
    documents: dict[str, Row] = {}
    size = 0
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            found = _row_of(row, f"row {number} of {source}")
            if _counts(found) and found.text not in documents:
                documents[found.text] = found
                size += len(found.text)
            if progress is not None:
                progress(f"reading {source}", min(size, characters), characters)
            if size >= characters and len(documents) >= _DOCUMENTS:
                break
    except (HTTPError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())[:300]
        hint = "check the spelling (owner/name[:configuration]) and the network, or give a text file"
        raise RecipeError(f"{source} is no file and cannot be read from the hub: {why}", hint) from error
    if not documents:
        raise RecipeError(f"the data set {source} is empty", "give one with text in it")
    return list(documents.values())
