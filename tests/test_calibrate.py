"""Calibration tokens: packed, split without overlap, the same for the same seed, and every refusal."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch

import calibrating
import pico
from calibrating import SIZES, ids, install_datasets, jsonl, rows, words
from dslm.checkpoint.reader import open_folder
from dslm.errors import CheckpointError, RecipeError
from dslm.shrink import written
from dslm.shrink.calibrate import OPENINGS, calibration, check_windows
from dslm.shrink.written import write
from tokenizing import BOS, EOS

make, plain, bare = calibrating.make, calibrating.plain, calibrating.bare  # fixtures


@pytest.mark.parametrize("count", [600, 6000])
def test_windows_are_runs_of_the_text_from_all_over_it(plain, tmp_path, count):
    text = words(count)
    (tmp_path / "a.txt").write_text(text)
    found = calibration(plain, [str(tmp_path / "a.txt")], **SIZES)
    assert found.train.dtype == found.held_out.dtype == torch.int64
    assert (found.train.shape, found.held_out.shape) == ((14, 32), (2, 32))
    assert found.origin == f"the file {tmp_path / 'a.txt'}"
    joined = " " + " ".join(map(str, ids(text))) + " "
    starts = [
        joined.find(f" {' '.join(map(str, row))} ")
        for row in [*found.train.tolist(), *found.held_out.tolist()]
    ]
    places = sorted(joined[:start].count(" ") for start in starts if start >= 0)
    assert len(places) >= 15  # the last may be packed of two ends
    assert all(b - a >= 32 for a, b in pairwise(places))
    assert places[0] < 0.2 * count
    assert places[-1] > 0.7 * count


def test_every_document_gives_a_window_before_one_gives_two(plain, tmp_path):
    texts = [" ".join([f"w{i}"] * 400) for i in range(3, 33)]  # a token tells its document
    found = calibration(plain, [str(jsonl(tmp_path / "a.jsonl", texts))], **SIZES)
    kept, held = ([row[0] for row in windows.tolist()] for windows in (found.train, found.held_out))
    assert len(set(kept + held)) == 16
    assert (len(kept), len(held)) == (14, 2)


@pytest.mark.parametrize("kind", ["jsonl", "messages", "wikitext", "hub"])
def test_documents_are_held_out_whole(plain, tmp_path, monkeypatch, kind):
    # Word i belongs to document i alone, so that a token tells its document.
    texts = [" ".join([f"w{i}"] * 20) for i in range(3, 93)]
    source = tmp_path / "text.jsonl"
    if kind == "jsonl":
        jsonl(source, texts)
    elif kind == "messages":
        said = [
            {"messages": [{"role": "user", "content": t}, {"content": t}, {"content": None}]} for t in texts
        ]
        source.write_text("\n\n".join(map(json.dumps, said)), encoding="utf-8-sig")
    elif kind == "wikitext":
        source = tmp_path / "text.txt"
        source.write_text("".join(f" = w{i} = \n\n = = w{i} = = \n{t}\n" for i, t in enumerate(texts, 3)))
    else:
        source = "someone/something"
        install_datasets(monkeypatch, [{"text": text} for text in [*texts, " "]])
    found = calibration(plain, [str(source)], **SIZES)
    assert found.train.shape[1] == found.held_out.shape[1] == 32
    assert len(found.held_out) == 2
    assert 11 <= len(found.train) <= 14
    kept, held = ({x for row in rows(w) for x in row} - {0, EOS} for w in (found.train, found.held_out))
    assert kept
    assert held
    assert not kept & held


def test_a_data_set_may_need_the_name_of_a_configuration(plain, monkeypatch):
    install_datasets(monkeypatch, [{"text": words(600)}], configuration="small-v1")
    found = calibration(plain, ["someone/something:small-v1"], **SIZES)
    assert found.origin == "the data set someone/something:small-v1 on the hub"


def test_a_document_that_comes_twice_counts_once(plain, tmp_path):
    texts = [words(20, seed=i) for i in range(30)]
    once = calibration(plain, [str(jsonl(tmp_path / "a.jsonl", texts))], **SIZES)
    twice = calibration(plain, [str(jsonl(tmp_path / "b.jsonl", texts + texts))], **SIZES)
    assert torch.equal(once.train, twice.train)
    assert not rows(once.train) & rows(once.held_out)


def test_several_texts_take_turns_and_give_equal_shares(plain, tmp_path):
    given = str(jsonl(tmp_path / "a.jsonl", [" ".join([f"w{i}"] * 40) for i in range(3, 33)]))
    short = str(jsonl(tmp_path / "b.jsonl", [" ".join([f"w{i}"] * 40) for i in range(33, 38)]))
    sizes = SIZES | {"samples": 17}
    found = calibration(plain, [given, "self", short], **sizes)
    parts = [
        calibration(plain, [text], **sizes | {"samples": n})
        for text, n in [(given, 6), ("self", 6), (short, 5)]
    ]
    first, second, third = (part.train.tolist() for part in parts)
    assert [len(part.train) for part in parts] == [5, 5, 4]
    turns = [one[i] for i in range(4) for one in (first, second, third)]
    assert found.train.tolist() == [*turns, first[4], second[4]]
    assert found.held_out.tolist() == [part.held_out[0].tolist() for part in parts]
    assert found.origin == f"the file {given} and text that the model wrote itself and the file {short}"


def test_few_documents_are_split_by_windows(plain, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [words(300, seed=1), words(300, seed=2)])
    found = calibration(plain, [str(source)], **SIZES)
    assert (len(found.train), len(found.held_out)) == (14, 2)
    assert not rows(found.train) & rows(found.held_out)


@pytest.mark.parametrize("count", [64, 100, 320])
def test_a_short_text_gives_what_there_is(plain, tmp_path, count):
    (tmp_path / "a.txt").write_text(words(count))
    found = calibration(plain, [str(tmp_path / "a.txt")], **SIZES)
    assert len(found.train) + len(found.held_out) == count // 32
    assert len(found.held_out) == 1


def test_long_words_do_not_make_a_long_text_short(make, tmp_path):
    (tmp_path / "a.txt").write_text("".join(word + " " * 100 for word in words(600).split()))
    found = calibration(make(bos=False), [str(tmp_path / "a.txt")], **SIZES)
    assert len(found.train) == 14


def test_the_seed_orders_the_documents(plain, tmp_path):
    source = str(jsonl(tmp_path / "a.jsonl", [words(20, seed=i) for i in range(60)]))
    first, again, other = (calibration(plain, [source], **SIZES | {"seed": seed}) for seed in (0, 0, 1))
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.train, other.train)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_start_and_end_tokens_are_where_the_tokenizer_wants_them(make, tmp_path, bos, eos):
    texts = [words(40, seed=i) for i in range(4)]
    windows = check_windows(make(bos=bos, eos=eos), jsonl(tmp_path / "a.jsonl", texts), length=32, limit=9)
    joined = ids(texts[0])
    for text in texts[1:]:
        joined += [EOS] * eos + ids(text)
    assert (windows[:, 0] == BOS).all() == bos
    assert (windows[:, 1:] != BOS).all()
    body = windows[:, bos:].flatten().tolist()
    assert body == joined[: len(body)]
    assert len(windows) == len(joined) // (32 - bos)


def test_check_windows_stops_at_its_limit_and_at_the_models_positions(plain, tmp_path):
    (tmp_path / "a.txt").write_text(words(600))
    windows = check_windows(plain, tmp_path / "a.txt", length=500, limit=3)
    assert windows.shape == (3, pico.POSITIONS)


@pytest.mark.parametrize("tokenizer", [{}, {"bos": False}, {"bos": True}])
def test_the_model_writes_its_own_text(make, tokenizer, monkeypatch):
    monkeypatch.setattr(written, "read_kept", lambda place: None)
    checkpoint, state = make(**tokenizer), torch.get_rng_state()
    told: list[tuple[str, int, int]] = []
    sizes = {"samples": 20, "length": 24}
    first = calibration(checkpoint, ["self"], **sizes, seed=3, progress=lambda *a: told.append(a))
    again, other = (calibration(checkpoint, ["self"], **sizes, seed=seed) for seed in (3, 4))
    assert (first.train.shape, first.held_out.shape) == ((18, 24), (2, 24))
    assert first.origin == "text that the model wrote itself"
    everything = torch.cat([first.train, first.held_out])
    assert 0 <= everything.min() <= everything.max() < pico.VOCAB
    assert len(rows(everything)) == 20
    assert (everything[::2, 0] == BOS).all()
    assert torch.equal(everything, torch.cat([again.train, again.held_out]))
    assert not torch.equal(first.train, other.train)
    assert torch.equal(state, torch.get_rng_state())
    done = [d for _, d, _ in told]
    assert done == sorted(done)
    assert told[-1] == ("writing calibration text", 480, 480)


def texts_written(checkpoint, monkeypatch, samples, **other):
    """Windows, and how many batches the model wrote for them."""
    batches = []
    with monkeypatch.context() as patch:
        patch.setattr(written, "write", lambda *a: batches.append(1) or write(*a))
        found = calibration(checkpoint, ["self"], **{"samples": samples, "length": 16, "seed": 5} | other)
    return torch.cat([found.train, found.held_out]), len(batches)


def test_what_was_written_is_not_written_again(make, monkeypatch, tmp_path):
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "cache"))
    checkpoint = make()
    some, batches = texts_written(checkpoint, monkeypatch, 32)
    assert batches == 2
    more, batches = texts_written(checkpoint, monkeypatch, 50)
    assert batches == 2  # a full one and the rest
    assert torch.equal(more[:32], some)
    alone, batches = texts_written(checkpoint, monkeypatch, 50)
    assert batches == 0
    assert torch.equal(alone, more)
    for other in ({"seed": 6}, {"length": 17}):
        assert texts_written(checkpoint, monkeypatch, 32, **other)[1] == 2


@pytest.mark.parametrize("spoilt", ["", "[[1, 2]]", "null", '{"a": 1}', "[[-1]]"])
def test_what_was_kept_of_it_and_is_broken_is_written_again(make, monkeypatch, tmp_path, spoilt):
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "cache"))
    checkpoint = make()
    first, _ = texts_written(checkpoint, monkeypatch, 4)
    (place,) = (tmp_path / "cache" / "written").iterdir()
    place.write_text(spoilt or re.sub(r"\d+", str(pico.VOCAB), place.read_text(), count=1))
    again, batches = texts_written(checkpoint, monkeypatch, 4)
    assert batches == 1
    assert torch.equal(again, first)


def test_without_a_home_nothing_is_kept(make, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("dslm.shrink.cache.cache_folder", homeless)
    checkpoint = make()
    for _ in range(2):
        assert texts_written(checkpoint, monkeypatch, 4)[1] == 1


def test_a_cache_that_is_full_is_left_clean(make, monkeypatch, tmp_path):
    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        assert texts_written(make(), monkeypatch, 4)[1] == 1
    assert list((tmp_path / "cache" / "written").iterdir()) == []


def test_windows_go_on_from_openings(make):
    found = calibration(make(bos=True), ["self"], samples=8, length=32, seed=0)
    # The tiny tokenizer knows no English: an opening is the start token and as many unknown words.
    lengths = {len(opening.split()) for opening in OPENINGS}
    for row in found.train[1::2].tolist():
        assert row[0] == BOS
        assert row[1 : 1 + min(lengths)] == [0] * min(lengths)


@pytest.mark.parametrize("family", pico.PICO)
def test_what_is_written_is_what_the_model_would_say(family, monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda odds, _, generator: odds.argmax(-1, keepdim=True))
    model = pico.make_model(family, next(iter(pico.PICO[family])))
    windows = torch.zeros(2, 32, dtype=torch.int64)
    assert list(write(model, windows, [[1], [7, 8, 9]], torch.Generator())) == list(range(1, 32))
    with torch.no_grad():
        likeliest = model(windows).logits.argmax(-1)
    assert torch.equal(windows[0, 1:], likeliest[0, :-1])
    assert torch.equal(windows[1, 3:], likeliest[1, 2:-1])
    assert windows[1, :3].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"samples": 1}, "samples is 1; at least 2"),
        (
            {"length": 15},
            "windows of 15 tokens are too short to calibrate on; at least 16; tiny takes up to 64",
        ),
    ],
)
@pytest.mark.parametrize("source", ["self", "x.txt"])
def test_sizes_that_are_too_small_are_refused(plain, sizes, said, source):
    with pytest.raises(RecipeError) as caught:
        calibration(plain, [source], **SIZES | sizes)
    assert said in str(caught.value)


def test_check_windows_refuses_too_little(plain, tmp_path):
    (tmp_path / "a.txt").write_text(words(20))
    with pytest.raises(RecipeError, match="has 20 tokens, and a window of 32 needs 32"):
        check_windows(plain, tmp_path / "a.txt", length=32, limit=4)
    with pytest.raises(RecipeError, match="0 windows are too few"):
        check_windows(plain, tmp_path / "a.txt", length=32, limit=0)


def test_a_text_needs_a_tokenizer(bare, tmp_path):
    (tmp_path / "a.txt").write_text(words(600))
    with pytest.raises(CheckpointError, match="tiny has no tokenizer to read a text with; copy the files"):
        calibration(bare, [str(tmp_path / "a.txt")], **SIZES)


def test_a_tokenizer_of_another_model_is_refused(make, tmp_path):
    (tmp_path / "a.txt").write_text("w3 w99 " * 300)
    with pytest.raises(CheckpointError, match="the tokenizer of tiny gives token 99, and the model has 96"):
        calibration(make(words=120), [str(tmp_path / "a.txt")], **SIZES)


def test_a_broken_model_writes_nothing(make):
    checkpoint = make()
    broken = pico.make_model("llama", "gqa-tied")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    broken.save_pretrained(checkpoint.folder)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds NaN or infinite numbers"):
        calibration(open_folder(checkpoint.folder), ["self"], **SIZES)
