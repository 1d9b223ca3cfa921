"""The end of a smaller model is fitted as brute force would: every token and every row of the table written out."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.shrink.encoder import survey_stream
from dslm.shrink.head import fit_head
from dslm.shrink.recipe import Recipe
from dslm.shrink.streams import Streams
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Folded, Stored

FIT, HELD_OUT, LENGTH, WIDTH = 10, 3, 20, 24


def ends(family, variant, tmp_path):
    """Both models with a narrower stream in the smaller one, streams at their ends, and what their tables read."""
    source = shrinking.make_source(tmp_path, family, variant)
    teacher = Walk(Stored(source))
    ids = pico.tokens(rows=FIT + HELD_OUT, length=LENGTH)
    encoder = survey_stream(teacher, ids, tied=source.sizes.tied).encoder(WIDTH)
    target = source.sizes.replace(hidden_size=WIDTH)
    student = Walk(Folded(Stored(source), target, tuple(range(target.num_hidden_layers)), {}, encoder))
    teacher.embed(ids)
    student.embed(ids)
    generator = torch.Generator().manual_seed(1)
    # Of few dimensions, so that most can be had, and distorted, so that something is to be made up for.
    spread = torch.randn(16, source.sizes.hidden_size, generator=generator)
    stream = torch.randn(*ids.shape, 16, generator=generator) @ spread
    narrow = encoder.write(stream, -1) * (1 + 0.5 * torch.rand(WIDTH, generator=generator))
    streams = Streams(stream, torch.empty_like(stream), narrow, FIT, HELD_OUT)
    with teacher.head(), student.head():
        wide, read = teacher.before_head(stream).double(), student.before_head(narrow).double()
    return teacher, student, encoder, streams, wide, read


def test_a_tall_table_is_surveyed_some_rows_at_a_time(tmp_path, monkeypatch):
    teacher = Walk(Stored(shrinking.make_source(tmp_path, "gemma2", "wide-heads-untied")))
    whole = survey_stream(teacher, pico.tokens(1), tied=False)
    monkeypatch.setattr("dslm.shrink.encoder.ROWS", 7)
    parts = survey_stream(teacher, pico.tokens(1), tied=False)
    assert torch.allclose(whole.scores_S, parts.scores_S, rtol=1e-9)


@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "mha"), ("gemma2", "wide-heads-untied"), ("phi", "mha")]
)
def test_a_head_of_its_own_is_the_least_squares_of_its_logits(family, variant, tmp_path):
    teacher, student, encoder, streams, wide, read = ends(family, variant, tmp_path)
    name, strength = teacher.weights.family.head, 0.3
    found = fit_head(teacher, student, encoder, streams, Recipe(ridges=(strength,)))[name].double()
    prior = student.weights.read(name).double()
    logits = wide @ teacher.weights.read(name).double().T
    x, y = read[: FIT * LENGTH], logits[: FIT * LENGTH]
    penalty = (strength * x.square().sum(dim=0)).sqrt().diag()
    stacked = torch.cat([x, penalty]), torch.cat([y, penalty @ prior.T])
    expected = torch.linalg.lstsq(*stacked).solution.T
    scale = float((expected - prior).abs().max())
    assert float((found - expected).abs().max()) < 1e-3 * scale
    held = slice(FIT * LENGTH, None)
    errors = [float((read[held] @ head.T - logits[held]).square().sum()) for head in (prior, found)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(("family", "variant"), [("llama", "gqa-tied"), ("gemma", "wide-heads")])
def test_the_norm_before_a_tied_table_is_the_least_squares_of_its_logits(
    family, variant, tmp_path, monkeypatch
):
    monkeypatch.setattr("dslm.shrink.head.ROWS", 7)
    teacher, student, encoder, streams, wide, read = ends(family, variant, tmp_path)
    (name,) = [n for n in student.places if student.weights.family.is_final_norm(n)]
    found = fit_head(teacher, student, encoder, streams, Recipe())[name].double()
    offset = student.weights.family.gain_offset
    factors = (found + offset) / (student.weights.read(name).double() + offset)
    tables = [walk.weights.read(walk.weights.family.embedding).double() for walk in (teacher, student)]
    logits = wide @ tables[0].T

    def written_out(tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """One row for each token and word: what each factor adds to the logit."""
        rows = (read[tokens, None, :] * tables[1]).flatten(0, 1)
        return rows, logits[tokens].flatten()

    rows, wanted = written_out(slice(0, FIT * LENGTH))
    held_rows, held = written_out(slice(FIT * LENGTH, None))
    best = torch.ones(WIDTH, dtype=torch.float64)
    for strength in (0.01, 0.1, 1.0):
        penalty = (strength * rows.square().sum(dim=0)).sqrt().diag()
        stacked = torch.cat([rows, penalty]), torch.cat([wanted, penalty.sum(dim=1)])
        one = torch.linalg.lstsq(*stacked).solution
        if (held_rows @ one - held).square().sum() < (held_rows @ best - held).square().sum():
            best = one
    assert float((best - 1).abs().max()) > 0.05
    assert torch.allclose(factors, best, atol=1e-3)
