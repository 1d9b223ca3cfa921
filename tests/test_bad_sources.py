"""Sources that are damaged, not there, or change while they are read: one clear line, no output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import refusing
from dslm.checkpoint.reader import open_folder
from dslm.errors import CheckpointError, DslmError
from dslm.resizing import resize
from refusing import doubled, grow, nothing_happens, one_line

NORM = "model.norm.weight"

original, source = refusing.original, refusing.source  # fixtures

# ---------------------------------------------------------------- damaged sources


def edit_config(**keys) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw) and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(length: int) -> Callable[[Path], None]:
    """Shorten the weights to so many bytes, or by so many if negative."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        path.write_bytes(raw[:length])

    return change


def lie(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the header of the weights and leave the data as it is."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return change


def header_is(text: bytes) -> Callable[[Path], None]:
    return write("model.safetensors", len(text).to_bytes(8, "little") + text)


def set_entry(**keys) -> Callable[[Path], None]:
    return lie(lambda header: header[NORM].update(keys))


def _overlap(header: dict) -> None:
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    same = next(n for n in names[1:] if header[n]["shape"] == header[names[1]]["shape"] and n != names[1])
    header[same]["data_offsets"] = header[names[1]]["data_offsets"]


def _hole(header: dict) -> None:
    del header[NORM]


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Write other weights, with a header that tells the truth."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = {k: v.clone() for k, v in load_file(path).items()}
        edit(found)
        save_file(found, path, metadata={"format": "pt"})

    return change


def split_up(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Two shards and an index, with ``edit`` applied to the index."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = load_file(path)
        names = sorted(found)
        index = {"metadata": {}, "weight_map": {}}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file({n: found[n].clone() for n in part}, folder / file, metadata={"format": "pt"})
            index["weight_map"] |= dict.fromkeys(part, file)
        path.unlink()
        edit(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def mapped(to: object) -> Callable[[Path], None]:
    return split_up(lambda index: index["weight_map"].update({NORM: to}))


def _swap(index: dict) -> None:
    files = set(index["weight_map"].values())
    index["weight_map"][NORM] = (files - {index["weight_map"][NORM]}).pop()


def as_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({NORM: found[NORM].to(dtype)}))


_LAYER = "model.layers.0.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "no config.json"),
    "no weights": (remove("model.safetensors"), "no safetensors weights"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()] and None, "no config.json"),
    "config: not JSON": (write("config.json", "{model"), "not valid JSON"),
    "config: a list": (write("config.json", "[]"), "not a JSON object"),
    "config: empty": (write("config.json", ""), "not valid JSON"),
    "config: binary": (write("config.json", b"\xff\xfe\x01"), "not valid JSON"),
    "config: too deep": (write("config.json", "[" * 100_000), r"config\.json"),
    "config: no model_type": (edit_config(model_type=None), "model_type"),
    "unknown family": (edit_config(model_type="mamba"), "'mamba'.*supported"),
    "unknown key": (edit_config(residual_multiplier=0.5), "residual_multiplier"),
    "wrong architecture": (
        edit_config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification",
    ),
    "architectures: not a list": (edit_config(architectures=7), "architectures"),
    "quantised: config": (edit_config(quantization_config={"bits": 4}), "quantised.*quantization_config"),
    "quantised: I8": (as_dtype(torch.int8), f"quantised.*{NORM}.*I8"),
    "quantised: U8": (as_dtype(torch.uint8), f"quantised.*{NORM}.*U8"),
    "quantised: F8": (as_dtype(torch.float8_e4m3fn), f"quantised.*{NORM}.*F8"),
    "sizes: zero": (edit_config(num_attention_heads=0), "num_attention_heads"),
    "sizes: a word": (edit_config(hidden_size="32"), "hidden_size"),
    "sizes: a list": (edit_config(vocab_size=[96]), "vocab_size"),
    "sizes: a fraction": (edit_config(intermediate_size=48.0), "intermediate_size"),
    "mismatch: hidden": (edit_config(hidden_size=64), r"shape.*\[.*config implies"),
    "mismatch: vocab": (edit_config(vocab_size=97), r"embed_tokens.*\[96, 32\].*\[97, 32\]"),
    "mismatch: more layers": (edit_config(num_hidden_layers=4), "lacks 'model.layers.3"),
    "mismatch: fewer layers": (edit_config(num_hidden_layers=2), "model.layers.2"),
    "mismatch: untied": (edit_config(tie_word_embeddings=False), "lm_head.weight"),
    "mismatch: biases": (edit_config(attention_bias=True), "q_proj.bias"),
    "unknown tensor": (tensors(lambda t: t.update({"model.layers.0.adapter.weight": torch.ones(3)})), "adapter"),
    "missing tensor": (tensors(lambda t: t.pop(_LAYER)), f"lacks '{_LAYER}'"),
    "wrong shape": (tensors(lambda t: t.update({NORM: torch.ones(31)})), rf"{NORM}.*\[31\].*\[32\]"),
    "transposed": (tensors(lambda t: t.update({_LAYER: torch.ones(16, 64)})), rf"{_LAYER}.*\[16, 64\]"),
    "NaN": (tensors(lambda t: t[_LAYER].fill_(float("nan"))), f"{_LAYER}.*NaN"),
    "infinite": (tensors(lambda t: t[NORM][3:4].fill_(float("-inf"))), f"{NORM}.*infinite"),
    "truncated: last byte": (cut(-1), "damaged.*truncated"),
    "truncated: half": (cut(50_000), "damaged.*truncated"),
    "truncated: in the header": (cut(100), "damaged.*header"),
    "truncated: in the length": (cut(7), "damaged"),
    "truncated: nothing left": (cut(0), "damaged"),
    "a byte too many": (lambda f: (f / "model.safetensors").open("ab").write(b"\0") and None, "damaged.*1 bytes"),
    "header: huge length": (write("model.safetensors", b"\xff" * 8 + b"{}"), "damaged.*header claims"),
    "header: not JSON": (header_is(b"hello"), "damaged.*not JSON"),
    "header: not text": (header_is(b"\xff\xfe\x80\x80"), "damaged.*not JSON"),
    "header: a list": (header_is(b"[1, 2]"), "damaged.*JSON object"),
    "header: too deep": (header_is(b"[" * 100_000), "damaged"),
    "header: no tensors": (header_is(b"{}"), "lacks"),
    "header: overlap": (lie(_overlap), "damaged.*overlaps"),
    "header: hole": (lie(_hole), "damaged.*(hole|no tensor)"),
    "header: negative": (set_entry(data_offsets=[-128, 0]), f"damaged.*{NORM}"),
    "header: backwards": (set_entry(data_offsets=[128, 0]), f"damaged.*{NORM}"),
    "header: beyond the end": (set_entry(data_offsets=[10**15, 10**15 + 128]), "damaged"),
    "header: three offsets": (set_entry(data_offsets=[0, 64, 128]), f"damaged.*{NORM}"),
    "header: no offsets": (set_entry(data_offsets=None), f"damaged.*{NORM}"),
    "header: fractional offsets": (set_entry(data_offsets=[0.0, 128.0]), f"damaged.*{NORM}"),
    "header: shape": (set_entry(shape=[33]), rf"damaged.*{NORM}.*\[33\]"),
    "header: negative shape": (set_entry(shape=[-4, -8]), f"damaged.*{NORM}"),
    "header: shape a word": (set_entry(shape="32"), f"damaged.*{NORM}"),
    "header: shape a number": (set_entry(shape=32), f"damaged.*{NORM}"),
    "header: dtype": (set_entry(dtype="F31"), f"{NORM}.*'F31'"),
    "header: dtype a list": (set_entry(dtype=["F32"]), NORM),
    "header: dtype nothing": (set_entry(dtype=None), NORM),
    "header: an entry of text": (lie(lambda h: h.update({NORM: "F32"})), f"damaged.*{NORM}"),
    "header: an entry of nothing": (lie(lambda h: h.update({NORM: None})), f"damaged.*{NORM}"),
    "index: missing shard": (mapped("model-00003-of-00002.safetensors"), "missing.*model-00003"),
    "index: above": (mapped("../tiny2/model.safetensors"), r"outside.*\.\./tiny2"),
    "index: absolute": (mapped("/etc/passwd"), "outside.*/etc/passwd"),
    "index: below": (mapped("sub/model.safetensors"), "outside.*sub/model"),
    "index: dots": (mapped(".."), "outside"),
    "index: nothing": (mapped(""), "outside"),
    "index: a number": (mapped(3), "weight_map"),
    "index: not in that file": (split_up(_swap), f"{NORM}"),
    "index: not a map": (split_up(lambda i: i.update(weight_map=[])), "weight_map"),
    "index: no map": (split_up(lambda i: i.pop("weight_map")), "weight_map"),
    "index: empty": (split_up(lambda i: i.update(weight_map={})), "safetensors|lacks"),
    "index: invented tensor": (
        split_up(lambda i: i["weight_map"].update({"x": "model-00001-of-00002.safetensors"})),
        "'x'",
    ),
    "index: not JSON": (write("model.safetensors.index.json", "{"), "index.json is not valid JSON"),
    "no index": (
        lambda f: shutil.copy((f / "model.safetensors").rename(f / "a.safetensors"), f / "b.safetensors") and None,
        "2 safetensors files",
    ),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin") and None, "pickled"),
    "weights: a folder": (
        lambda f: (f / "model.safetensors").unlink() or (f / "model.safetensors").mkdir(),
        "no safetensors weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_source_is_refused(damage, named, source, tmp_path, capsys):
    damage(source)
    with nothing_happens(tmp_path), pytest.raises(DslmError, match=f"(?s){named}") as caught:
        grow(source, tmp_path / "out")
    assert caught.value.message
    assert caught.value.hint, "an error says what to do"
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["up", str(source), "-o", str(tmp_path / "out"), "-edm", "2"], 1)
    assert caught.value.message.splitlines()[0][:40] in line


@pytest.mark.parametrize("model", ["absent", "./absent", "file", "absent.gguf", "a/b/c"])
def test_a_source_that_is_not_there_is_named(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("hello")
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["up", model, "-o", "out", "-edm", "2"], 1)
    assert Path(model).name in line


def test_a_second_layout_of_the_weights_is_passed_over_but_never_guessed(source):
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    assert {entry.file.name for entry in open_folder(source).entries.values()} == {"model.safetensors"}
    (source / "model.safetensors").rename(source / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        open_folder(source)


# ---------------------------------------------------------------- sources that change


@pytest.mark.parametrize("keep", [0, 20_000])
def test_a_source_that_is_cut_while_it_is_read_is_noticed(keep, source, tmp_path):
    def cut_it(label: str, done: int, total: int) -> None:
        os.truncate(source / "model.safetensors", keep)

    with pytest.raises(CheckpointError, match=r"model\.safetensors ended") as caught:
        grow(source, tmp_path / "out", progress=cut_it)
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_a_source_that_vanishes_before_it_is_read_is_named(source, tmp_path):
    checkpoint, plan = open_folder(source), doubled(source)
    shutil.rmtree(source)
    with pytest.raises((DslmError, OSError), match=r"model\.safetensors|tiny"):
        resize(checkpoint, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())
