"""Conversations: what the model is given, what is kept, and what a file holds."""

from __future__ import annotations

import json
import os

import pytest

import pico
from dslm.chat import Chatter, Conversation, load_conversations, save_conversations
from dslm.errors import DslmError
from dslm.sampler import Loaded, write
from talking import (
    END_ID,
    GREEDY,
    IGNORING,
    MODEL,
    REFUSING,
    SYSTEM,
    TURN_END,
    USER,
    add_template,
    chat_model,
    ids,
    loaded,
    spied,
)
from tokenizing import EOS

TALK = Conversation("w7 w8").with_exchange("w10", "w20 w21").with_exchange("w11", "w22")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Loaded:
    return loaded(chat_model(tmp_path_factory.mktemp("chat") / "tiny"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Loaded:
    return loaded(chat_model(tmp_path_factory.mktemp("chat") / "plain", None))


# --- what the model is given -------------------------------------------------------------------------------

PROMPTS = {
    "a message": (Conversation(), [USER, "w5", TURN_END, MODEL]),
    "a system text": (Conversation("w7"), [SYSTEM, "w7", TURN_END, USER, "w5", TURN_END, MODEL]),
    "a history": (
        TALK,
        ["w90 w7 w8 w93 w91 w10 w93 w92 w20 w21 w93 w91 w11 w93 w92 w22 w93 w91 w5 w93 w92"],
    ),
}


@pytest.mark.parametrize(("talk", "words"), PROMPTS.values(), ids=PROMPTS)
def test_the_model_is_given_what_the_template_writes(talk, words, tiny, monkeypatch):
    chatter = Chatter(tiny)
    seen = spied(chatter, monkeypatch)
    chatter.answer(talk, "w5", tokens=2, sampling=GREEDY)
    messages = [*talk.messages(), {"role": "user", "content": "w5"}]
    by_hand = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert seen[0]["ids"] == ids(*words) == by_hand["input_ids"]


def test_without_a_template_the_text_goes_on(plain, monkeypatch):
    chatter = Chatter(plain)
    seen = spied(chatter, monkeypatch)
    chatter.check_system("anything")
    first = chatter.answer(Conversation("w7 w8"), "w10", tokens=3, sampling=GREEDY)
    assert seen[0]["ids"] == ids("w7 w8 w10")
    talk = Conversation("w7 w8").with_exchange("w10", first.text)
    chatter.answer(talk, "w5 w6", tokens=2, sampling=GREEDY)
    assert seen[1]["ids"] == ids("w7 w8 w10", first.text, "w5 w6")
    assert not chatter.has_template


def test_the_token_that_ends_a_turn_ends_an_answer(tiny, plain, monkeypatch):
    for model, ends in ((tiny, {EOS, END_ID}), (plain, {EOS})):
        chatter = Chatter(model)
        seen = spied(chatter, monkeypatch)
        whole = chatter.answer(Conversation(), "w5", tokens=3, sampling=GREEDY)
        assert set(seen[0]["ends"]) == ends
        monkeypatch.setattr(chatter, "_stops", frozenset(ids(whole.text)[2:]))
        answer = chatter.answer(Conversation(), "w5", tokens=9, sampling=GREEDY)
        assert (whole.ending, answer.ending, answer.tokens) == ("length", "end", 3)
        assert ids(answer.text) == ids(whole.text)[:2]


NO_SYSTEM = {"refuses": REFUSING, "leaves out": IGNORING, "fails": "{{ messages[0].nothing.at_all }}"}


@pytest.mark.parametrize("template", NO_SYSTEM.values(), ids=NO_SYSTEM)
def test_a_template_that_takes_no_system_text_says_so(template, tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    chatter = Chatter(tiny)
    assert template == NO_SYSTEM["fails"] or chatter.check_system("") is None
    with pytest.raises(DslmError, match=r"chat template of tiny (takes no system text|fails)"):
        chatter.check_system("w7")


def test_a_template_that_fails_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{{ raise_exception('only on Sundays') }}")
    with pytest.raises(DslmError, match="the chat template of tiny fails: only on Sundays"):
        Chatter(tiny).answer(Conversation(), "w5")


# --- the context -------------------------------------------------------------------------------------------


def long_talk(exchanges: int) -> Conversation:
    """Exchanges of eight tokens each, after a system text of three."""
    talk = Conversation("w7")
    for index in range(exchanges):
        talk = talk.with_exchange(f"w{10 + index} w3", "w20 w21")
    return talk


# the context has 64 tokens; the new message takes 4 with the words around it
@pytest.mark.parametrize(
    ("exchanges", "tokens", "left_out", "written"),
    [
        (7, 1, 0, 1),
        (8, 1, 1, 1),
        (4, 20, 0, 20),
        (5, 20, 1, 20),
        (20, 20, 16, 20),
        (3, 500, 0, 33),
        (4, 500, 1, 33),
    ],
)
def test_what_the_context_cannot_hold_is_left_out_oldest_first(
    exchanges, tokens, left_out, written, tiny, monkeypatch
):
    chatter, talk = Chatter(tiny), long_talk(exchanges)
    seen = spied(chatter, monkeypatch)
    answer = chatter.answer(talk, "w5", tokens=tokens, sampling=GREEDY)
    kept = talk.exchanges[left_out:]
    assert answer.left_out == left_out
    assert seen[0]["ids"] == chatter.prompt_ids(Conversation("w7", kept), "w5")
    assert seen[0]["ids"][:3] == ids(SYSTEM, "w7", TURN_END)
    assert answer.tokens <= written
    assert len(seen[0]["ids"]) + answer.tokens <= pico.POSITIONS


def test_a_message_alone_may_be_longer_than_the_answer_leaves_room(tiny):
    answer = Chatter(tiny).answer(long_talk(3), " ".join(["w5"] * 50), tokens=500, sampling=GREEDY)
    assert answer.left_out == 3
    assert answer.tokens <= pico.POSITIONS - 50
    with pytest.raises(DslmError, match="message and system text have 66 tokens, the model's context 64"):
        Chatter(tiny).answer(long_talk(3), " ".join(["w5"] * 60))


# --- going on from the last answer -------------------------------------------------------------------------

CACHES = [
    ("llama", "gqa-tied"), ("mistral", "window"), ("gemma2", "windows-softcaps"), ("gemma3_text", "all-sliding"),
    ("gpt_neox", "parallel"), ("opt", "post-norm"), ("phi", "qk-layernorm"), ("phi3", "longrope"), ("phi3", "window"),
    ("qwen3", "windows-yarn"), ("smollm3", "windows-untied"), ("olmo2", "mha"),
]  # fmt: skip


@pytest.mark.parametrize("case", CACHES, ids="-".join)
def test_going_on_from_a_cache_writes_what_reading_again_writes(case, tmp_path):
    model = loaded(add_template(pico.save(pico.make_model(*case), tmp_path / "m"), None))
    first = write(model, ids("w5 w6 w7"), 20, GREEDY)
    further = first.ids + ids("w8 w9 w10")
    assert first.cache.get_seq_length() == len(first.ids) - 1
    again = write(model, further, 20, GREEDY)
    assert write(model, further, 20, GREEDY, cache=first.cache).ids == again.ids
    assert again.tokens > 5


def test_a_conversation_is_not_read_again_unless_it_is_another(tiny, monkeypatch):
    chatter = Chatter(tiny)
    seen = spied(chatter, monkeypatch)
    first = chatter.answer(Conversation(), "w5", tokens=6, sampling=GREEDY)
    talk = Conversation().with_exchange("w5", first.text)
    second = chatter.answer(talk, "w6", tokens=6, sampling=GREEDY)
    assert second.text == Chatter(tiny).answer(talk, "w6", tokens=6, sampling=GREEDY).text
    chatter.answer(talk, "w8", tokens=6, sampling=GREEDY)  # the second message was taken back
    assert [each["cached"] for each in seen] == [False, True, False, False]


# --- the answer --------------------------------------------------------------------------------------------


def test_an_answer_comes_in_pieces(tiny, plain):
    for model in (tiny, plain):
        pieces: list[str] = []
        answer = Chatter(model).answer(
            Conversation("w9"), "w5", tokens=8, sampling=GREEDY, on_text=pieces.append
        )
        assert "".join(pieces) == answer.text
        assert len(pieces) > 2


def test_an_answer_stops_when_it_is_asked_to(tiny):
    whole = Chatter(tiny).answer(Conversation(), "w5", tokens=9, sampling=GREEDY)
    pieces: list[str] = []
    answer = Chatter(tiny).answer(
        Conversation(), "w5", tokens=9, sampling=GREEDY, on_text=pieces.append, stop=lambda: len(pieces) >= 3
    )
    assert (whole.ending, answer.ending) == ("length", "stopped")
    assert 0 < answer.tokens < whole.tokens
    assert whole.text.startswith(answer.text)
    assert answer.text == "".join(pieces)


def test_a_token_that_ends_a_turn_is_no_part_of_the_answer(tiny):
    """Not even where the tokenizer does not count it among its special tokens."""
    prompt, pieces = ids("w5 w6"), []
    whole = write(tiny, prompt, 3, GREEDY)
    *before, last = whole.text.split()
    assert last not in before
    stopped = write(tiny, prompt, 9, GREEDY, stops=ids(last), on_text=pieces.append)
    assert stopped.ids == whole.ids
    assert stopped.text.split() == "".join(pieces).split() == before


# --- the file ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    path, other = tmp_path / "talk.json", Conversation().with_exchange('é\n"', "")
    save_conversations(path, [("tiny", TALK), ("big", other)])
    assert load_conversations(path) == [TALK, other]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["schema"], [each["model"] for each in found["conversations"]]) == (1, ["tiny", "big"])
    assert found["conversations"][0]["messages"] == TALK.messages()
    save_conversations(path, [("tiny", other)])  # a saved conversation may be replaced
    assert load_conversations(path) == [other]
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]


def _file(*messages: tuple[str, object]) -> str:
    said = [{"role": role, "content": content} for role, content in messages]
    return json.dumps({"schema": 1, "conversations": [{"model": "m", "messages": said}]})


BROKEN = {
    "no JSON": ("{", "is not a saved conversation"),
    "deep": ("[" * 100_000, "is not a saved conversation"),
    "a list": ("[]", "it has no list 'conversations'"),
    "another object": ('{"schema": 1}', "it has no list 'conversations'"),
    "another schema": ('{"schema": 2, "conversations": []}', "its schema is 2, expected 1"),
    "nothing": ('{"schema": 1, "conversations": []}', "it holds no conversation"),
    "no messages": ('{"schema": 1, "conversations": [{}]}', "no list 'messages'"),
    "no object": ('{"schema": 1, "conversations": [7]}', "no list 'messages'"),
    "a number said": (_file(("user", 7), ("assistant", "a")), "no text under 'content'"),
    "no answer": (_file(("user", "a")), "in turns, with an answer at the end"),
    "no message": (_file(("assistant", "a"), ("user", "b")), "in turns"),
    "a tool": (_file(("user", "a"), ("tool", "b")), "in turns"),
    "late system text": (_file(("user", "a"), ("assistant", "b"), ("system", "c")), "in turns"),
}


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_and_is_not_replaced(text, said, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(DslmError, match=said):
        load_conversations(path)
    with pytest.raises(DslmError, match="exists and is not a saved conversation"):
        save_conversations(path, [("tiny", TALK)])
    assert path.read_text() == text


@pytest.mark.parametrize("place", ["gone/talk.json", "file/talk.json", "x" * 300, "."])
def test_a_place_that_cannot_be_written_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DslmError, match=r"cannot be written|is not a saved conversation"):
        save_conversations(tmp_path / place, [("tiny", TALK)])
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    with pytest.raises(DslmError, match="cannot be read"):
        load_conversations(tmp_path / place)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path, link = tmp_path / "talk.json", tmp_path / "link.json"
    save_conversations(path, [("tiny", TALK)])
    link.symlink_to(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DslmError, match="cannot be written: No space left"):
            save_conversations(path, [("tiny", Conversation())])
    assert load_conversations(path) == [TALK]
    (tmp_path / "copy.json").hardlink_to(path)
    save_conversations(link, [("tiny", Conversation("w5"))])
    assert link.is_symlink()
    assert load_conversations(path) == [Conversation("w5")]
    assert load_conversations(tmp_path / "copy.json") == [TALK], (
        "a new file takes the place, the old is not written"
    )
    assert {each.name for each in tmp_path.iterdir()} == {"talk.json", "link.json", "copy.json"}
