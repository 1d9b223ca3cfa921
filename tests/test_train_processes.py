"""Training in several processes: the loss curve is that of one process with the whole batch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import calling
import training
from dslm.train.runs import last_checkpoint
from training import QUICK, metrics

model, call, data = calling.model, calling.call, training.data  # fixtures
pytestmark = training.WARNINGS
OPTIONS = [*QUICK[:2], *QUICK[4:], "--max-steps", 8, "--eval-every", 4]
AS_MODULE = ["-m", "dslm.cli.main"]
ON_FSDP = [Path(__file__).with_name("fsdp_on_cpu.py")]
ON_DEEPSPEED = [Path(__file__).with_name("deepspeed_on_cpu.py")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(count: int, launching: list, arguments: list, *, code: int = 0) -> tuple[str, str]:
    """Run so many launchers with a command each, and wait; stdout and stderr of all. Each ends with the code."""
    command = [sys.executable, "-m", "torch.distributed.run", *launching, *arguments]
    running = [
        subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(count)
    ]
    try:
        said = [one.communicate(timeout=300) for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [code] * count, said
    return "".join(out for out, _ in said), "".join(err for _, err in said)


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_learn_as_one(call, model, data, tmp_path, nodes):
    whole, out = tmp_path / "one", tmp_path / "two"
    assert call("train", model, "-o", whole, "--data", data, *OPTIONS, "--batch-size", 4)[0] == 0
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "test"]
    meeting += ["--local-addr", "localhost"]
    launching = ["--nnodes", nodes, "--nproc-per-node", 2 // nodes, *meeting]
    train = ["train", model, "-o", out, "--data", data, *OPTIONS, "--batch-size", 2]
    stdout, stderr = launch(nodes, launching, [*AS_MODULE, *train])
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert stdout.count("written to") == 1
    assert stderr.count(" | ") == 3  # a sample of text at the start and at each evaluation


def test_a_grown_model_cut_up_over_processes_learns_from_its_source_as_whole(call, model, data, tmp_path):
    whole, out, grown = tmp_path / "one", tmp_path / "two", model.parent / "grown"
    assert call("up", model, "-o", grown, "-edm", 2, "-upm", 2)[0] == 0
    options = [*OPTIONS, "--recipe", "growth", "--teacher", "source", "-q"]
    assert call("train", grown, "-o", whole, "--data", data, *options, "--batch-size", 4)[0] == 0
    train = ["train", grown, "-o", out, "--data", data, *options, "--batch-size", 2]
    stdout, stderr = launch(1, ["--nproc-per-node", 2, "--master-port", free_port()], [*ON_FSDP, *train])
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert stdout.count("written to") == 1
    assert stderr.count("LlamaDecoderLayer") == 2 * 3  # what FSDP cut up, of each process
    code, said, _ = call("diff", whole, out, "--max-kl", 1e-6)
    assert code == 0, said


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_learns_from_the_source_as_one_process(stage, call, model, data, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")  # it is built on each machine, so it is not among what tests install
    whole, out, grown = tmp_path / "one", tmp_path / "two", tmp_path / "grown"
    assert call("up", model, "-o", grown, "-edm", 2, "-upm", 2)[0] == 0
    options = [*OPTIONS, "--recipe", "growth", "--teacher", model, "-q"]
    assert call("train", grown, "-o", whole, "--data", data, *options, "--batch-size", 4)[0] == 0
    train = ["train", grown, "-o", out, "--data", data, *options, "--batch-size", 2]
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    launch(1, ["--nproc-per-node", 2, "--master-port", free_port()], [*ON_DEEPSPEED, *train])
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    code, said, _ = call("diff", whole, out, "--max-kl", 1e-6)
    assert code == 0, said


@pytest.mark.parametrize(
    "module", [AS_MODULE, ON_FSDP, ON_DEEPSPEED], ids=["replicas", "cut up", "deepspeed"]
)
def test_two_processes_go_on_after_kill_9(call, model, data, tmp_path, monkeypatch, module):
    if module is ON_DEEPSPEED:
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    whole, out, run = tmp_path / "one", tmp_path / "two", tmp_path / "two.run"
    options = [*OPTIONS, "--max-steps", 30, "--eval-every", 5, "-q"]
    assert call("train", model, "-o", whole, "--data", data, *options, "--batch-size", 4)[0] == 0
    train = ["train", model, "-o", out, "--data", data, *options, "--batch-size", 2]
    broken_off = threading.Thread(
        target=launch,
        args=(1, ["--nproc-per-node", 2, "--master-port", free_port()], [*module, *train]),
        kwargs={"code": 1},
    )
    broken_off.start()
    while not (run / "checkpoint-10" / "trainer_state.json").exists() and broken_off.is_alive():
        time.sleep(0.005)
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(out) in line and "torch.distributed.run" not in line:
            process.kill()
    broken_off.join()
    assert not out.exists(), "it was too fast to be killed"
    assert last_checkpoint(run, 30)
    launch(1, ["--nproc-per-node", 2, "--master-port", free_port()], [*module, *train, "--resume"])
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("module", [AS_MODULE, ON_FSDP], ids=["replicas", "cut up"])
def test_two_processes_write_an_adapter_and_merge_it(call, model, data, tmp_path, module):
    whole, out = tmp_path / "one", tmp_path / "two"
    options = [*OPTIONS, "--lora", "--lora-r", 4, "--merge", "-q"]
    assert call("train", model, "-o", whole, "--data", data, *options, "--batch-size", 4)[0] == 0
    train = ["train", model, "-o", out, "--data", data, *options, "--batch-size", 2]
    launch(1, ["--nproc-per-node", 2, "--master-port", free_port()], [*module, *train])
    code, said, _ = call("diff", whole, out, "--max-kl", 1e-6)
    assert code == 0, said
    ours, theirs = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (out, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_of_two_processes_one_says_why_a_run_is_refused(model, data, tmp_path):
    train = ["train", model, "-o", tmp_path / "out", "--data", data, *OPTIONS, "--resume"]
    launching = ["--nproc-per-node", 2, "--master-port", free_port()]
    _, err = launch(1, launching, [*AS_MODULE, *train], code=1)
    assert re.findall("^dslm: .*", err, re.MULTILINE) == [
        f"dslm: error: there is no unfinished run in {tmp_path / 'out.run'}; leave out --resume to start one"
    ]
