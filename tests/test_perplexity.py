"""How well models predict a text: against a computation token by token, and errors against their formulas."""

import json

import numpy as np
import pytest
import torch

import calling
import evaluating
import pico
from dslm.checkpoint.reader import open_folder
from dslm.verify.measured import Measured, apart, ratio
from dslm.verify.perplexity import evaluate_text, logits_of
from dslm.verify.reading import whole_words
from evaluating import LENGTH, ids_of, words
from tokenizing import BOS, add_tokenizer

model, other, foreign = calling.model, evaluating.other, evaluating.foreign  # fixtures


def nats_of(network, context, token):
    """Of one token after some others, in float64 from the model's float32 logits."""
    with torch.no_grad():
        logits = network(torch.tensor([context])).logits[0, -1]
    return -float(logits.double().log_softmax(-1)[token])


def nats_one_by_one(network, documents, length, bos):
    """Every token by itself: after the start of its document or its window, as the documentation says."""
    start = [BOS] if bos else []
    step = length - 1 - len(start)
    windows = []
    for ids in documents:
        for begin in range(0, len(ids), step):
            before = [*start, ids[begin - 1]] if begin else [BOS]
            piece = range(begin, min(begin + step, len(ids)))
            windows.append([nats_of(network, [*before, *ids[begin:i]], ids[i]) for i in piece])
    return windows


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "gqa-tied"), ("opt", "pre-norm"), ("gemma2", "windows-softcaps")]
)
def test_perplexity_is_that_of_every_token_by_itself(tmp_path, family, variant, bos):
    network = pico.make_model(family, variant)
    folder = pico.save(network, tmp_path / "m")
    add_tokenizer(folder, bos=bos)
    texts = [words(37, seed=1), words(20, seed=2)]
    rows = tmp_path / "text.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = evaluate_text(open_folder(folder), rows, sequence_length=LENGTH, device="cpu")
    expected = nats_one_by_one(network, [ids_of(text) for text in texts], LENGTH, bos)
    total, tokens = sum(map(sum, expected)), 57
    nbytes = sum(len(text.encode()) for text in texts)
    assert found.documents == 2
    assert found.model.tokens == tuple(map(len, expected))
    assert found.model.nats == pytest.approx([sum(window) for window in expected], rel=1e-5)
    assert found.model.perplexity.value == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert found.model.bits_per_byte.value == pytest.approx(total / np.log(2) / nbytes, rel=1e-5)
    assert sum(found.model.nbytes) == nbytes


def test_without_any_start_the_first_token_is_only_context(tmp_path, model):
    folder = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path / "m")
    add_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        settings.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = words(20)
    found = evaluate_text(open_folder(folder), text, sequence_length=LENGTH, device="cpu").model
    assert found.tokens == (15, 4)
    assert sum(found.nbytes) == len(text[text.index(" ") + 1 :])
    with_start = evaluate_text(open_folder(model), text, sequence_length=LENGTH, device="cpu").model
    assert with_start.tokens == (15, 5)


@pytest.mark.parametrize("family", pico.PICO)
def test_logits_in_pieces_are_the_models_logits(family):
    network = pico.make_model(family, next(iter(pico.PICO[family])))
    ids = pico.tokens(rows=1)
    embedded = []
    with torch.inference_mode():
        whole = network(ids).logits[0]
        handle = network.get_input_embeddings().register_forward_hook(lambda *args: embedded.append(args))
        pieces = list(logits_of(network, ids[0], 2, piece=5 * pico.VOCAB + 1))
        handle.remove()
        assert torch.equal(whole, network(ids).logits[0])  # and it is left as it was
    assert len(embedded) == 1  # the body ran once
    assert [start for start, _ in pieces] == [2, 7, 12, 17, 22]
    assert max(len(logits) for _, logits in pieces) == 5
    torch.testing.assert_close(torch.cat([logits for _, logits in pieces]), whole[2:-1])


def test_the_error_of_a_mean_and_of_a_ratio():
    parts, sizes = np.array([3.0, 5.0, 4.0, 9.0]), np.array([2.0, 2.0, 2.0, 2.0])
    found = ratio(list(parts), list(sizes))
    assert found.value == pytest.approx((parts / sizes).mean())
    assert found.error == pytest.approx((parts / sizes).std(ddof=1) / 2)
    draw = np.random.default_rng(0)
    sizes = draw.integers(5, 50, size=400).astype(float)
    parts = 2.5 * sizes + draw.normal(size=400) * np.sqrt(sizes)
    chosen = draw.integers(0, 400, size=(2000, 400))
    resampled = parts[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
    assert ratio(list(parts), list(sizes)).error == pytest.approx(resampled.std(), rel=0.1)
    assert ratio([2.0], [4.0]) == Measured(0.5, None)
    assert apart(Measured(5.0, 3.0), Measured(1.0, 4.0)) == Measured(4.0, 5.0)
    assert apart(Measured(5.0), Measured(1.0, 4.0)) == Measured(4.0, None)


def test_two_models_are_paired_by_window(model, other):
    text = words(6 * (LENGTH - 1), seed=3)
    report = evaluate_text(
        open_folder(model), text, against=open_folder(other), sequence_length=LENGTH, device="cpu"
    )
    alone = [
        evaluate_text(open_folder(m), text, sequence_length=LENGTH, device="cpu").model
        for m in (model, other)
    ]
    assert report.same_tokenizer
    assert (report.model, report.against) == tuple(alone)
    a, b = (np.array(score.nats) / (LENGTH - 1) for score in alone)
    difference, error = (a - b).mean(), (a - b).std(ddof=1) / np.sqrt(6)
    assert report.loss_difference.value == pytest.approx(difference)
    assert report.loss_difference.error == pytest.approx(error)
    assert report.perplexity_ratio.value == pytest.approx(np.exp(difference))
    assert report.perplexity_ratio.error == pytest.approx(np.exp(difference) * error)
    assert report.model.loss.error == pytest.approx(a.std(ddof=1) / np.sqrt(6))
    assert report.model.perplexity.error == pytest.approx(np.exp(a.mean()) * report.model.loss.error)
    bits = [score.bits_per_byte.value for score in alone]
    assert report.bits_difference.value == pytest.approx(bits[0] - bits[1])
    apart_error = np.hypot(*(score.bits_per_byte.error for score in alone))
    assert report.bits_difference.error != pytest.approx(apart_error)


def test_a_text_file_is_one_document(model, tmp_path):
    text = f" = One = \n\n{words(40)}\n\n = Two = \n\n{words(40, seed=1)}\n"
    (tmp_path / "text.txt").write_text(text)
    found = evaluate_text(open_folder(model), tmp_path / "text.txt", sequence_length=LENGTH, device="cpu")
    assert (found.documents, found.text) == (1, f"the file {tmp_path / 'text.txt'}")
    assert sum(found.model.nbytes) == len(text)
    assert found.model == evaluate_text(open_folder(model), text, sequence_length=LENGTH, device="cpu").model


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_a_limit_takes_the_first_windows(model, foreign, limit):
    text = words(70)
    whole = evaluate_text(open_folder(model), text, sequence_length=LENGTH, device="cpu")
    found = evaluate_text(
        open_folder(model),
        text,
        against=open_folder(foreign),
        sequence_length=LENGTH,
        limit=limit,
        device="cpu",
    )
    count = min(limit, 5)
    assert len(found.model.nats) == count
    assert found.model.nats == pytest.approx(whole.model.nats[:count])
    assert sum(found.model.nbytes) == sum(found.against.nbytes)  # the same text for both
    assert found.text == ("the given text" if count == 5 else "the given text, its beginning")


@pytest.mark.parametrize(
    ("end", "head"), [(3, "one"), (4, "one"), (5, "one"), (8, "one two"), (11, "one two"), (2, "on")]
)
def test_a_limit_does_not_cut_words(end, head):
    """A word that is cut would be read as other tokens; the first word is all there is."""
    assert whole_words("one two three", end) == head


def test_windows_fit_the_context_of_both_models(tmp_path, model):
    short = pico.make_config("llama", "gqa-tied")
    short.max_position_embeddings = 24
    folder = pico.save(type(pico.make_model("llama", "gqa-tied"))(short), tmp_path / "short")
    add_tokenizer(folder)
    found = evaluate_text(open_folder(model), words(100), device="cpu")
    assert found.sequence_length == pico.POSITIONS
    found = evaluate_text(open_folder(model), words(100), against=open_folder(folder), device="cpu")
    assert found.sequence_length == 24


def test_the_same_again_is_no_difference(model):
    found = evaluate_text(
        open_folder(model), words(60), against=open_folder(model), sequence_length=16, device="cpu"
    )
    assert found.loss_difference == found.bits_difference == Measured(0.0, 0.0)
    assert found.perplexity_ratio == Measured(1.0, 0.0)


def test_progress_counts_windows(model):
    told = []
    evaluate_text(
        open_folder(model),
        words(60),
        sequence_length=LENGTH,
        device="cpu",
        progress=lambda *a: told.append(a),
    )
    assert told == [("reading with tiny", done, 4) for done in range(5)]
