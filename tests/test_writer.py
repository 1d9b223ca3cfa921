"""What an output folder holds: plain checkpoints that stock readers load, and the same bytes every time."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dslm.output
import pico
from dslm.checkpoint.headers import ITEMSIZE, read_header
from dslm.checkpoint.reader import open_folder
from dslm.checkpoint.writer import INDEX, Planned, Writer
from dslm.families import family_of
from writing import contents, grow, make_source, read_config

# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_shards_are_what_stock_readers_expect(shard_bytes, tmp_path, monkeypatch):
    source = make_source(tmp_path / "tiny")
    whole = load_file(grow(source, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(dslm.output, "Writer", functools.partial(Writer, shard_bytes=shard_bytes))
    out = grow(source, tmp_path / "out")
    files = sorted(out.glob("*.safetensors"))
    if shard_bytes > 10**6:
        assert [f.name for f in files] == ["model.safetensors"]
        assert not (out / INDEX).exists()
    else:
        count = len(files)
        assert count == len(whole) if shard_bytes == 1 else 3 < count < len(whole)
        assert [f.name for f in files] == [
            f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
        ]
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
        assert set(index["weight_map"]) == set(whole)
        assert set(index["weight_map"].values()) == {f.name for f in files}
        for name, file in index["weight_map"].items():
            with safe_open(out / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                assert torch.equal(opened.get_tensor(name), whole[name])
        for file in files:
            held = load_file(file)
            assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    original = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        off = (model(pico.tokens()).logits - original(pico.tokens()).logits).abs().max()
    assert off < 1e-4
    assert open_folder(out).nbytes == sum(t.nbytes for t in whole.values())


@pytest.mark.parametrize(
    ("family", "variant"), [("gpt_neox", "tied-full-rotary"), ("phi", "tied"), ("gemma", "mqa")]
)
def test_a_tied_table_is_written_once(family, variant, tmp_path):
    source = make_source(tmp_path / "tiny", family, variant)
    out = grow(source, tmp_path / "out")
    held = load_file(out / "model.safetensors")
    assert family_of(read_config(out)).head not in held
    assert load_file(source / "model.safetensors").keys() == held.keys()
    assert read_config(out).get("tie_word_embeddings", True)


# ---------------------------------------------------------------- bytes


MIXED = {"norm": torch.float32, "embed": torch.float64, "q_proj": torch.float16}


def test_every_tensor_keeps_its_dtype_and_lies_aligned(tmp_path):
    source = make_source(tmp_path / "tiny", "llama", "biases", dtype=torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    mixed = {
        n: t.to(next((d for part, d in MIXED.items() if part in n), torch.bfloat16))
        for n, t in weights.items()
    }
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    assert len({t.dtype for t in mixed.values()}) == 4
    out = grow(source, tmp_path / "out")
    raw = (out / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    for entry in read_header(out / "model.safetensors").values():
        assert entry.start % ITEMSIZE[entry.dtype] == 0, entry
    grown = load_file(out / "model.safetensors")
    assert {n: t.dtype for n, t in grown.items()} == {n: t.dtype for n, t in mixed.items()}


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_another_dtype_is_written_and_named(dtype, tmp_path):
    source = make_source(tmp_path / "tiny")
    out = grow(source, tmp_path / "out", dtype=dtype)
    assert {e.dtype for e in read_header(out / "model.safetensors").values()} == {dtype}
    name = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    assert read_config(out)["dtype"] == name
    assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == f"torch.{name}"


def test_the_writer_alone_writes_odd_shapes_and_names(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "naïve.ü": torch.randn(7, generator=generator, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "one": torch.randn(1, generator=generator).to(torch.float16),
        "cube": torch.randn(2, 3, 4, generator=generator),
    }
    codes = {torch.bfloat16: "BF16", torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
    planned = [Planned(n, codes[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    with Writer(tmp_path / "out", planned) as writer:
        for path, group in writer.order:
            writer.start_shard(path, group)
            for tensor in group:
                writer.write(tensor, tensors[tensor.name].split(2) if tensor.name != "empty" else [])
        writer.seal()
        writer.publish()
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for entry in read_header(tmp_path / "out" / "model.safetensors").values():
        assert entry.start % ITEMSIZE[entry.dtype] == 0, entry
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tensor_that_is_not_whole_is_never_published(tmp_path):
    def write_half() -> None:
        with Writer(tmp_path / "out", [Planned("half", "F32", (4,))]) as writer:
            writer.start_shard(*writer.order[0])
            writer.write(writer.order[0][1][0], [torch.zeros(2)])

    with pytest.raises(AssertionError, match="half"):
        write_half()
    assert not list(tmp_path.iterdir())


PLANS = [
    {"method": "hypercloning", "split": "uneven"},
    {"method": "hypercloning", "snr_db": 10.0},
    {"method": "net2net", "split": "uneven"},
    {"method": "padding"},
]


@pytest.mark.parametrize("options", PLANS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_same_plan_gives_the_same_bytes_and_another_seed_others(options, tmp_path):
    source = make_source(tmp_path / "tiny", "llama", "biases")
    outs = [grow(source, tmp_path / f"{i}" / "out", seed=seed, **options) for i, seed in enumerate((5, 5, 6))]
    first, second, other = map(contents, outs)
    assert first == second
    assert sorted(first) == sorted(other)
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["config.json"] == other["config.json"]
