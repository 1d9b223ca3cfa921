"""Blocks of tokens: what is packed where, what is learned, what is held out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

import calling
from dslm.errors import RecipeError
from dslm.texts import Row, read_documents, read_rows
from dslm.train.data import Document, hold_out, pack, read_blocks, read_tokens
from dslm.train.loss import IGNORED
from tokenizing import EOS

model = calling.model  # fixture
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} w12 {% endfor %}"
    "{% if add_generation_prompt %}w11 {% endif %}"
)


@pytest.fixture
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def document(*ids, whole=False):
    return Document(np.array(ids, np.int32), np.ones(len(ids), bool), whole)


def test_text_is_laid_end_to_end_and_cut_at_blocks():
    blocks = pack([document(5, 6, 7), document(8, 9, 10, 11, 12)], 4, filler=0, apart=True)
    assert blocks.ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert blocks.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert blocks.labels.tolist() == [[IGNORED, 6, 7, IGNORED], [IGNORED, 10, 11, 12]]
    assert blocks.learned == 5


def test_a_last_block_of_text_that_is_not_full_is_left_out():
    blocks = pack([document(5, 6, 7, 8, 9)], 4, filler=0, apart=False)
    assert (blocks.ids.tolist(), blocks.positions) == ([[5, 6, 7, 8]], None)
    assert set(blocks[0]) == {"input_ids", "labels"}


def test_conversations_stay_whole():
    pieces = [document(*ids, whole=True) for ids in ([5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15])]
    blocks = pack(pieces, 4, filler=0, apart=True)
    assert blocks.ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13]]
    assert blocks.labels[0].tolist() == [IGNORED, 6, 7, IGNORED]


def test_a_block_in_which_nothing_is_learned_is_left_out():
    """A step of such blocks alone would divide by zero tokens."""
    asked = Document(np.arange(5, 15, dtype=np.int32), np.arange(10) > 6, whole=True)  # its answer is cut off
    answered = document(5, 6, 7, whole=True)
    # Nothing foretells its first token, the only one that would be learned.
    first = Document(np.array([5, 6], np.int32), np.array([True, False]), whole=True)
    blocks = pack([asked, answered, asked, first], 4, filler=0, apart=True)
    assert blocks.ids.tolist() == [[5, 6, 7, 0]]
    assert len(blocks.labels) == len(blocks.positions) == 1


def test_every_token_of_text_is_in_exactly_one_place():
    rng = np.random.default_rng(0)
    ids = np.arange(1, 1001, dtype=np.int32)
    documents = [
        document(*part) for part in np.split(ids, np.sort(rng.choice(np.arange(2, 998), 30, replace=False)))
    ]
    blocks = pack(documents, 16, filler=0, apart=True)
    assert blocks.ids.ravel().tolist() == ids[: 1000 // 16 * 16].tolist()
    starts = {int(part.ids[0]) for part in documents}
    for row, positions in zip(blocks.ids, blocks.positions, strict=True):
        begins = [i == 0 or int(t) in starts for i, t in enumerate(row)]
        assert [p == 0 for p in positions] == begins


def test_a_text_ends_with_the_end_token(tokenizer):
    (found,) = read_tokens(tokenizer, [Row("w5 w6")], "tiny")
    assert found.ids.tolist() == [5, 6, EOS]


def test_of_a_conversation_the_assistant_s_turns_are_learned(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "w20 w21"), ("assistant", "w30"), ("user", "w22"), ("assistant", "w31 w32")]
    row = Row("", tuple({"role": role, "content": content} for role, content in turns))
    (found,) = read_tokens(tokenizer, [row], "tiny")
    assert found.ids.tolist() == [10, 20, 21, 12, 11, 30, 12, 10, 22, 12, 11, 31, 32, 12]
    assert found.ids[found.learned].tolist() == [30, 12, 31, 32, 12]
    assert found.whole


THINKS = (  # only behind the last question, as Qwen3's does
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}"
    "{{ 'w13 w14 ' if m.role == 'assistant' and loop.index > last.user else '' }}{{ m.content }} w12 {% endfor %}"
    "{% if add_generation_prompt %}w11 {% endif %}"
)
REMINDS = (  # of the system's text only in a question that is the last turn, as Mistral's does
    "{% set system, turns = messages[0].content, messages[1:] %}"
    "w9 {% for m in turns %}{% if m.role == 'user' %}w10 {{ system ~ ' ' if loop.last else '' }}{{ m.content }} w11"
    "{% else %} {{ m.content }} w12 {% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "system", "expected"),
    [
        (THINKS, (), [
            ([10, 20, 12, 11, 13, 14, 30, 12], [13, 14, 30, 12]),
            ([10, 20, 12, 11, 30, 12, 10, 22, 12, 11, 13, 14, 31, 32, 12], [13, 14, 31, 32, 12]),
        ]),
        (REMINDS, ("system",), [
            ([9, 10, 40, 20, 11, 30, 12], [30, 12]),
            ([9, 10, 20, 11, 30, 12, 10, 40, 22, 11, 31, 32, 12], [31, 32, 12]),
        ]),
    ],
    ids=["thoughts", "system"],
)  # fmt: skip
def test_where_a_template_writes_earlier_turns_otherwise_each_answer_is_learned_by_itself(
    tokenizer, template, system, expected
):
    tokenizer.chat_template = template
    turns = [
        ("user", "w20"),
        ("assistant", "w30"),
        ("user", "w22"),
        ("assistant", "w31 w32"),
        ("user", "w23"),
    ]
    turns = [(role, "w40") for role in system] + turns
    row = Row("", tuple({"role": role, "content": content} for role, content in turns))
    found = read_tokens(tokenizer, [row], "tiny")
    assert [(one.ids.tolist(), one.ids[one.learned].tolist()) for one in found] == expected
    assert all(one.whole for one in found)


@pytest.mark.parametrize(
    ("answer", "learned"), [("w12", [12, 12]), ("", [12])], ids=["as the end", "nothing"]
)
def test_where_an_answer_begins_does_not_depend_on_what_it_says(tokenizer, answer, learned):
    tokenizer.chat_template = REMINDS
    turns = [("system", "w40"), ("user", "w20"), ("assistant", answer)]
    (found,) = read_tokens(tokenizer, [Row("", tuple({"role": r, "content": c} for r, c in turns))], "tiny")
    assert found.ids.tolist() == [9, 10, 40, 20, 11, *learned]
    assert found.ids[found.learned].tolist() == learned


def test_all_of_a_conversation_is_on_one_side(tokenizer):
    tokenizer.chat_template = THINKS
    rows = [
        Row("", tuple({"role": r, "content": f"w{40 + n}"} for r in ("user", "assistant") * 3))
        for n in range(20)
    ]
    found = read_tokens(tokenizer, rows, "tiny")
    assert len(found) == 60
    sides = [{max(one.ids.tolist()) for one in side} for side in hold_out(found, 0.2, seed=0)]
    assert len(sides[1]) >= 4
    assert not sides[0] & sides[1]


def test_a_turn_whose_first_one_was_too_short_to_learn_is_not_of_the_text_before_it():
    text, turn = document(5, 6, 7, 8), replace(document(9, 10, whole=True), joined=True)
    train, held_out = hold_out([text, turn], 0.5, seed=0)
    assert sorted(i for one in (*train, *held_out) for i in one.ids.tolist()) == [5, 6, 7, 8, 9, 10]


def test_an_answer_that_a_template_hides_is_refused(tokenizer):
    tokenizer.chat_template = REMINDS.replace("{% else %} {{ m.content }} w12", "{% else %} w30 w12")
    row = Row(
        "", tuple({"role": r, "content": f"w{i + 40}"} for i, r in enumerate(("system", "user", "assistant")))
    )
    with pytest.raises(RecipeError, match="does not write what the assistant says"):
        read_tokens(tokenizer, [row], "tiny")


def test_a_refused_conversation_is_named(tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = Row(
        "", ({"role": "system", "content": "w5"}, {"role": "user", "content": "w5"}), "line 3 of d.jsonl"
    )
    with pytest.raises(RecipeError, match=r"refuses line 3 of d\.jsonl: no system"):
        read_tokens(tokenizer, [row], "tiny")


def test_a_turn_in_parts_is_read_and_one_that_is_no_text_is_refused(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE
    parts = [{"type": "text", "text": "w20 "}, {"type": "text", "text": "w21"}]
    said = {"role": "assistant", "content": "w30"}
    rows = [[{"role": "user", "content": parts}, said]]
    rows += [[{"role": "user", "content": "w5"}, turn, said] for turn in (
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "image"}]},
    )]  # fmt: skip
    rows.append([{"role": "assistant", "content": None, "tool_calls": []}])
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    found, _ = read_rows(str(path), 10**6)
    (first,) = read_tokens(tokenizer, found[:1], "tiny")
    assert first.ids.tolist() == [10, 20, 21, 12, 11, 30, 12]
    assert [row.text for row in found] == ["w20 w21\n\nw30", "w5\n\nw30", "w5\n\nw30", ""]
    assert read_documents(str(path), 10**6)[0] == ["w20 w21\n\nw30", "w5\n\nw30"]
    for row, number in zip(found[1:], (2, 3, 4), strict=True):
        with pytest.raises(RecipeError, match=f"line {number} of .*d.jsonl has a turn that is not text"):
            read_tokens(tokenizer, [row], "tiny")


def test_conversations_need_a_template(tokenizer):
    with pytest.raises(RecipeError, match="has conversations, and tiny has no chat template"):
        read_tokens(tokenizer, [Row("", ({"role": "user", "content": "w5"},))], "tiny")


@pytest.mark.parametrize("sizes", [[1000], [10] * 100, [400, 3, 500, 97]])
def test_a_share_of_the_tokens_is_held_out_and_nothing_is_lost(sizes):
    ids = iter(range(1000))
    documents = [document(*(next(ids) for _ in range(size))) for size in sizes]
    kept, held = hold_out(documents, 0.1, seed=3)
    assert sum(map(len, held)) == 100
    assert sorted(i for part in kept + held for i in part.ids.tolist()) == list(range(1000))


def test_the_seed_decides_what_is_held_out():
    documents = [document(i, i) for i in range(100)]
    drawn = [[d.ids[0] for d in hold_out(documents, 0.1, seed=seed)[1]] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_little_text_for_a_block():
    with pytest.raises(RecipeError, match="d has 3 tokens to train on, fewer than a block of 4"):
        read_blocks(([document(1, 2, 3)], []), 4, filler=0, apart=True, what=("d", None))
    short = [document(1, 2, 3, 4)], [document(1)]
    with pytest.raises(RecipeError, match=r"d has 1 tokens to evaluate on.*or a larger --held-out"):
        read_blocks(short, 4, filler=0, apart=True, what=("d", None))
    with pytest.raises(RecipeError, match=r"e has 1 tokens to evaluate on.*a smaller --block-size$"):
        read_blocks(short, 4, filler=0, apart=True, what=("d", "e"))


@pytest.mark.parametrize(("count", "whole"), [(9, False), (9, True), (3, True)])
def test_text_of_which_nothing_is_to_be_learned(count, whole):
    silent = Document(np.arange(count, dtype=np.int32), np.zeros(count, bool), whole)
    said = f"no block of 4 has anything to learn in {count} tokens to train on of d"
    with pytest.raises(RecipeError, match=said):
        read_blocks(([silent], [document(1, 2, 3, 4)]), 4, filler=0, apart=True, what=("d", None))


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("third")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "a.png").write_bytes(b"\x89\0")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}\n')
    (tmp_path / "list.json").write_text('[{"text": "in a list"}]\n')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}\n')
    (tmp_path / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": null}]}\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (tmp_path / "rows.json").write_text('{"text": "fourth"}\n')
    rows, what = read_rows(str(tmp_path), 100)
    assert [row.text for row in rows] == ["first", "second", "third", "fourth", ""]
    assert read_documents(str(tmp_path), 100)[0] == ["first", "second", "third", "fourth"]
    assert what == f"the folder {tmp_path}"
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    with pytest.raises(RecipeError, match=r"line 1 of .*broken\.jsonl is not JSON"):
        read_rows(str(tmp_path), 100)
