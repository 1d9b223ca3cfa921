"""``dslm train`` from end to end on a tiny model."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import calling
import growing
import pico
from calling import one_line
from dslm.checkpoint.reader import open_folder
from tokenizing import add_tokenizer
from training import QUICK, counting, metrics

model, bare, call = calling.model, calling.bare, calling.call  # fixtures
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return counting(tmp_path_factory.mktemp("data"))


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


def test_the_dtype_of_the_source_is_kept(call, data, tmp_path):
    source = pico.save(pico.make_model("llama", "gqa-tied", dtype=torch.bfloat16), tmp_path / "half")
    add_tokenizer(source)
    assert call("train", source, "-o", tmp_path / "out", "--data", data, *QUICK, "-q")[0] == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_lora_writes_an_adapter_that_peft_loads(call, model, data, tmp_path):
    from peft import PeftModel

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


def test_a_model_that_is_too_narrow_for_four_bits_is_refused(call, model, data, tmp_path):
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "--qlora")
    assert code == 1
    assert "bitsandbytes cannot run here" in one_line(err)
    assert "train with --lora instead" in err


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


def test_a_run_goes_on_after_kill_9(call, model, data, tmp_path):
    options = [*QUICK, "--max-steps", 24, "--eval-every", 4]
    assert call("train", model, "-o", tmp_path / "whole", "--data", data, *options, "-q")[0] == 0
    out, run = tmp_path / "out", tmp_path / "out.run"
    arguments = [str(a) for a in ("train", model, "-o", out, "--data", data, *options)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dslm.cli.main", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not (run / "checkpoint-8" / "trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run.is_dir()
    assert not out.exists(), "it was too fast to be killed"
    code, _, err = call("train", model, "-o", out, "--data", data, *options)
    assert (code, "an unfinished run is in" in one_line(err)) == (1, True)
    code, _, err = call("train", model, "-o", out, "--data", data, *options, "--lr", 2e-2, "--resume")
    assert code == 1
    assert "was asked for otherwise: learning_rate was 0.01 and is 0.02" in one_line(err)
    code, _, err = call("train", model, "-o", out, "--data", data, *options, "--resume")
    assert code == 0, err
    assert metrics(out) == metrics(tmp_path / "whole")
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_learn_as_one(call, model, data, tmp_path):
    options = [*QUICK[:2], *QUICK[4:], "--max-steps", 8, "--eval-every", 4, "-q"]
    whole = tmp_path / "one"
    assert call("train", model, "-o", whole, "--data", data, *options, "--batch-size", 4)[0] == 0
    arguments = ["train", model, "-o", tmp_path / "two", "--data", data, *options, "--batch-size", 2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29511",
    ]
    done = subprocess.run(
        [*command, "-m", "dslm.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert done.stdout.count("written to") == 1


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


def test_a_broken_loss_stops_the_run_and_keeps_the_last_checkpoint(call, model, data, tmp_path):
    out = tmp_path / "out"
    options = [*QUICK, "--lr", 1e30, "--warmup", 0, "--save-every", 1, "--max-grad-norm", 0, "-q"]
    code, _, err = call("train", model, "-o", out, "--data", data, *options)
    assert code == 1
    assert "the loss is" in one_line(err)
    assert "lower --learning-rate" in err
    assert not out.exists()
    kept = list((tmp_path / "out.run").glob("checkpoint-*/model.safetensors"))
    assert kept
    for path in kept:
        assert all(math.isfinite(tensor.abs().max()) for tensor in load_file(path).values())


def test_down_heals_in_one_go(call, model, data, tmp_path):
    out = tmp_path / "small"
    options = ["--intermediate-size", 32, "--calibration", data, "--samples", 8, "--sequence-length", 32]
    code, said, err = call("down", model, "-o", out, *options, "--heal-tokens", "20k", "--json")
    assert code == 0, err
    healed = json.loads(said)["healed"]
    assert healed["perplexity"]["after"] < healed["perplexity"]["before"]
    assert growing.load(out, torch.float32).config.intermediate_size == 32
    record = json.loads((out / "dslm.json").read_text())
    assert record["plan"]["target"]["intermediate_size"] == 32
    assert record["trained"][0]["settings"]["teacher"] == "tiny"
    card = (out / "README.md").read_text()
    assert card.count("base_model") <= 1
    assert card.index("reconstruct") < card.index("## Trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_healing_that_fails_leaves_the_shrunk_model(call, model, data, tmp_path):
    out = tmp_path / "small"
    (tmp_path / "short.txt").write_text("w3 w4")
    options = [
        "--intermediate-size",
        32,
        "--calibration",
        data,
        "--samples",
        8,
        "--sequence-length",
        32,
        "-q",
    ]
    code, _, err = call(
        "down", model, "-o", out, *options, "--heal-tokens", "20k", "--data", tmp_path / "short.txt"
    )
    assert code == 1
    assert "fewer than a block" in one_line(err)
    assert growing.load(out, torch.float32).config.intermediate_size == 32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "x.txt"], "--data is for healing; say how long with --heal-tokens"),
        (["--heal-tokens", "1k", "--data", "x.txt"], "there is no file x.txt"),
        (["--heal-tokens", "1k"], "there is no text to heal on"),
    ],
)
def test_healing_needs_text_and_length(options, said, call, model, tmp_path):
    code, _, err = call("down", model, "-o", tmp_path / "out", "--intermediate-size", 32, *options)
    assert (code, said in one_line(err)) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_seen_before_the_shrink(call, model, data, tmp_path):
    run = tmp_path / "out.run" / "run.json"
    run.parent.mkdir()
    run.write_text("{}")
    options = ["--intermediate-size", 32, "--calibration", data, "--heal-tokens", "1k"]
    code, _, err = call("down", model, "-o", tmp_path / "out", *options)
    assert (code, "an unfinished run is in" in one_line(err)) == (1, True)
    assert run.is_file()


REFUSED = {
    "no data": (["--data", "/no/such.txt"], "there is no file /no/such.txt"),
    "two ends": (["--tokens", "1k"], "tokens and steps were both given"),
    "merge": (["--merge"], "nothing to merge in full training"),
    "freeze": (["--lora", "--freeze-old"], "--freeze-old is for full training"),
    "growth": (["--recipe", "growth"], "has no record of how it was grown"),
    "source": (["--teacher", "source"], "has no record of what it was resized from"),
    "block": (["--block-size", 1], "block_size is 1; it is at least 2"),
    "rate": (["--lr", 0], "learning_rate is 0.0; it is above 0"),
    "held out": (["--held-out", 0], "nothing is held out for evaluation"),
    "kl": (["--kl-weight", 2], "kl_weight is 2.0; it is from 0 to 1"),
    "modules": (
        ["--lora", "--lora-target", "nothing"],
        "no modules called nothing; take all-linear, or of down_proj",
    ),
    "resume": (["--resume"], "there is no unfinished run in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(case, call, model, data, tmp_path):
    options, said = REFUSED[case]
    code, out, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, *options)
    assert (code, out) == (1, "")
    assert said in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_is_named(call, model, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "w3"}\n{"text": \n')
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", tmp_path / "d.jsonl", *QUICK)
    assert code == 1
    assert "line 2 of" in one_line(err)


def test_a_short_text_is_refused(call, model, tmp_path):
    (tmp_path / "d.txt").write_text("w3 w4")
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", tmp_path / "d.txt", *QUICK)
    assert code == 1
    assert "fewer than a block of 16" in one_line(err)


def test_an_existing_output_is_refused_before_anything_is_read(call, model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", "/no/such.txt", *QUICK)
    assert code == 1
    assert "exists and is not empty" in one_line(err)


def test_a_folder_in_the_place_of_the_run_is_not_deleted(call, model, tmp_path):
    mine = tmp_path / "out.run" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, _, err = call(
        "train", model, "-o", tmp_path / "out", "--data", "/no/such.txt", *QUICK, "--overwrite"
    )
    assert code == 1
    assert "out.run is not a run of dslm train" in one_line(err)
    assert mine.read_text() == "mine"


def test_a_teacher_with_another_tokenizer_is_refused(call, model, data, tmp_path):
    other = pico.save(pico.make_model("llama", "mha"), tmp_path / "other")
    add_tokenizer(other, words=50)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "--teacher", other)
    assert code == 1
    assert "the tokenizers of tiny and its teacher other differ" in one_line(err)


@pytest.mark.parametrize(
    ("package", "options", "line"),
    [
        ("accelerate", [], "pip install 'dslm[train]'"),
        ("peft", ["--lora"], "pip install 'dslm[train]'"),
        ("bitsandbytes", ["--qlora"], "pip install 'dslm[qlora]'"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    package, options, line, call, model, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, *options)
    assert code == 1
    assert line in one_line(err)


def test_too_little_memory_says_what_to_lower(call, model, data, tmp_path, monkeypatch):
    import dslm.train.run

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(dslm.train.run, "_run", full)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK)
    assert code == 1
    assert "the memory is not enough for 2 blocks of 16 tokens at once; checkpoints are kept in" in one_line(
        err
    )
    assert "lower --batch-size or --block-size, or give --gradient-checkpointing" in err


def test_ctrl_c_ends_the_step_and_keeps_the_run(call, model, data, tmp_path, monkeypatch):
    from dslm.train.watch import Watch

    step = Watch.on_step_end

    def pressed(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self._progress = interrupted
        step(self, args, state, control, **kwargs)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_step_end", pressed)
    out = tmp_path / "out"
    code, _, err = call("train", model, "-o", out, "--data", data, *QUICK)
    assert code == 130
    assert "out.run; --resume goes on with it" in err
    assert (tmp_path / "out.run" / "checkpoint-5").is_dir()
    monkeypatch.undo()
    assert call("train", model, "-o", out, "--data", data, *QUICK, "--resume", "-q")[0] == 0
