"""``dslm gen``: what it writes, where, and that a seed repeats it."""

import json

import pytest
import torch

import calling
import pico
from calling import one_line
from dslm.checkpoint.reader import open_folder
from dslm.errors import DslmError
from dslm.generation import Sampling, generate

bare, model, call = calling.bare, calling.model, calling.call  # fixtures


def test_gen_is_greedy_at_zero_and_repeats_with_a_seed(call, model):
    code, out, err = call("gen", model, "-p", "w5 w6", "-n", 4, "--temperature", 0, "-q")
    assert (code, err) == (0, "")
    assert out.startswith("w5 w6 ")
    tokens = torch.tensor([[5, 6]])
    with torch.no_grad():
        logits = pico.make_model("llama", "gqa-tied")(tokens).logits[0, -1]
    assert out.split()[2] == f"w{int(logits.argmax())}"
    runs = [call("gen", model, "-p", "w5 w6", "-n", 8, "--seed", seed, "-q")[1] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_gen_tells_its_seed_and_its_speed_on_stderr(call, model):
    code, out, err = call("gen", model, "-p", "w5", "-n", 4)
    assert code == 0
    first, last = err.splitlines()
    seed = first.removeprefix("seed ")
    assert "tokens/s" in last
    assert call("gen", model, "-p", "w5", "-n", 4, "--seed", seed, "-q")[1] == out


def test_gen_json(call, model):
    code, out, _ = call("gen", model, "-p", "w5", "-n", 4, "--seed", 3, "--json", "-q")
    found = json.loads(out)
    assert code == 0
    assert (found["schema"], found["prompt"], found["seed"]) == (1, "w5", 3)
    assert 1 <= found["tokens"] <= 4


def test_gen_reads_stdin(call, model, monkeypatch):
    import io

    def written(*options):
        monkeypatch.setattr("sys.stdin", io.StringIO("w7 w8\n"))
        return call("gen", model, "-p", "-", "-n", 2, "--seed", 3, "-q", *options)[1]

    found = json.loads(written("--json"))
    assert found["prompt"] == "w7 w8"  # without the end of the line
    assert written() == "w7 w8" + found["text"] + "\n"


def test_gen_without_a_tokenizer_says_what_to_do(call, bare):
    code, out, err = call("gen", bare, "-q")
    assert (code, out) == (1, "")
    assert "bare has no tokenizer; copy tokenizer.json" in one_line(err)


def test_gen_stays_inside_the_context(model):
    checkpoint = open_folder(model)
    found = generate(
        checkpoint, " ".join(["w5"] * 60), tokens=50, sampling=Sampling(temperature=0), device="cpu"
    )
    assert found.tokens <= pico.POSITIONS - 60
    with pytest.raises(DslmError, match="the prompt has 64 tokens"):
        generate(checkpoint, " ".join(["w5"] * 64), device="cpu")


def test_a_model_that_is_larger_than_memory_is_not_called_broken(call, model, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    code, _, err = call("gen", model, "-p", "w5", "-q")
    assert (code, "the memory is not enough to load" in one_line(err)) == (1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_gen_on_a_device_that_is_not_there(call, model):
    code, _, err = call("gen", model, "--device", "cuda", "-q")
    assert code == 1
    assert "no device 'cuda' here; usable: cpu" in one_line(err)
