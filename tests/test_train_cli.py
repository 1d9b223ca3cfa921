"""``dslm train`` from end to end on a tiny model: each mode, and what it writes."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import calling
import growing
import pico
import training
from calling import one_line
from dslm.checkpoint.reader import open_folder
from dslm.texts import Row
from dslm.train.growth import NEW
from dslm.train.run import train_checkpoint
from dslm.train.settings import Training
from tokenizing import add_tokenizer
from training import QUICK, metrics

model, call, data = calling.model, calling.call, training.data  # fixtures
pytestmark = training.WARNINGS


def test_full_training_writes_a_plain_checkpoint_that_learned(call, model, data, tmp_path):
    out = tmp_path / "out"
    code, said, err = call("train", model, "-o", out, "--data", data, *QUICK, "--json")
    assert code == 0, err
    found = json.loads(said)
    assert (found["schema"], found["steps"], found["tokens"], found["adapter"]) == (1, 20, 640, False)
    before, after = found["perplexity"]["before"], found["perplexity"]["after"]
    assert after < before / 3
    trained = growing.load(out, torch.float32)
    assert (out / "config.json").read_text() == (model / "config.json").read_text()
    assert load_file(out / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    lines = metrics(out)
    evaluated = [line["eval_perplexity"] for line in lines if "eval_perplexity" in line]
    assert (evaluated[0], evaluated[-1]) == (before, after)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "dslm.json").read_text())["trained"][-1]
    assert record["settings"]["data"] == ["counting.jsonl"]
    assert str(tmp_path) not in (out / "dslm.json").read_text() + (out / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not torch.equal(trained.lm_head.weight, AutoModelForCausalLM.from_pretrained(model).lm_head.weight)
    assert err.count("held-out perplexity") == 11
    grown = growing.grow(out, tmp_path / "grown", growing.doubled(open_folder(out).sizes))
    assert not {"metrics.jsonl", "loss.png"} & {path.name for path in grown.iterdir()}
    assert "w" in err.splitlines()[1]  # a sample of text


@pytest.mark.parametrize(
    ("options", "steps", "tokens"),
    [
        (["--max-steps", 5], 5, 2 * 5 * 16 + 4 * 16),
        (["--tokens", 13 * 16], 5, 2 * 5 * 16 + 4 * 16),
        (["--epochs", 2], 4, 2 * 5 * 16),
    ],
)
def test_tokens_are_those_that_were_seen(options, steps, tokens, call, model, tmp_path):
    """Of five blocks a step of four leaves one for the next step, and an epoch ends there."""
    words = " ".join(f"w{3 + i % 80}" for i in range(5 * 16 - 1))
    (tmp_path / "text.txt").write_text(words)
    (tmp_path / "held.txt").write_text(words)
    asked = ["--data", tmp_path / "text.txt", "--eval-data", tmp_path / "held.txt", "--block-size", 16]
    asked += ["--batch-size", 4, "--device", "cpu", *options]
    code, said, err = call("train", model, "-o", tmp_path / "out", *asked, "--json", "-q")
    assert code == 0, err
    found = json.loads(said)
    assert (found["steps"], found["tokens"]) == (steps, tokens)
    assert metrics(tmp_path / "out")[-1]["tokens"] == tokens


def test_a_padding_token_that_the_table_lacks_is_not_used(call, data, tmp_path):
    source = pico.save(pico.make_model("llama", "mha"), tmp_path / "tiny")
    add_tokenizer(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(source)
    assert tokenizer.pad_token_id == pico.VOCAB
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    (tmp_path / "said.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    asked = ["--data", tmp_path / "said.jsonl", *QUICK, "-q"]
    code, _, err = call("train", source, "-o", tmp_path / "out", *asked)
    assert code == 0, err


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_what_is_cut_up_cannot_be_frozen_in_parts(engine, call, model, data, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    asked = ["--data", data, *QUICK, "--freeze-old", "-q"]
    code, _, err = call("train", model, "-o", tmp_path / "out", *asked)
    assert (code, f"leave out {engine}" in one_line(err)) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("growth", "chosen"),
    [
        (["-upm", 2, "--method", "padding"], "growth"),
        (["--num-hidden-layers", 5], "growth"),
        (["-upm", 2], "plain"),
        (["-upm", 2, "--num-hidden-layers", 5], "plain"),
    ],
    ids=["padding", "blocks", "copies", "both"],
)
def test_a_growth_that_only_adds_is_trained_by_its_recipe_once(growth, chosen, call, model, data, tmp_path):
    grown, out, again = tmp_path / "grown", tmp_path / "out", tmp_path / "again"
    code, _, err = call("up", model, "-o", grown, *growth)
    assert code == 0, err
    asked = ["--data", data, *QUICK, "-q"]
    for recipe, place in ((chosen, tmp_path / "same"), ("auto", out)):
        assert call("train", grown, "-o", place, *asked, "--recipe", recipe)[0] == 0
    assert metrics(out) == metrics(tmp_path / "same")
    assert call("train", out, "-o", again, *asked)[0] == 0
    trained = json.loads((again / "dslm.json").read_text())["trained"]
    assert [run["settings"]["recipe"] for run in trained] == [chosen, "plain"]
    assert not any("--recipe" in run["command"] for run in trained)


def test_a_teacher_stays_in_its_dtype(call, model, data, tmp_path, monkeypatch):
    import dslm.train.run

    teachers, give = [], dslm.train.run.give_loss

    def seen(model, learn):
        teachers.append(learn.teacher)
        give(model, learn)

    monkeypatch.setattr(dslm.train.run, "give_loss", seen)
    half = pico.save(pico.make_model("llama", "gqa-tied", dtype=torch.bfloat16), tmp_path / "half")
    add_tokenizer(half)
    before = load_file(half / "model.safetensors")
    asked = ["--data", data, *QUICK, "--teacher", half, "-q"]
    code, _, err = call("train", model, "-o", tmp_path / "out", *asked)
    assert code == 0, err
    weights = {name: tensor for name, tensor in teachers[0].state_dict().items() if name in before}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_the_bar_shows_loss_and_speed(model, data, tmp_path):
    told = []
    asked = Training((str(data),), block_size=16, max_steps=8, device="cpu", learning_rate=1e-2)
    train_checkpoint(open_folder(model), asked, tmp_path / "out", progress=lambda *what: told.append(what))
    steps = [(label, done, whole) for label, done, whole in told if label.startswith("training")]
    assert [(done, whole) for _, done, whole in steps] == [(number, 8) for number in range(1, 9)]
    assert re.fullmatch(r"training\tloss \d\.\d{3}, [\d,]+ tokens/s", steps[-1][0])


def test_a_data_set_on_the_hub_of_which_only_a_part_is_read_says_so(call, model, tmp_path, monkeypatch):
    def rows(source, characters, progress):
        return [Row(f"w{3 + i % 80} w{4 + i % 80} " * 20) for i in range(60)], source

    monkeypatch.setattr("dslm.train.run.read_rows", rows)
    asked = ["--data", "some/set", *QUICK[:4], "--device", "cpu", "--eval-every", 999]
    code, _, err = call("train", model, "-o", tmp_path / "out", *asked)
    assert code == 0, err
    assert "of some/set no more is read than about 1,000,000 tokens; --tokens says how many" in err
    for more in (["--tokens", "1k"], ["-q"]):
        code, _, err = call("train", model, "-o", tmp_path / "other", *asked, *more, "--overwrite")
        assert (code, "some/set" in err) == (0, False)


def test_the_dtype_of_the_source_is_kept(call, data, tmp_path):
    source = pico.save(pico.make_model("llama", "gqa-tied", dtype=torch.bfloat16), tmp_path / "half")
    add_tokenizer(source)
    assert call("train", source, "-o", tmp_path / "out", "--data", data, *QUICK, "-q")[0] == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_lora_writes_an_adapter_that_peft_loads(call, model, data, tmp_path, monkeypatch):
    import peft.utils.save_and_load
    from peft import PeftModel

    monkeypatch.setattr(
        peft.utils.save_and_load,
        "check_file_exists_on_hf_hub",
        lambda *asked: pytest.fail(f"asked the hub {asked}"),
    )

    out = tmp_path / "out"
    code, said, err = call("train", model, "-o", out, "--data", data, *QUICK, "--lora", "--lora-r", 4, "-q")
    assert code == 0, err
    assert "adapter written to" in said
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    again = call(
        "train", model, "-o", out, "--data", data, *QUICK, "--lora", "--lora-r", 4, "--overwrite", "-q"
    )
    assert again[0] == 0, again[2]
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = pico.tokens()
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, out)
    assert (adapted(ids).logits - plain).abs().max() > 0.1


@pytest.fixture(scope="module")
def wide(model, tmp_path_factory):
    """The model with twice the width: four-bit weights come in blocks of 64."""
    place = tmp_path_factory.mktemp("wide") / "wide"
    return growing.grow(
        model, place, growing.doubled(open_folder(model).sizes).replace(intermediate_size=128)
    )


@pytest.mark.parametrize("mode", ["--lora", "--qlora"])
def test_merged_adapters_are_a_plain_model(mode, call, wide, data, tmp_path):
    from peft import PeftModel

    model = wide
    out = tmp_path / "out"
    code, said, err = call("train", model, "-o", out, "--data", data, *QUICK, mode, "--merge", "--json")
    assert code == 0, err
    found = json.loads(said)
    assert found["perplexity"]["after"] < found["perplexity"]["before"]
    ids = pico.tokens()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            growing.load(out, torch.float32)(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_shrunk_model_learns_from_its_source(call, model, data, tmp_path):
    small, healed = tmp_path / "small", tmp_path / "healed"
    source = tmp_path / "tiny"
    source.symlink_to(model)
    down = ("down", source, "-o", small, "--intermediate-size", 32, "--calibration", data)
    code, _, err = call(*down, "--samples", 8, "--sequence-length", 32, "-q")
    assert code == 0, err
    options = [*QUICK, "--lr", 1e-3, "--max-steps", 60, "--teacher", "source", "-q"]
    for weight, out in ((1, healed), (0, tmp_path / "labels")):
        code, _, err = call("train", small, "-o", out, "--data", data, *options, "--kl-weight", weight)
        assert code == 0, err
    texts = [json.loads(line)["text"].split() for line in data.read_text().splitlines()]
    ids = torch.tensor([[int(word[1:]) for word in text[:8]] for text in texts])
    assert kl(model, healed, ids) < 0.8 * kl(model, small, ids) < kl(model, tmp_path / "labels", ids)
    record = json.loads((healed / "dslm.json").read_text())
    assert record["plan"]["model"] == "tiny"
    assert record["trained"][0]["settings"]["teacher"] == "source"
    headings = [line for line in (healed / "README.md").read_text().splitlines() if line.startswith("# ")]
    assert headings == ["# healed"]


def kl(teacher, student, ids):
    with torch.no_grad():
        p, q = (
            growing.load(place, torch.float32)(ids).logits.log_softmax(-1) for place in (teacher, student)
        )
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_the_growth_recipe_runs_from_the_command(call, data, tmp_path):
    source = pico.save(pico.make_model("llama", "mha"), tmp_path / "small")
    add_tokenizer(source)
    grown = growing.grow(source, tmp_path / "grown", growing.doubled(open_folder(source).sizes))
    out = tmp_path / "out"
    code, _, err = call(
        "train", grown, "-o", out, "--data", data, *QUICK, "--recipe", "growth", "--freeze-old", "-q"
    )
    assert code == 0, err
    before, after = (load_file(place / "model.safetensors") for place in (grown, out))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(before[name][:48, :32], after[name][:48, :32])
    assert not torch.equal(before[name], after[name])
    measured = json.loads((out / "dslm.json").read_text())["trained"][0]["measured"]
    learned = sum(int((after[name] != before[name]).sum()) for name in before)
    assert 0.9 * measured["parameters that could learn"] < learned <= measured["parameters that could learn"]
    rates = [line["learning_rate"] for line in metrics(out) if "learning_rate" in line]
    assert max(rates) == pytest.approx(NEW * 1e-2, rel=0.05)
