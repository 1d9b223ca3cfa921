"""What an output folder holds: plain checkpoints that stock readers load, the same bytes every time, little memory."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
from dslm.plan import plan_growth
from dslm.resizing import resize

SMALL_FILES = {
    "tokenizer.json": b'{"version": "1.0",  "odd   spacing": true}\r\n',
    "tokenizer_config.json": b'{"b": 1, "a": 2}',
    "tokenizer.model": bytes(range(256)),
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\na b\n",
    "special_tokens_map.json": b"{}\n",
    "chat_template.jinja": "{{ 'naïve' }}".encode(),
    "generation_config.json": b'{"eos_token_id": [2, 5], "temperature": 0.7, "_from_model_config": false}',
    "LICENSE": b"Apache License\r\n",
    "USE_POLICY.md": b"be kind",
    "NOTICE.txt": b"",
}
NOT_COPIED = {
    "modeling_evil.py": b"raise SystemExit",
    "configuration_evil.PY": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04",
    "optimizer.pt": b"\x80\x04",
    "model.gguf": b"GGUF",
    "tf_model.h5": b"",
    "flax_model.msgpack": b"",
    "model.onnx": b"",
    ".gitattributes": b"*.bin filter=lfs",
    "pytorch_model.bin.index.json": b"{}",
    "old.safetensors.index.json": b"{}",
}


def make_source(folder: Path, family: str = "llama", variant: str = "gqa-tied", **options) -> Path:
    return pico.save(pico.make_model(family, variant, **options), folder)


def grow(source: Path, out: Path, **options) -> Path:
    """Double every width that the method can grow."""
    checkpoint = open_folder(source, name="tiny")
    sizes = checkpoint.sizes
    target = sizes.replace(intermediate_size=2 * sizes.intermediate_size)
    if options.get("method") != "net2net":
        target = target.replace(
            hidden_size=2 * sizes.hidden_size,
            num_attention_heads=2 * sizes.num_attention_heads,
            num_key_value_heads=2 * sizes.num_key_value_heads,
        )
    plan = plan_growth("tiny", checkpoint.family, checkpoint.config, target, **options)
    return resize(checkpoint, plan, out).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


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


# ---------------------------------------------------------------- the small files


def test_small_files_are_copied_byte_for_byte_and_code_is_not(tmp_path):
    source = make_source(tmp_path / "tiny")
    for name, raw in (SMALL_FILES | NOT_COPIED).items():
        (source / name).write_bytes(raw)
    (source / "onnx").mkdir()
    (source / "onnx" / "model.json").write_text("{}")
    out = grow(source, tmp_path / "out")
    found = contents(out)
    assert {n: found.get(n) for n in SMALL_FILES} == SMALL_FILES
    assert set(found) == set(SMALL_FILES) | {"README.md", "config.json", "dslm.json", "model.safetensors"}


def test_a_source_of_links_gives_an_output_of_files(tmp_path):
    """The hub's cache is a folder of links into a folder of blobs."""
    real = make_source(tmp_path / "blobs")
    (real / "tokenizer.json").write_text("{}")
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in real.iterdir():
        (source / path.name).symlink_to(path)
    out = grow(source, tmp_path / "out")
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not [p for p in out.iterdir() if p.is_symlink()]
    shutil.rmtree(real)
    assert open_folder(out).sizes.hidden_size == 64


def test_the_config_keeps_its_keys_and_their_order(tmp_path):
    source = make_source(tmp_path / "tiny")
    config = {
        "rope_theta": 12345.0,
        "zeta": None,
        "_name_or_path": "Some/Where — else",
        **{k: v for k, v in read_config(source).items() if k != "rope_parameters"},
        "rms_norm_eps": 1e-05,
        "eos_token_id": [2, 3],
        "torch_dtype": "float32",
    }
    (source / "config.json").write_text(json.dumps(config))
    written = read_config(grow(source, tmp_path / "out"))
    assert list(written) == list(config)
    changed = {key for key in config if config[key] != written[key]}
    assert changed == {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
    assert "—" in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


CARDS = [
    b"no front matter", b"---\nlicense: mit\n---\n# x", b"---\n: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"",
]  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_written_whatever_the_source_has(card, tmp_path):
    source = make_source(tmp_path / "tiny")
    (source / "README.md").write_bytes(card)
    text = (grow(source, tmp_path / "out") / "README.md").read_text()
    assert text.startswith("---\n")
    assert ("license: mit" in text) == (b"license: mit" in card)
    assert "dslm up tiny --hidden-size 64" in text


def test_the_record_holds_the_plan_and_exact_counts(tmp_path):
    source = make_source(tmp_path / "tiny")
    out = grow(source, tmp_path / "out", seed=3, method="net2net")
    record = json.loads((out / "dslm.json").read_text())
    assert record["plan"]["seed"] == 3
    assert record["plan"]["target"]["intermediate_size"] == 96
    assert set(record["plan"]["methods"].values()) == {"net2net"}
    counts = [sum(t.numel() for t in load_file(f / "model.safetensors").values()) for f in (source, out)]
    assert [record["parameters"]["before"], record["parameters"]["after"]] == counts
    assert str(tmp_path) not in json.dumps(record), "a place on this machine is nobody's business"
    assert str(tmp_path) not in (out / "README.md").read_text()


# ---------------------------------------------------------------- memory

MEASURE = """
import json, resource, sys
from pathlib import Path

import torch, transformers  # both belong to the baseline
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dslm.checkpoint.reader import open_folder
from dslm.families import load_family
from dslm.plan import plan_growth
from dslm.resizing import resize


def sparse_source(folder, vocab, layers):
    config = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers,
              "num_attention_heads": 8, "vocab_size": vocab, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, position = {}, 0
    for tensor in load_family("llama").layout(config).values():
        stop = position + 2 * torch.Size(tensor.shape).numel()
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return position


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def grow(place, vocab, layers):
    nbytes = sparse_source(place, vocab, layers)
    source = open_folder(place)
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
    target = source.sizes.replace(hidden_size=768, intermediate_size=2560, **heads)
    resize(source, plan_growth("m", source.family, source.config, target), place.with_name(place.name + "-out"))
    return nbytes


place = Path(sys.argv[1])
torch.set_num_threads(1)
grow(place / "warm", 64, 1)
base = peak()
small = grow(place / "small", 32_000, 2)
after_small = peak()
large = grow(place / "large", 131_072, 8)
print(json.dumps({"base": base, "small": small, "after_small": after_small, "large": large, "after_large": peak()}))
"""


def test_memory_is_a_few_pieces_of_a_tensor_whatever_the_model(tmp_path):
    """With glibc told to give every freed piece back, what is left is what the code holds on to."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["large"] > 200e6 > 4 * measured["small"]
    assert measured["after_large"] - measured["base"] < 150e6, measured
    assert measured["after_large"] - measured["after_small"] < 20e6, measured


# ---------------------------------------------------------------- the check beside the stream


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the check comes first")
def test_the_check_in_its_own_process_refuses_like_the_one_in_ours(tmp_path):
    """Without transformers imported, a forked process checks, and what it says stops the output."""
    source = make_source(tmp_path / "source")
    code = """
import sys
from pathlib import Path
import dslm.checkpoint.oracle as oracle
from dslm.checkpoint.reader import open_folder
from dslm.errors import CheckpointError
from dslm.plan import plan_growth
from dslm.resizing import resize

source, out, lie = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "lie"
checkpoint = open_folder(source)
target = checkpoint.sizes.replace(intermediate_size=96)
expected = oracle.expected_shapes
if lie:
    oracle.expected_shapes = lambda config: expected(config) | {"extra": (1,)}
try:
    resize(checkpoint, plan_growth("tiny", checkpoint.family, checkpoint.config, target), out)
    print("written")
except CheckpointError as error:
    print(error)
print("transformers" in sys.modules)
"""
    for lie, said in (("no", "written"), ("lie", "'extra' is None here and (1,) in transformers")):
        out = tmp_path / lie
        command = [sys.executable, "-c", code, str(source), str(out), lie]
        first, imported = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert first.startswith(said)
        assert imported == "False", "this process must not have paid for the import"
        assert out.exists() is (lie == "no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no", "source"]
