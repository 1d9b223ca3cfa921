"""A model or a place that will not do: one line says why, nothing is left behind, and what was there is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import failing
import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import VerificationError
from dslm.shrink import down, rebuild
from dslm.shrink.calibrate import Calibration
from dslm.shrink.weights import Stored
from failing import refused, shrink
from refusing import nothing_happens, one_line

source, out = failing.source, failing.out  # fixtures

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


def huge_head(model):
    model.lm_head.weight *= 1e38


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (huge_units, "what block 1 writes is NaN or infinite"),
        (huge_output, "what block 1 writes is NaN or infinite"),
        (huge_head, "the model's logits are not numbers; get its weights again"),
    ],
)
def test_a_model_that_writes_no_numbers_cannot_calibrate_itself(plant, told, tmp_path, capsys):
    source = broken(tmp_path / "broken", plant)
    with nothing_happens(tmp_path):
        assert told in refused(capsys, source, tmp_path / "out")


def test_a_model_that_writes_no_numbers_in_its_own_dtype_needs_a_text(tmp_path, capsys):
    model = pico.make_model("llama", "mha")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 3e4
    source = pico.save(model.half(), tmp_path / "source")
    with nothing_happens(tmp_path):
        line = refused(capsys, source, tmp_path / "out")
    assert "logits are not numbers in its dtype, and are in float32; give --calibration TEXT" in line


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("transformers.AutoModelForCausalLM.from_pretrained", "to load source"),
        ("dslm.shrink.written.write", "for the model to write its calibration text"),
    ],
)
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")], ids=repr)
def test_too_little_memory_to_write_a_text_says_to_give_one(
    place, what, error, source, tmp_path, tmp_path_factory, capsys, monkeypatch
):
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path_factory.mktemp("cache")))  # in which it has written nothing

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(place, full)
    with nothing_happens(tmp_path):
        line = refused(capsys, source, tmp_path / "out")
    assert f"the memory is not enough {what}; give --calibration TEXT, which is read block by block" in line


def test_a_number_too_large_for_the_dtype_is_named(out, tmp_path, capsys, monkeypatch):
    """A refitted column can leave the range of float16, which the model to shrink was in."""
    source = pico.save(pico.make_model("llama", "mha").half(), tmp_path / "source")
    read = rebuild.Rebuilt.read
    grown = {"model.norm.weight": 1e5}
    monkeypatch.setattr(rebuild.Rebuilt, "read", lambda found, name: read(found, name) * grown.get(name, 1))
    with nothing_happens(tmp_path):
        line = refused(capsys, source, out, "--refine", "0", *(["--overwrite"] if out.exists() else []))
    assert "'model.norm.weight' has numbers too large for float16, the dtype of the output" in line


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
