"""``dslm chat`` at a terminal: Ctrl-C, and two columns."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

import calling
import talking
from dslm.chat import Answer, Chatter, load_conversations
from dslm.cli import answers, interrupt
from dslm.cli.answers import Columns, Stream
from talking import Lines, chat_model, talked, texts

call = calling.call  # fixtures
tiny, script = talking.tiny, talking.script


@pytest.fixture
def columns(monkeypatch):
    file = io.StringIO()
    screen = Console(file=file, force_terminal=True, width=80, height=12, color_system=None, markup=False)
    monkeypatch.setattr(answers, "console", lambda: screen)
    return Columns(["tiny", "other"], quiet=False), screen


def test_two_columns_stay_in_full(columns):
    both, screen = columns
    with both.turn():
        both.begin(0)
        both.write("one " * 200 + "\n\n")
        both.end(["stopped"])
        both.begin(1)
        both.write("two")
        both.end([], "it broke")
    drawn = screen.file.getvalue().split("\x1b[2K")[-1]
    lines = [re.sub(r"\x1b\[[^m]*[a-zA-Z]", "", line).rstrip() for line in drawn.splitlines()]
    head = next(index for index, line in enumerate(lines) if re.fullmatch(r"tiny +other", line))
    assert re.fullmatch(r"(one )+ +two", lines[head + 2])
    assert re.fullmatch(r"(one )+ +error: it broke", lines[head + 3])
    assert drawn.count("one") == 200
    assert any(line.startswith("[stopped]") for line in lines)


def test_two_columns_show_the_end_of_what_grows(columns):
    both, screen = columns
    with both.turn():
        both.begin(0)
        both.write("first " + "word " * 200 + "last")
        lines = ["".join(part.text for part in line) for line in screen.render_lines(both._picture())]
        both.end([])
    assert any("last" in line for line in lines)
    assert not any("first" in line for line in lines)
    assert 5 < len(lines) < screen.height


# --- at a terminal -----------------------------------------------------------------------------------------


def forgotten():
    """Whoever reports progress later is not stopped by it."""
    try:
        interrupt.check()
    except KeyboardInterrupt:  # would end all tests
        pytest.fail("Ctrl-C is still remembered")


def test_ctrl_c_stops_an_answer_and_not_the_program(script, tiny, tmp_path, monkeypatch):
    write, path, pieces = Stream.write, tmp_path / "talk.json", []

    def pressed(self, text):
        write(self, text)
        pieces.append(text)
        if len(pieces) == 15:  # the first answer has nine words and the end of the line
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stream, "write", pressed)
    code, out, err = script(tiny, "w5", "w6", f"/save {path}", stdin=Lines, options=("-n", 9))
    assert code == 0
    assert err.count("[stopped]") == 1
    forgotten()
    whole, (found,) = talked(tiny, "w5", "w6", tokens=9), load_conversations(path)
    assert [exchange.message for exchange in found.exchanges] == ["w5", "w6"]
    assert found.exchanges[0] == whole.exchanges[0]
    part = found.exchanges[1].answer
    assert part
    assert whole.exchanges[1].answer.startswith(part)
    assert len(part.split()) < len(whole.exchanges[1].answer.split())
    assert part in out


def _says_nothing(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGINT)
    return Answer("", 1, 0.0, "stopped", 0)


def _hears_nothing(*_arguments, **_options):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    pytest.fail("the second Ctrl-C ends what does not ask")


@pytest.mark.parametrize(
    ("answer", "said"),
    [(_says_nothing, "stopped before it began; this"), (_hears_nothing, "stopped at once; this")],
)
def test_a_message_without_any_answer_is_forgotten(answer, said, script, tiny, monkeypatch):
    monkeypatch.setattr(Chatter, "answer", answer)
    code, out, err = script(tiny, "w6", "w7", stdin=Lines, options=("--json",))
    assert code == 0
    assert err.count(f"[{said} message is forgotten]") == 2
    assert '"messages": []' in out


def test_ctrl_c_at_the_prompt_says_how_to_leave(script, tiny):
    code, out, err = script(tiny, "w5", "^C", "w6", "^C", stdin=Lines)
    assert code == 0
    assert err.count("/quit or Ctrl-D leaves") == 2
    forgotten()
    assert out == "\n\n".join(texts(talked(tiny, "w5", "w6"))) + "\n\n"
    assert "> " in err


def test_a_real_terminal(tmp_path):
    """Keys, signals and screen of a pseudo-terminal."""
    folder = chat_model(tmp_path / "tiny", max_position_embeddings=100_000)
    path = tmp_path / "talk.json"
    command = [sys.executable, "-m", "dslm.cli.main", "chat", str(folder), "-n", "90000", "--seed", "1"]
    keyboard, terminal = os.openpty()
    plain = {**os.environ, "TERM": "dumb"}  # no colours, no marks around what is typed
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=plain) as process:
        os.close(terminal)

        def until(wanted: str, shown: str = "", *, pressing: bool = False) -> str:
            deadline = time.monotonic() + 60
            while not re.search(wanted, shown):
                assert time.monotonic() < deadline, f"no {wanted} in {shown!r}"
                if select.select([keyboard], [], [], 0.5)[0]:
                    shown += os.read(keyboard, 65536).decode()
                elif pressing:
                    process.send_signal(signal.SIGINT)
            return shown

        try:
            until(r"Ctrl-D leaves\s+> ")
            # Pressed until it is heard: a signal between the prompt and the wait for a key is kept for the next one.
            until(r"/quit or Ctrl-D leaves\s+> ", pressing=True)
            os.write(keyboard, b"w5\n")
            until(r"(w\d+ ){20}")
            process.send_signal(signal.SIGINT)
            until(r"\[stopped\]\s+> ")
            os.write(keyboard, f"/save {path}\n".encode())
            until(r"saved 1 exchange in .*\s+> ")
            os.write(keyboard, b"\x04")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(keyboard)
    (found,) = load_conversations(path)
    assert found.exchanges[0].message == "w5"
    assert 20 <= len(found.exchanges[0].answer.split()) < 90_000
