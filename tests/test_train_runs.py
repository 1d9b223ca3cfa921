"""Runs of ``dslm train`` that are broken off."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import calling
import pico
import training
from calling import one_line
from dslm.errors import DslmError, VerificationError
from dslm.train.arrange import _intervals
from dslm.train.settings import Training, differing_settings
from dslm.train.watch import Watch
from tokenizing import add_tokenizer
from training import QUICK, metrics

model, call, data = calling.model, calling.call, training.data  # fixtures
pytestmark = training.WARNINGS


@pytest.mark.parametrize("mode", ["--full", "--lora"])
def test_a_run_goes_on_after_kill_9(mode, call, model, data, tmp_path):
    options = [*QUICK, "--max-steps", 24, "--eval-every", 4, mode]
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
    seconds = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    file = "model.safetensors" if mode == "--full" else "adapter_model.safetensors"
    ours, theirs = (load_file(place / file) for place in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("every", [4, 8])
def test_a_run_whose_output_could_not_be_written_goes_on_to_the_same_end(every, call, model, data, tmp_path):
    options = [
        "--data",
        data,
        *QUICK,
        "--max-steps",
        8,
        "--eval-every",
        every,
        "--schedule",
        "constant",
        "-q",
    ]
    assert call("train", model, "-o", tmp_path / "whole", *options)[0] == 0
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "dslm.train.run._write", lambda *args, **kwargs: (_ for _ in ()).throw(DslmError("full"))
        )
        assert call("train", model, "-o", out, *options)[0] == 1
    kept = {path.name for path in (tmp_path / "out.run").glob("checkpoint-*/")}
    assert kept == {"checkpoint-4", "checkpoint-8"}
    code, _, err = call("train", model, "-o", out, *options, "--resume")
    assert code == 0, err
    assert metrics(out) == metrics(tmp_path / "whole")
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_broken_loss_stops_the_run_and_keeps_the_last_checkpoint(call, model, data, tmp_path):
    out = tmp_path / "out"
    options = [*QUICK, "--lr", 1e30, "--warmup", 0, "--save-every", 1, "--max-grad-norm", 0, "-q"]
    code, _, err = call("train", model, "-o", out, "--data", data, *options)
    assert code == 1
    point = tmp_path / "out.run" / "checkpoint-1"
    assert f"the gradient's norm is nan at step 2; {point} is the last checkpoint before it" in one_line(err)
    assert "train with a lower --learning-rate, from there, or" in err
    assert not out.exists()
    assert (tmp_path / "out.run" / "loss.png").is_file()
    kept = list((tmp_path / "out.run").glob("checkpoint-*/model.safetensors"))
    assert kept
    for path in kept:
        assert all(math.isfinite(tensor.abs().max()) for tensor in load_file(path).values())


def test_too_little_memory_says_what_goes_on_with_less(call, model, data, tmp_path, monkeypatch):
    from dslm.train.trainer import GroupTrainer

    options = ("--data", data, *QUICK, "-q")
    assert call("train", model, "-o", tmp_path / "whole", *options)[0] == 0
    step, steps = GroupTrainer.training_step, []

    def full(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GroupTrainer, "training_step", full)
    out, run = tmp_path / "out", tmp_path / "out.run"
    code, _, err = call("train", model, "-o", out, *options)
    assert code == 1
    assert f"not enough for 2 blocks of 16 tokens at once; checkpoints are kept in {run}" in one_line(err)
    less = ["--gradient-checkpointing", "--batch-size", 1, "--gradient-accumulation", 2]
    hint = f"give {less[0]} or {' '.join(map(str, less[1:]))}, with which --resume goes on; or lower --block-size"
    assert hint in err
    assert (run / "checkpoint-10").is_dir()
    code, _, err = call("train", model, "-o", out, *options, "--resume", "--batch-size", 1)
    assert (code, "batch_size was 2 and is 1" in one_line(err)) == (1, True)
    code, _, err = call("train", model, "-o", out, *options, "--resume", *less)
    assert code == 0, err
    for ours, theirs in zip(metrics(out), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_what_is_too_large_before_the_run_begins_speaks_of_no_run(call, model, data, tmp_path, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr("dslm.train.run._prepare", full)
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK)
    assert code == 1
    assert "tokens at once; give --gradient-checkpointing or" in one_line(err)
    assert "--resume" not in err


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(call, model, data, tmp_path, monkeypatch):
    from dslm.train.trainer import GroupTrainer

    step, steps = GroupTrainer.training_step, []

    def pressed(self, *args, **options):
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **options)

    monkeypatch.setattr(GroupTrainer, "training_step", pressed)
    out = tmp_path / "out"
    code, _, err = call("train", model, "-o", out, "--data", data, *QUICK)
    assert code == 130
    assert "stopping after this step" in err
    assert "out.run; --resume goes on with it" in err
    assert (tmp_path / "out.run" / "checkpoint-7").is_dir()
    assert (tmp_path / "out.run" / "loss.png").is_file()
    assert len(steps) == 7
    monkeypatch.undo()
    options = ("--data", data, *QUICK, "-q")
    other = tmp_path / "other"
    code, _, err = call("train", tmp_path / "out.run" / "checkpoint-7", "-o", other, *options)
    assert code == 0, err  # a checkpoint is a model by itself
    caches = [json.loads((place / "config.json").read_text())["use_cache"] for place in (model, other)]
    assert caches == [True, True]
    assert not (other / "trainer_state.json").exists()
    assert call("train", model, "-o", out, "--data", data, *QUICK, "--resume", "-q")[0] == 0


def test_ctrl_c_before_a_run_began_promises_none(call, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("dslm.train.run._prepare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = call("train", model, "-o", tmp_path / "out", "--data", data, *QUICK)
    assert (code, err.strip()) == (130, "dslm: interrupted; no unfinished output is left")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_samples_of_text_are_greedy_and_within_the_context(family, call, data, tmp_path):
    """Whatever the model's own settings are; those of the checkpoint stay."""
    own = {"stop_strings": ["w5"], "num_return_sequences": 2, "do_sample": True, "repetition_penalty": 9.0}
    variant = {"llama": "gqa-tied", "opt": "pre-norm"}[family]
    source = pico.save(pico.make_model(family, variant), tmp_path / "source")
    add_tokenizer(source)
    (source / "generation_config.json").write_text(json.dumps(own))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    if family == "opt":  # its table of positions has two more rows
        tensors = load_file(source / "model.safetensors")
        name = next(name for name in tensors if "embed_positions" in name)
        save_file(
            tensors | {name: tensors[name][:34].clone()}, source / "model.safetensors", {"format": "pt"}
        )
    out = tmp_path / "out"
    code, _, err = call("train", source, "-o", out, "--data", data, *QUICK, "--max-steps", 2)
    assert code == 0, err
    said = [line.split(" | ") for line in err.splitlines() if " | " in line]
    assert len(said) == 3
    assert all(len(prompt.split()) == 8 and 1 <= len(text.split()) <= 24 for prompt, text in said)
    assert json.loads((out / "generation_config.json").read_text()) == own


def test_ctrl_c_twice_stops_at_once(tmp_path):
    watch = Watch(tmp_path, True, None, print, None, None)
    before = signal.getsignal(signal.SIGINT)
    with watch.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert watch.interrupted
    assert signal.getsignal(signal.SIGINT) is before


def test_one_of_several_processes_stops_at_once(tmp_path):
    """It alone would wait for the others in the middle of a step that they never take."""
    watch = Watch(tmp_path, False, None, print, None, None)
    with pytest.raises(KeyboardInterrupt), watch.listening():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("key", "word"), [("loss", "loss"), ("eval_loss", "loss"), ("grad_norm", "gradient's norm")]
)
def test_what_is_no_number_is_named(key, word, tmp_path):
    watch = Watch(tmp_path, True, None, print, None, None)
    state = SimpleNamespace(global_step=3, is_world_process_zero=True, num_input_tokens_seen=5)
    with pytest.raises(VerificationError, match=f"the {word} is inf at step 3"):
        watch.on_log(None, state, None, {"loss": 1.0} | {key: math.inf})


@pytest.mark.parametrize("changed", ["weights", "eval_blocks", "teacher_weights"])
def test_a_run_does_not_go_on_with_what_has_changed_under_its_name(changed, call, model, data, tmp_path):
    ours, teacher, other = tmp_path / "ours", tmp_path / "teacher", tmp_path / "other.jsonl"
    for folder in (ours, teacher):
        shutil.copytree(model, folder)
    other.write_text(data.read_text())
    options = ["--data", data, "--eval-data", other, "--teacher", teacher, *QUICK, "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dslm.train.run._run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("train", ours, "-o", tmp_path / "out", *options)[0] == 130
    if changed == "eval_blocks":
        other.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    else:
        place = (ours if changed == "weights" else teacher) / "model.safetensors"
        tensors = load_file(place)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
        save_file(tensors, place, metadata={"format": "pt"})
    code, _, err = call("train", ours, "-o", tmp_path / "out", *options, "--resume")
    assert (code, f"was asked for otherwise: {changed} was" in one_line(err)) == (1, True)


def test_a_run_does_not_go_on_with_another_number_of_processes(call, model, data, tmp_path):
    run = tmp_path / "out.run"
    options = ("train", model, "-o", tmp_path / "out", "--data", data, *QUICK, "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dslm.train.run._run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(*options)[0] == 130
    asked = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(asked | {"processes": 2}))
    code, _, err = call(*options, "--resume")
    assert (code, "processes was 2 and is 1" in err) == (1, True)


@pytest.mark.parametrize(
    ("now", "differing"),
    [
        ({"batch_size": 2, "gradient_accumulation": 2}, set()),
        ({"gradient_checkpointing": True}, set()),
        ({"batch_size": 2}, {"batch_size"}),
        (
            {"batch_size": 2, "gradient_accumulation": 2, "processes": 2},
            {"batch_size", "gradient_accumulation"},
        ),
        (
            {"batch_size": 2, "gradient_accumulation": 2, "lora_dropout": 0.1},
            {"batch_size", "gradient_accumulation"},
        ),
    ],
)
def test_what_is_computed_at_once_may_differ_where_nothing_hangs_on_it(now, differing):
    fixed = {key: now[key] for key in ("processes", "lora_dropout") if key in now}
    before = Training(data=("text",)).as_dict() | {"processes": 1} | fixed
    assert set(differing_settings(before, before | now)) == differing


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 19, 25, 99, 1000])
def test_a_run_evaluates_ten_times_at_most_and_not_much_less_often(steps):
    _, evaluate, _ = _intervals(Training(data=("text",)), steps)
    assert min(steps, 6) <= math.ceil(steps / evaluate) <= 10
