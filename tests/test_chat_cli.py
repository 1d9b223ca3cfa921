"""``dslm chat``: scripts from a pipe, a person at a terminal, and two models side by side."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import calling
import talking
from calling import one_line
from dslm.chat import Chatter, load_conversations, save_conversations
from dslm.cli.answers import Stream
from talking import IGNORING, chat_model, talked, texts

call = calling.call  # fixtures
tiny, script = talking.tiny, talking.script


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model, whose template leaves a system text out."""
    return chat_model(tmp_path_factory.mktemp("chat") / "other", IGNORING, seed=1)


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom dslm.cli.main import run\nrun(['chat', '--help'])\n"
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# --- from a pipe -------------------------------------------------------------------------------------------


def test_each_line_is_a_message(script, tiny):
    code, out, err = script(tiny, "w5 w6", "", "w7", options=("-q",))
    expected = talked(tiny, "w5 w6", "w7")
    assert (code, out, err) == (0, "\n\n".join(texts(expected)) + "\n", "")
    assert all(texts(expected))


def test_json_holds_all_that_was_said_and_nothing_else_is_printed(script, tiny, tmp_path):
    code, out, err = script(tiny, "/system w9", "w5", "//w7", "/quit", "w8", options=("--json",))
    expected = talked(tiny, "w5", "/w7", system="w9")
    found = json.loads(out)
    assert code == 0
    assert found == {"schema": 1, "conversations": [{"model": "tiny", "messages": expected.messages()}]}
    assert "system text: w9" in err
    (tmp_path / "talk.json").write_text(out)
    assert load_conversations(tmp_path / "talk.json") == [expected]


def test_a_model_without_a_template_says_so_once(script, tmp_path):
    folder = chat_model(tmp_path / "plain", None)
    code, out, err = script(folder, "w5", "w6")
    assert code == 0
    assert err.count("plain has no chat template: each message is the next line of one text") == 1
    assert out == "\n\n".join(texts(talked(folder, "w5", "w6"))) + "\n"


COMMANDS = {
    # lines, what stderr says at the end, whether all of them could be done
    "reset": (["w5", "/reset"], "a new conversation", True),
    "reset with system": (["/system w9", "w5", "/reset"], "a new conversation, the same system text", True),
    "no system": (["/system"], "no system text", True),
    "system": (["/system w9 w8", "/system"], "system text: w9 w8", True),
    "system off": (["/system w9", "/system off"], "no system text", True),
    "params": (["/params"], "n=4 temperature=0.0 top_k=40 top_p=0.9 seed=", True),
    "set params": (["/params seed=7 n=3 top_k=0"], "n=3 temperature=0.0 top_k=0 top_p=0.9 seed=7", True),
    "unknown param": (["/params heat=2"], "'heat=2' is not NAME=VALUE with a NAME among n, temperature", False),
    "half a param": (["/params top_k="], "'top_k=' is not NAME=VALUE", False),
    "illegal param": (["/params n=3 top_p=2"], "top_p: 2.0 is not in the range 0<x<=1", False),
    "no number": (["/params temperature=nan"], "temperature: nan is not a finite number", False),
    "not set by half": (["/params n=3 top_p=2", "/params"], "n=4 temperature", False),
    "help": (["/help"], "//TEXT                    a message that begins with /", True),
    "near": (["/sytem w9"], "there is no command /sytem; did you mean /system?", False),
    "unknown": (["/"], "there is no command /; /help lists them", False),
    "save nowhere": (["/save"], "/save needs the name of a file", False),
    "load nothing": (["/load gone.json"], "gone.json cannot be read: No such file", False),
    "too long": (["w5 " * 70], "have 73 tokens, the model's context 64; shorten them", False),
    "cut": (["w5"], "[cut after 4 tokens]", True),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "said", "done"), COMMANDS.values(), ids=COMMANDS)
def test_commands(lines, said, done, script, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = script(tiny, *lines, "w6", options=("--json",))
    before = err.splitlines()[:-1] if lines != ["w5"] else err.splitlines()
    assert said in (before[-1] if before else "")
    assert code == (0 if done else 1)
    assert json.loads(out)["conversations"][0]["messages"][-2]["content"] == "w6", "it went on"
    assert "Traceback" not in err


def test_what_is_saved_can_be_gone_on_with(script, tiny, tmp_path):
    path = tmp_path / "my talk.json"
    assert script(tiny, "/system w9", "w5", f"/save {path}", options=("-q",))[0] == 0
    saved = talked(tiny, "w5", system="w9")
    assert load_conversations(path) == [saved]
    (tmp_path / "broken.json").write_text("{")
    lines = ["w8", f"/load {path}", f"/load {tmp_path}/broken.json", f"/save {tmp_path}/broken.json", "w6"]
    code, out, err = script(tiny, *lines, options=("--json",))
    assert code == 1
    assert json.loads(out)["conversations"][0]["messages"] == talked(tiny, "w5", "w6", system="w9").messages()
    assert f"loaded 1 exchange from {path}" in err
    assert err.count("broken.json") == 2
    assert (tmp_path / "broken.json").read_text() == "{"


def test_a_seed_repeats_a_conversation_and_each_answer_has_its_own(script, tiny):
    lines = ["w5", "/reset", "w5", "/reset", "/params seed=3", "w5"]
    hot = ("--temperature", 5, "--top-k", 0, "--top-p", 1, "-n", 12, "-q")
    runs = [script(tiny, *lines, options=(*hot, "--seed", seed))[1].split("\n\n") for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] == runs[0][2].rstrip("\n") != runs[0][1]


def test_what_the_context_no_longer_holds_is_told(script, tiny):
    code, _, err = script(tiny, *["w5 w6 w7 w8 w9 w10 w11 w12"] * 7)
    assert code == 0
    assert "it no longer sees the first 1 exchange]" in err
    assert "it no longer sees the first 2 exchanges]" in err


def test_a_system_text_that_cannot_be_given_is_refused_at_once(script, other):
    code, out, err = script(other, "w5", options=("--system", "w9", "-q"))
    assert (code, out) == (1, "")
    assert "the chat template of other takes no system text; say it" in one_line(err)
    code, _, err = script(other, "/system w9", "w5", options=("-q",))
    assert code == 1
    assert "takes no system text" in one_line(err)


def test_an_unexpected_failure_is_one_line_and_the_talk_goes_on(script, tiny, monkeypatch):
    answer = Chatter.answer

    def fails(self, talk, message, **options):
        if message == "w6":
            raise RuntimeError("out of\nmemory")
        return answer(self, talk, message, **options)

    monkeypatch.setattr(Chatter, "answer", fails)
    code, out, err = script(tiny, "w5", "w6", "w7", options=("-q",))
    assert code == 1
    assert "dslm: error: unexpected RuntimeError: out of memory; set DSLM_DEBUG=1" in one_line(err)
    assert out.split("\n\n")[-1] == texts(talked(tiny, "w5", "w7"))[-1] + "\n"


def test_ctrl_c_ends_a_script(script, tiny, monkeypatch):
    write, pieces = Stream.write, []

    def pressed(self, text):
        write(self, text)
        pieces.append(text)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stream, "write", pressed)
    code, _, err = script(tiny, "w5", "w6", options=("-q",))
    assert code == 130
    assert len(pieces) == 2
    assert "interrupted" in one_line(err.lstrip("\n"))


# --- two models --------------------------------------------------------------------------------------------


def test_two_models_answer_the_same_messages(script, tiny, other):
    code, out, err = script(tiny, "w5", "w6", options=("--against", other, "-q"))
    a, b = texts(talked(tiny, "w5", "w6")), texts(talked(other, "w5", "w6"))
    assert (code, err) == (0, "")
    assert out == "\n".join(f"== {name} ==\n{text}\n" for pair in zip(a, b, strict=True)
                            for name, text in zip(("tiny", "other"), pair, strict=True))  # fmt: skip
    assert a != b


def test_two_models_are_saved_and_loaded_together(script, tiny, other, tmp_path):
    path, single = tmp_path / "both.json", tmp_path / "one.json"
    assert script(tiny, "w5", f"/save {path}", options=("--against", other, "-q"))[0] == 0
    both = [talked(tiny, "w5"), talked(other, "w5")]
    assert load_conversations(path) == both
    save_conversations(single, [("tiny", both[0])])
    for file, expected in ((path, both), (single, [both[0]] * 2)):
        out = script(tiny, f"/load {file}", options=("--against", other, "--json", "-q"))[1]
        assert [each["messages"] for each in json.loads(out)["conversations"]] == [
            t.messages() for t in expected
        ]
    out = script(tiny, f"/load {path}", options=("--json", "-q"))[1]
    assert [each["messages"] for each in json.loads(out)["conversations"]] == [both[0].messages()]


def test_both_draw_from_the_same_seed_and_have_names(script, tiny):
    hot = ("--temperature", 5, "--top-k", 0, "--top-p", 1, "-n", 12, "--seed", 3, "--json", "-q")
    found = json.loads(script(tiny, "w5", options=(*hot, "--against", f"{tiny}/"))[1])["conversations"]
    assert found[0]["messages"] == found[1]["messages"]
    assert [each["model"] for each in found] == [str(tiny), f"{tiny}/"], (
        "one name for both would tell nothing"
    )


def test_one_model_fails_and_the_other_answers(script, tiny, other):
    code, out, err = script(tiny, "/system w9", "w5", options=("--against", other))
    assert code == 1, "other takes no system text, so neither is given one"
    assert "the chat template of other takes no system text" in err
    message = " ".join(["w5"] * 58)
    code, out, err = script(
        tiny, message, options=("--against", chat_model(other.parent / "plain", None), "-q")
    )
    assert code == 0
    message = " ".join(["w5"] * 61)
    code, out, err = script(tiny, message, options=("--against", other.parent / "plain", "-q"))
    assert code == 1
    assert "have 64 tokens" in one_line(err)
    assert re.fullmatch(r"== tiny ==\n\n== plain ==\n.+\n", out)
