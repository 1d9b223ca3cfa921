"""One conversation at the command line: each line is a message, or a command that begins with ``/``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from dslm.chat import Answer, Chatter, Conversation, load_conversations, save_conversations
from dslm.cli import interrupt
from dslm.cli.answers import Screen
from dslm.cli.sampling import NUMBERS
from dslm.errors import DslmError
from dslm.places import expanded
from dslm.sampler import Sampling

log = logging.getLogger(__name__)

_NO_SYSTEM = "off"
_HELP = {
    "/reset": "forget what was said; the system text stays",
    "/system [TEXT]": f"show or set the text that tells the model how to answer; {_NO_SYSTEM}: none",
    "/save FILE": "write the conversation to a JSON file",
    "/load FILE": "go on with a saved conversation",
    "/params [NAME=VALUE ...]": f"show or set how text is drawn: {', '.join(NUMBERS)}",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
    "//TEXT": "a message that begins with /",
}


@dataclass(slots=True)
class Session:
    """A person, or a script, and the models that answer.

    Attributes:
        chatters: one model, or two that answer the same messages.
        names: what to call each.
        screen: where answers appear.
        params: the values of `NUMBERS`.
        talks: what was said to each model.
        interactive: whether a person types; Ctrl-C then stops an answer and nothing else.
        failed: whether a line could not be done.
    """

    chatters: list[Chatter]
    names: list[str]
    screen: Screen
    params: dict[str, Any]
    talks: list[Conversation]
    interactive: bool
    failed: bool = False
    _turns: int = 0
    _left_out: list[int] = field(default_factory=lambda: [0, 0])

    def take(self, line: str) -> bool:
        """Do one line; whatever goes wrong is one line on stderr, and the conversation stays as it was.

        Returns:
            False if it was the last.
        """
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._command(line)
            message = line[1:] if line.startswith("//") else line
            if message.strip():
                self._answer(message)
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001  (nothing that one line does may end the conversation)
            click.echo(f"dslm: error: {self._failure(error)}", err=True)
        return True

    def _failure(self, error: Exception) -> str:
        """Remember that something failed, and say what in one line."""
        self.failed = True
        log.debug("a line failed", exc_info=error)
        text = " ".join(str(error).split())
        if isinstance(error, DslmError | click.ClickException):
            return text
        return f"unexpected {type(error).__name__}: {text}; set DSLM_DEBUG=1 for the traceback"

    def _answer(self, message: str) -> None:
        # Each answer has a seed of its own, the same for both models: a repeated question gets another answer.
        drawing = {name: value for name, value in self.params.items() if name not in ("n", "seed")}
        sampling = Sampling(**drawing, seed=self.params["seed"] + self._turns)
        self._turns += 1
        with self.screen.turn():
            for index in range(len(self.chatters)):
                self.screen.begin(index)
                self.screen.end(*self._answer_of(index, message, sampling))

    def _answer_of(self, index: int, message: str, sampling: Sampling) -> tuple[list[str], str]:
        """Let one model answer; returns remarks and an error."""
        held: AbstractContextManager[Callable[[], bool] | None]
        held = interrupt.held() if self.interactive else nullcontext()
        try:
            with held as pressed:
                answer = self.chatters[index].answer(
                    self.talks[index],
                    message,
                    tokens=self.params["n"],
                    sampling=sampling,
                    on_text=self.screen.write,
                    stop=pressed,
                )
                if answer.text or answer.ending != "stopped":
                    self.talks[index] = self.talks[index].with_exchange(message, answer.text)
            return self._notes(index, answer), ""
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            return ["stopped at once; this message is forgotten"], ""
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001  (the other model still answers)
            return [], self._failure(error)

    def _notes(self, index: int, answer: Answer) -> list[str]:
        notes = {
            "end": [] if answer.text.strip() else ["an empty answer"],
            "length": [f"cut after {answer.tokens} tokens"],
            "stopped": ["stopped"] if answer.text else ["stopped before it began; this message is forgotten"],
        }[answer.ending]
        if answer.left_out > self._left_out[index]:
            notes = [*notes, f"its context is full: it no longer sees the first {_count(answer.left_out)}"]
        self._left_out[index] = answer.left_out
        return notes

    def _command(self, line: str) -> bool:
        name, *rest = line[1:].split(maxsplit=1) or [""]
        commands: dict[str, Callable[[str], str]] = {
            "reset": self._reset,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "params": self._params,
            "help": lambda _: "\n".join(f"{usage:<26}{text}" for usage, text in _HELP.items()),
            "quit": lambda _: "",
        }
        if name not in commands:
            near = get_close_matches(name, commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them; //TEXT sends a message with /"
            raise DslmError(f"there is no command /{name}", hint)
        click.echo(commands[name](rest[0].strip() if rest else ""), err=True, nl=name != "quit")
        return name != "quit"

    def _reset(self, _argument: str) -> str:
        self.talks = [Conversation(talk.system) for talk in self.talks]
        return "a new conversation" + (", the same system text" if self.talks[0].system else "")

    def _system(self, text: str) -> str:
        if text:
            system = "" if text == _NO_SYSTEM else text
            for chatter in self.chatters:
                chatter.check_system(system)
            self.talks = [Conversation(system, talk.exchanges) for talk in self.talks]
        return f"system text: {self.talks[0].system}" if self.talks[0].system else "no system text"

    def _save(self, file: str) -> str:
        path = _path(file, "/save")
        save_conversations(path, self.named())
        return f"saved {_count(len(self.talks[0].exchanges))} in {path}"

    def _load(self, file: str) -> str:
        path = _path(file, "/load")
        found = load_conversations(path)
        talks = found[: len(self.chatters)] if len(found) >= len(self.chatters) else found * 2
        for chatter, talk in zip(self.chatters, talks, strict=True):
            chatter.check_system(talk.system)
        self.talks = talks
        return f"loaded {_count(len(talks[0].exchanges))} from {path}"

    def _params(self, text: str) -> str:
        asked = dict(_param(word) for word in text.split())
        if "seed" in asked:
            self._turns = 0
        self.params |= asked
        return " ".join(f"{name}={value}" for name, value in self.params.items())

    def named(self) -> Sequence[tuple[str, Conversation]]:
        """Each model's name, and what was said to it."""
        return list(zip(self.names, self.talks, strict=True))


def _param(word: str) -> tuple[str, Any]:
    """One ``name=value`` of ``/params``.

    Raises:
        DslmError: no such name, or a value that is not legal.
    """
    name, _, value = word.partition("=")
    if name not in NUMBERS or not value:
        names = ", ".join(NUMBERS)
        raise DslmError(f"{word!r} is not NAME=VALUE with a NAME among {names}", "such as temperature=0.5")
    try:
        return name, NUMBERS[name].convert(value, None, None)
    except click.BadParameter as error:
        raise DslmError(f"{name}: {error.message.rstrip('.')}") from error


def _path(file: str, command: str) -> Path:
    if not file:
        raise DslmError(f"{command} needs the name of a file", f"such as {command} talk.json")
    return expanded(file)


def _count(exchanges: int) -> str:
    return "1 exchange" if exchanges == 1 else f"{exchanges} exchanges"
