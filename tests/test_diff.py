"""``dslm diff``: what it says of two models, and that it is a gate."""

import json

import pytest
import torch

import calling
import pico
from calling import one_line
from tokenizing import add_tokenizer

model, call = calling.model, calling.call  # fixtures


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory):
    network = pico.make_model("llama", "gqa-tied")
    with torch.no_grad():
        network.model.layers[0].mlp.down_proj.weight.add_(0.3 * torch.randn(32, 48))
    folder = pico.save(network, tmp_path_factory.mktemp("perturbed") / "other")
    add_tokenizer(folder)
    return folder


def test_diff_says_what_it_means(call, model, perturbed):
    code, out, _ = call("diff", model, model, "-q")
    assert code == 0
    assert "B is the same function as A, bit for bit." in out
    assert "B is alive and unlocked" in out
    code, out, _ = call("diff", model, perturbed, "--no-liveness", "-q")
    assert code == 0
    assert "B is not the same function as A" in out
    assert "liveness" not in out


def test_diff_is_a_gate(call, model, perturbed):
    limits = ["--max-kl", "1e-6", "--min-agreement", "0.999", "--no-liveness", "-q"]
    assert call("diff", model, model, *limits)[0] == 0
    code, out, err = call("diff", model, perturbed, *limits)
    assert code == 1
    assert "rounding floor" in out
    assert "KL is" in one_line(err)
    assert "top-1 agreement is" in err
    code, out, err = call("diff", model, perturbed, *limits, "--json")
    assert code == 1
    assert json.loads(out)["verdict"] == "different"


def test_diff_reads_texts(call, model, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(3, 90)))
    for text in (tmp_path / "text.txt", " ".join(f"w{i}" for i in range(3, 90))):
        code, out, err = call("diff", model, model, "--text", text, "--json", "--no-liveness", "-q")
        assert (code, err) == (0, "")
        assert json.loads(out)["comparison"]["tokens"] == 87
    assert call("diff", model, model, "--text", "w5", "-q")[0] == 1
    long = "w3" * 200  # no file can be called that
    assert "unexpected" not in call("diff", model, model, "--text", long, "--no-liveness", "-q")[2]


@pytest.mark.parametrize("named", ["missing.txt", "folder", "folder/missing"])
def test_a_text_that_looks_like_a_place_is_not_taken_for_a_text(named, call, model, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = call("diff", model, model, "--text", named, "-q")
    assert (code, f"--text {named}: there is no such file" in one_line(err)) == (2, True)


def test_numbers_that_are_none_are_never_alive(call, model, tmp_path):
    network = pico.make_model("llama", "gqa-tied")
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    folder = pico.save(network, tmp_path / "nan")
    add_tokenizer(folder)
    code, out, err = call("diff", model, folder, "--require-alive", "-q")
    assert (code, "liveness was not measured: the logits are not finite in float32" in one_line(err)) == (
        1,
        True,
    )
    assert "B is not the same function as A" in out
    assert "alive" not in out
    code, out, err = call("diff", folder, model, "-q")
    assert (code, "nan gives logits that are not finite" in one_line(err)) == (1, True)


def test_diff_refuses_another_tokenizer(call, model, tmp_path):
    other = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path / "other")
    add_tokenizer(other, words=50)
    code, _, err = call("diff", model, other, "--text", "w60 w61 w62", "-q")
    assert code == 1
    assert "read the same text differently" in one_line(err)
