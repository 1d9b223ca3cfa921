"""A shrink that fails says why in one line, leaves nothing behind, and keeps what was there."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.checkpoint.writer import Writer
from dslm.errors import VerificationError
from dslm.plan import plan_shrink
from dslm.shrink import down, rebuild, streams
from dslm.shrink.calibrate import Calibration
from dslm.shrink.weights import Stored
from dslm.sizes import count_parameters
from refusing import nothing_happens, one_line

SIZES = ["--intermediate-size", "30", "--hidden-size", "24", "--num-hidden-layers", "2", "--samples", "8"]
SIZES += ["--sequence-length", "16", "-q"]


@pytest.fixture
def source(tmp_path) -> Path:
    return pico.save(pico.make_model("llama", "mha"), tmp_path / "source")


@pytest.fixture(params=["nothing there", "a model there"])
def out(request, tmp_path) -> Path:
    """A place for the output; an older model that may be replaced may be there."""
    if request.param == "a model there":
        pico.save(pico.make_model("qwen2", "mha"), tmp_path / "out")
    return tmp_path / "out"


def shrink(source: Path, out: Path, progress: Callable | None = None, **options) -> down.Shrunk:
    checkpoint = open_folder(source)
    target = checkpoint.sizes.replace(
        intermediate_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    plan = plan_shrink("tiny", checkpoint.family, checkpoint.config, target, samples=8, length=16, **options)
    return down.shrink_checkpoint(checkpoint, plan, out, overwrite=True, device="cpu", progress=progress)


def refused(capsys, source: Path, out: Path, *options: str) -> str:
    """The one line that the command prints."""
    return one_line(capsys, ["down", str(source), "-o", str(out), *SIZES, *options], 1)


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"],
)
def test_a_weight_that_is_not_a_number_is_named(name, value, source, tmp_path, capsys):
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with nothing_happens(tmp_path):
        line = refused(capsys, source, tmp_path / "out")
    assert f"{name!r} holds NaN or infinite numbers" in line


@pytest.mark.parametrize("command", ["down", "diff"])
@pytest.mark.parametrize(
    "values",
    [
        {"use_cache": None},
        {"rms_norm_eps": "x"},
        {"pad_token_id": 500},
        {"rope_parameters": {"rope_type": "foo"}},
    ],
    ids=str,
)
def test_a_config_that_transformers_refuses_is_told_in_one_line(command, values, source, tmp_path, capsys):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with nothing_happens(tmp_path):
        if command == "down":
            line = refused(capsys, source, tmp_path / "out")
        else:
            line = one_line(capsys, ["diff", str(source), str(source), "-q"], 1)
    assert "unexpected" not in line
    assert "config" in line or "transformers cannot load" in line


def huge_units(model):
    model.model.layers[1].mlp.gate_proj.weight *= 1e20
    model.model.layers[1].mlp.up_proj.weight *= 1e20


def huge_output(model):
    model.model.layers[1].mlp.down_proj.weight *= 2e38


def huge_heads(model):
    model.model.layers[1].self_attn.v_proj.weight *= 1e38
    model.model.layers[1].self_attn.o_proj.weight *= 1e38


def broken(folder: Path, plant: Callable) -> Path:
    """A model of finite weights whose activations are not."""
    model = pico.make_model("llama", "mha")
    with torch.no_grad():
        plant(model)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    return pico.save(model, folder)


@pytest.mark.parametrize("plant", [huge_units, huge_output, huge_heads])
@pytest.mark.parametrize("method", ["reconstruct", "slice"])
def test_activations_that_overflow_are_named(plant, method, tmp_path, monkeypatch):
    source = broken(tmp_path / "broken", plant)
    windows = shrinking.windows()
    text = Calibration(windows.fit, windows.held_out, "a test")
    monkeypatch.setattr(down, "calibration", lambda *arguments, **options: text)
    with (
        nothing_happens(tmp_path),
        pytest.raises(VerificationError, match="block 1 writes is NaN or infinite"),
    ):
        shrink(source, tmp_path / "out", method=method)


def test_an_overflow_on_held_out_tokens_alone_is_named_too(tmp_path):
    def plant(model):
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[3, 0] = 1
        model.model.layers[1].mlp.gate_proj.weight[:, 0] *= 1e30
        model.model.layers[1].mlp.up_proj.weight[:, 0] *= 1e30
        for block in model.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0

    source = open_folder(broken(tmp_path / "broken", plant))
    windows = shrinking.windows()
    windows.fit[windows.fit == 3] = 4
    windows.held_out[:, 7] = 3
    target = source.sizes.replace(intermediate_size=30)
    with pytest.raises(VerificationError, match="block 1 writes is NaN or infinite"):
        rebuild.rebuild(Stored(source), target, (0, 1, 2), None, windows, tmp_path)


def test_a_perplexity_beyond_all_numbers_is_written_as_infinite(tmp_path):
    def plant(model):
        model.lm_head.weight *= 1e4

    done = shrink(broken(tmp_path / "broken", plant), tmp_path / "out", method="slice")
    assert done.losses["held-out"][1] > 1000
    measured = json.loads((tmp_path / "out/dslm.json").read_text())["measured"]
    assert measured["perplexity on the held-out text, after"] == "infinite"


def test_a_model_that_writes_no_numbers_cannot_calibrate_itself(tmp_path, capsys):
    source = broken(tmp_path / "broken", huge_output)
    with nothing_happens(tmp_path):
        assert "logits are not numbers" in refused(capsys, source, tmp_path / "out")


def test_a_number_too_large_for_the_dtype_is_named(out, tmp_path, capsys, monkeypatch):
    """A refitted column can leave the range of float16, which the model to shrink was in."""
    source = pico.save(pico.make_model("llama", "mha").half(), tmp_path / "source")
    read = rebuild.Rebuilt.read
    grown = {"model.norm.weight": 1e5}
    monkeypatch.setattr(rebuild.Rebuilt, "read", lambda found, name: read(found, name) * grown.get(name, 1))
    with nothing_happens(tmp_path):
        line = refused(capsys, source, out, "--refine", "0", *(["--overwrite"] if out.exists() else []))
    assert "'model.norm.weight' has numbers too large for float16, the dtype of the output" in line


# ---------------------------------------------------------------- Ctrl-C

LABELS = [
    "looking for copies", "writing calibration text", "ranking channels", "measuring gradients", "ranking layers",
    "comparing layers", "refining", "shrinking", "writing",
]  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("late", [False, True], ids=["at the start", "at the end"])
def test_ctrl_c_leaves_everything_as_it_was(label, late, out, source, tmp_path):
    def progress(now: str, done: int, total: int) -> None:
        if now == label and (done == total or not late):
            raise KeyboardInterrupt

    with nothing_happens(tmp_path), pytest.raises(KeyboardInterrupt):
        shrink(source, out, progress)


def test_all_steps_are_reported(source, tmp_path):
    seen: dict[str, int] = {}
    shrink(source, tmp_path / "out", lambda label, done, total: seen.update({label: done}))
    middle = [
        label for label in seen if label not in ("refining", "shrinking")
    ]  # which of them first hangs on the gap
    assert middle == LABELS[:6] + LABELS[8:]
    assert set(seen) == set(LABELS)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


# ---------------------------------------------------------------- full disks


def fails(owner: object, name: str, error: Exception) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*arguments, **options):
        raise error

    return lambda monkeypatch: monkeypatch.setattr(owner, name, fail)


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams lie in files, and there is no room for them: written to, they would kill the process."""
    monkeypatch.setattr(streams, "IN_MEMORY", 0)
    fails(os, "posix_fallocate", FULL_DISK)(monkeypatch)


FULL = {
    "a block": fails(rebuild, "save_file", FULL_IN_RUST),
    "a stream": in_files,
    "the output": fails(Writer, "write", FULL_DISK),
    "the sync": fails(os, "fsync", FULL_DISK),
    "the card": fails(Writer, "add_text", FULL_DISK),
}


@pytest.mark.parametrize("fill", FULL.values(), ids=FULL)
def test_a_disk_that_fills_is_one_line_and_leaves_everything_as_it_was(
    fill, out, source, tmp_path, monkeypatch, capsys
):
    fill(monkeypatch)
    with nothing_happens(tmp_path):
        line = refused(capsys, source, out, "--overwrite")
    assert "No space left on device" in line
    assert line.endswith("free some space and try again")


def test_a_disk_without_room_for_the_streams_between_blocks_is_one_line(
    source, tmp_path, monkeypatch, capsys
):
    """They go to a file first where heads are chosen, however much memory there is."""
    fails(os, "posix_fallocate", FULL_DISK)(monkeypatch)
    with nothing_happens(tmp_path):
        heads = ["--num-attention-heads", "2", "--num-key-value-heads", "2"]
        line = refused(capsys, source, tmp_path / "out", *heads)
    assert "No space left on device" in line
    assert line.endswith("free some space and try again")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow past so many bytes: a disk that is full, as the kernel tells it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("in_memory", [True, False], ids=["a block", "a stream"])
def test_what_the_kernel_refuses_is_one_line_too(in_memory, source, tmp_path, monkeypatch, capsys):
    if not in_memory:
        monkeypatch.setattr(streams, "IN_MEMORY", 0)
    with nothing_happens(tmp_path), small_files(9_000):
        line = refused(capsys, source, tmp_path / "out")
    assert "File too large" in line


def test_too_little_disk_is_seen_before_anything_is_done(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 1000))
    monkeypatch.setattr(down, "exact_stage", None)
    with nothing_happens(tmp_path):
        assert "not enough disk" in refused(capsys, source, tmp_path / "out")


def test_room_for_what_lies_beside_the_output_is_asked_for_too(source, tmp_path, monkeypatch, capsys):
    """The output is float32 here as well, so half of what is free would be just enough for it alone."""
    checkpoint = open_folder(source)
    target = checkpoint.sizes.replace(intermediate_size=30, hidden_size=24, num_hidden_layers=2)
    config = target.into_config(checkpoint.family, checkpoint.config)
    room = 4 * count_parameters(checkpoint.family, config)["total"] + 2000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, room))
    monkeypatch.setattr(down, "calibration", None)
    with nothing_happens(tmp_path):
        assert "not enough disk" in refused(capsys, source, tmp_path / "out")


def test_a_failure_leaves_no_new_folders_above_the_output(source, tmp_path, monkeypatch):
    out = tmp_path / "a" / "b" / "out"
    with monkeypatch.context() as patched:
        FULL["the output"](patched)
        with nothing_happens(tmp_path), pytest.raises(OSError, match="No space"):
            shrink(source, out)
    assert shrink(source, out).folder.is_dir()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"out"}


# ---------------------------------------------------------------- places and sources


def quantise(source: Path) -> None:
    config = pico.read_config(source) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))


def quantise_a_tensor(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


PLACES = {
    "exists": ("old", lambda source: pico.save(pico.make_model("qwen2", "mha"), source.parent / "old"), "not empty"),
    "a file": ("old", lambda source: (source.parent / "old").write_text("kept"), "is a file"),
    "the source": ("source", lambda source: None, "touch the source"),
    "inside the source": ("source/out", lambda source: None, "touch the source"),
    "above the source": (".", lambda source: None, "touch the source"),
    "quantised": ("out", quantise, "quantised"),
    "a quantised tensor": ("out", quantise_a_tensor, "quantised"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "prepare", "message"), PLACES.values(), ids=PLACES)
def test_a_place_or_a_source_that_will_not_do_is_refused(place, prepare, message, source, tmp_path, capsys):
    prepare(source)
    with nothing_happens(tmp_path):
        assert message in refused(capsys, source, tmp_path / place)


def test_overwriting_replaces_the_old_model_when_all_went_well(source, tmp_path):
    pico.save(pico.make_model("qwen2", "mha"), tmp_path / "out")
    assert open_folder(shrink(source, tmp_path / "out").folder).family.name == "llama"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}
