"""The measurements must be able to fail: each verdict is checked on a model built to earn it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import pico
import verifying
from dslm.checkpoint.reader import open_folder
from dslm.errors import VerificationError
from dslm.families.axes import parse_line
from dslm.load import load_model
from dslm.verify import compare_checkpoints, gate
from dslm.verify.exactness import compare_models
from dslm.verify.units import Shuffle, parts_of, unit_positions
from verifying import build, ffn_copies, rewrite

source = verifying.source  # a fixture


def test_a_model_is_itself_bit_for_bit(source):
    report = compare_checkpoints(source, source)
    assert report.verdict == "identical"
    assert report.comparison.max_difference == report.comparison.kl == 0
    assert report.comparison.agreement == 1
    assert report.comparison.perplexity_a == report.comparison.perplexity_b
    assert 0 < report.floor.max_difference < 1e-4
    assert report.liveness.alive
    assert report.liveness.unlocked
    assert report.text == "random text"
    gate(report, max_kl=0, min_agreement=1, require_alive=True)


def test_an_exact_growth_is_the_same_function(source, tmp_path):
    grown = rewrite(source.folder, tmp_path / "g", lambda s: ffn_copies(s, 0.75), intermediate_size=96)
    report = compare_checkpoints(source, grown)
    assert report.verdict == "same"
    assert report.comparison.kl < 1e-10
    assert report.liveness.unlocked
    assert report.as_dict()["liveness"]["spaces"]["FFN units"]["units"] == 2 * 96


@pytest.mark.parametrize(("noise", "verdict"), [(1e-4, "close"), (0.3, "different")])
def test_a_perturbed_model_is_found(source, tmp_path, noise, verdict):
    def perturb(state):
        state["model.layers.0.mlp.down_proj.weight"] += noise * torch.randn(32, 48)

    other = rewrite(source.folder, tmp_path / "p", perturb)
    report = compare_checkpoints(source, other, liveness=False)
    assert report.verdict == verdict
    assert report.comparison.kl > 100 * report.floor.kl
    assert report.comparison.relative_difference > 10 * report.floor.relative_difference
    with pytest.raises(VerificationError, match=r"KL is .* nats"):
        gate(report, max_kl=report.comparison.kl / 2)
    gate(report, max_kl=report.comparison.kl * 2)


def test_a_model_with_nan_is_different(source, tmp_path):
    def poison(state):
        state["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")

    report = compare_checkpoints(source, rewrite(source.folder, tmp_path / "n", poison), liveness=False)
    assert report.verdict == "different"
    with pytest.raises(VerificationError):
        gate(report, max_kl=1e9)


def test_figures_equal_a_direct_computation(source, tmp_path):
    other = open_folder(build(tmp_path / "other", seed=1))
    windows = [torch.arange(3, 60)[None], torch.arange(60, 100)[None]]
    found, _ = compare_models(source, other, windows)
    models = [AutoModelForCausalLM.from_pretrained(c.folder).double() for c in (source, other)]
    kl, loss, agree, largest, difference = [], ([], []), [], 0.0, 0.0
    for ids in windows:
        with torch.no_grad():
            a, b = (model(ids).logits[0] for model in models)
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl += (log_a.exp() * (log_a - log_b)).sum(-1).tolist()
        agree += (a.argmax(-1) == b.argmax(-1)).tolist()
        largest, difference = max(largest, a.abs().max().item()), max(difference, (a - b).abs().max().item())
        for losses, log in zip(loss, (log_a, log_b), strict=True):
            losses += (-log[:-1].gather(1, ids[0, 1:, None])[:, 0]).tolist()
    assert found.tokens == 97
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.agreement == sum(agree) / len(agree)
    assert found.max_difference == pytest.approx(difference, rel=1e-4)
    assert found.relative_difference == pytest.approx(difference / largest, rel=1e-4)
    for perplexity, losses in zip((found.perplexity_a, found.perplexity_b), loss, strict=True):
        assert perplexity == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_the_floor_is_rounding_and_nothing_else(tmp_path, family, variant):
    """Reordering is exact in every family, it reorders something, and it leaves the model as it was."""
    checkpoint = open_folder(pico.save(pico.make_model(family, variant), tmp_path / family))
    model = load_model(checkpoint, dtype="float32", attention="eager")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shuffle = Shuffle(parts_of(model, checkpoint), checkpoint.family.dimensions(checkpoint.config))
    ids = pico.tokens()
    with torch.no_grad():
        logits = model.double()(ids).logits
        with shuffle.applied():
            again = model(ids).logits
            moved = [
                name
                for name, value in model.state_dict().items()
                if not torch.equal(value.float(), before[name])
            ]
    # Not to float64 precision: some families compute their norms in float32 whatever they are given.
    assert (again - logits).abs().max() < 1e-5 * logits.abs().max()
    assert len(moved) > len(before) / 2
    assert all(torch.equal(value.float(), before[name]) for name, value in model.state_dict().items())


def test_unit_positions():
    sizes = {"heads": 2, "head_dim": 2, "kv_heads": 1, "intermediate": 3, "hidden": 4}
    fused = parse_line("(heads 3 head_dim) <- hidden").axes[0]
    assert unit_positions(fused, "heads", sizes).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    qkv = parse_line("(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim) <- hidden").axes[0]
    assert unit_positions(qkv, "heads", sizes).tolist() == [[0, 1], [2, 3]]
    assert unit_positions(qkv, "kv_heads", sizes).tolist() == [[4, 5, 6, 7]]
    gated = parse_line("intermediate+intermediate <- hidden").axes[0]
    assert unit_positions(gated, "intermediate", sizes).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert unit_positions(gated, "hidden", sizes) is None


def test_other_vocabularies_are_refused(source, tmp_path):
    other = open_folder(build(tmp_path / "v", vocab_size=130))
    with pytest.raises(VerificationError, match="128 tokens and v 130"):
        compare_checkpoints(source, other)
    with pytest.raises(VerificationError, match="no tokenizer"):
        compare_checkpoints(source, source, "some text")
