"""``dslm down`` on the command line, for real: stock transformers loads what it wrote."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import asking
import pico
from asking import FITTED, words
from dslm.cli.main import run

original, source, call = asking.original, asking.source, asking.call  # fixtures

CALIBRATED = [*FITTED, "--calibration", "text.txt", "--check", "check.txt", "--device", "cpu", "-q"]


@pytest.mark.parametrize("method", ["reconstruct", "slice"])
def test_a_model_is_shrunk_and_stock_transformers_loads_it(call, tmp_path, method):
    arguments = [
        "--intermediate-size",
        32,
        "--num-hidden-layers",
        2,
        "-o",
        "out",
        "--method",
        method,
        *CALIBRATED,
    ]
    code, out, err = call(*arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found["texts"]) == {"held-out", "check"}
    assert len(found["layers"]) == len(found["block_errors"]) == 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == found["parameters"]["after"]
    assert not torch.isnan(model(pico.tokens()).logits).any()
    check = torch.tensor([[int(w[1:]) for w in words(500, seed=1).split()][: 15 * 32]]).view(15, 32)
    loss = sum(float(model(row[None], labels=row[None]).loss.detach()) for row in check) / len(check)
    assert found["texts"]["check"]["loss"]["after"] == pytest.approx(loss, rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--num-hidden-layers 2 --method {method} --calibration text.txt" in card
    first = load_file(tmp_path / "out" / "model.safetensors")
    assert call(*arguments, "--overwrite")[0] == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_grown_model_shrinks_back_without_loss_and_without_calibration(call, source, tmp_path, capsys):
    assert call("-edm", 2, "-upm", 2, "-o", "big", command="up")[0] == 0
    code = run(["down", "big", "--like", str(source), "-o", "back", "--check", "check.txt", "--json", "-q"])
    assert code == 0
    texts = json.loads(capsys.readouterr().out)["texts"]
    assert set(texts) == {"check"}
    assert texts["check"]["loss"]["after"] == pytest.approx(texts["check"]["loss"]["before"], rel=1e-4)
    assert 1 < texts["check"]["loss"]["after"] < 10
    record = json.loads((tmp_path / "back" / "dslm.json").read_text())
    assert record["measured"]["perplexity on the check text, after"] == pytest.approx(
        texts["check"]["perplexity"]["after"]
    )
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(pico.tokens()).logits
            for name in ("tiny", "back")
        )
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4


def test_two_tables_of_one_cost_nothing(call, source, tmp_path):
    assert call("-edm", 2, "-upm", 2, "-o", "big", command="up")[0] == 0
    assert run(["down", "big", "--like", str(source), "--untie", "-o", "back", "--json", "-q"]) == 0
    record = json.loads((tmp_path / "back" / "dslm.json").read_text())
    assert "tokens calibrated on" not in record["measured"]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(pico.tokens()).logits
            for name in ("tiny", "back")
        )
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert "lm_head.weight" in tensors
