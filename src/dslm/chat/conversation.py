"""What was said: messages, answers and the system text, in memory and in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dslm.errors import DslmError

SCHEMA = 1
"""Version of a saved file; it changes when a key changes its meaning."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message and the answer to it.

    Attributes:
        message: what the user wrote.
        answer: what the model wrote, as far as it came.
    """

    message: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that was said to one model; it never changes, saying more gives another.

    Attributes:
        system: text that tells the model how to answer; empty if there is none.
        exchanges: oldest first.
    """

    system: str = ""
    exchanges: tuple[Exchange, ...] = ()

    def with_exchange(self, message: str, answer: str) -> Conversation:
        """The conversation with one more message and its answer."""
        return replace(self, exchanges=(*self.exchanges, Exchange(message, answer)))

    def without_oldest(self, count: int) -> Conversation:
        """The conversation without its first ``count`` exchanges; the system text stays."""
        return replace(self, exchanges=self.exchanges[count:])

    def messages(self) -> list[dict[str, str]]:
        """The form that chat templates read: ``role`` (``system``, ``user``, ``assistant``) and ``content``."""
        found = [("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            found += [("user", exchange.message), ("assistant", exchange.answer)]
        return [{"role": role, "content": content} for role, content in found]

    @classmethod
    def from_messages(cls, messages: Sequence[Any]) -> Conversation:
        """The opposite of `messages`.

        Raises:
            ValueError: they are not a system text, if any, and then pairs of a message and its answer.
        """
        said: list[tuple[str, str]] = []
        for entry in messages:
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise ValueError("a message has no text under 'content'")
            said.append((str(entry.get("role")), entry["content"]))
        system = said.pop(0)[1] if said and said[0][0] == "system" else ""
        roles = [role for role, _ in said]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("the roles are not 'user' and 'assistant' in turns, with an answer at the end")
        texts = [content for _, content in said]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return cls(system, tuple(Exchange(message, answer) for message, answer in pairs))


def payload(named: Sequence[tuple[str, Conversation]]) -> dict[str, Any]:
    """Conversations as JSON values, without the schema number.

    Args:
        named: the name of each model, and what was said to it.
    """
    return {"conversations": [{"model": name, "messages": talk.messages()} for name, talk in named]}


def save_conversations(path: Path, named: Sequence[tuple[str, Conversation]]) -> None:
    """Write conversations to a JSON file, whole or not at all.

    Args:
        path: the file; only a saved conversation is replaced.
        named: the name of each model, and what was said to it.

    Raises:
        DslmError: the file holds something else, or cannot be written.
    """
    text = json.dumps({"schema": SCHEMA, **payload(named)}, indent=2, ensure_ascii=False) + "\n"
    try:
        path = path.resolve()  # the file behind a link is replaced, not the link
        if path.exists() and not _is_saved(path):
            raise DslmError(f"{path} exists and is not a saved conversation", "choose another name")
        _write_whole(path, text)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DslmError(f"{path} cannot be written: {why}", "choose another place") from error


def load_conversations(path: Path) -> list[Conversation]:
    """Read the conversations of a saved file, one for each model that answered.

    Raises:
        DslmError: there is no such file, or it is not a saved conversation.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("conversations"), list):
            raise ValueError("it has no list 'conversations'")
        if value.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {value.get('schema')!r}, expected {SCHEMA}")
        found = [Conversation.from_messages(_messages(entry)) for entry in value["conversations"]]
        if not found:
            raise ValueError("it holds no conversation")
    except OSError as error:
        raise DslmError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DslmError(
            f"{path} is not a saved conversation: {error}", "give a file that dslm chat has saved"
        ) from error
    return found


def _is_saved(path: Path) -> bool:
    try:
        return bool(load_conversations(path))
    except DslmError:
        return False


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # it has taken its place, or could not be made at all
            partial.unlink()


def _messages(entry: Any) -> list[Any]:
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list):
        raise ValueError("a conversation has no list 'messages'")
    return messages
