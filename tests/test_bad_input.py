"""Bad input: one clear line, no output, the source untouched."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dslm.checkpoint.writer as writer_module
import pico
from dslm.checkpoint.reader import open_folder
from dslm.checkpoint.writer import Writer
from dslm.cli.main import run
from dslm.errors import CheckpointError, DslmError, VerificationError
from dslm.plan import Plan, plan_growth
from dslm.resizing import resize

NORM = "model.norm.weight"


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    return pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture
def source(original, tmp_path) -> Path:
    """A checkpoint of the test's own, in the test's own folder."""
    folder = tmp_path / "tiny"
    shutil.copytree(original, folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything under a folder, hidden things too: path -> content."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def nothing_happens(folder: Path) -> Iterator[None]:
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    assert sorted(after) == sorted(before), "something was left behind, or is gone"
    assert after == before, "a file was changed"


def doubled(source: Path, **options) -> Plan:
    checkpoint = open_folder(source)
    sizes = checkpoint.sizes
    target = sizes.replace(
        hidden_size=2 * sizes.hidden_size,
        intermediate_size=2 * sizes.intermediate_size,
        num_attention_heads=2 * sizes.num_attention_heads,
        num_key_value_heads=2 * sizes.num_key_value_heads,
    )
    return plan_growth("tiny", checkpoint.family, checkpoint.config, target, **options)


def grow(source: Path, out: Path, **options) -> None:
    resize(open_folder(source), doubled(source), out, **options)


def one_line(capsys, arguments: list[str], code: int) -> str:
    """Run a command line that fails; returns the one line it prints."""
    assert run(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("dslm: error: ")
    assert "Traceback" not in lines[0]
    assert "unexpected" not in lines[0], "an error that nobody foresaw"
    return lines[0]


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


# ---------------------------------------------------------------- command lines

COMMANDS = [
    # arguments beside the source and -o, exit code, what the line must say
    (["-edm", "0"], 1, "multiplier 0"),
    (["-edm", "-1"], 1, "multiplier -1"),
    (["-upm", "0.5"], 1, "multiplier 0.5.*dslm down"),
    (["-edm", "two"], 1, "multiplier 'two' is not a number"),
    (["-edm", "1/0"], 1, "multiplier '1/0' is not a number"),
    (["-upm", "nan"], 1, "multiplier 'nan'"),
    (["-edm", "", "-upm", "2"], 1, "multiplier ''"),
    (["-edm", "1e400"], 1, "1e400|hidden_size"),
    (["-upm", "1e400"], 1, "1e400|intermediate_size"),
    (["-edm", "1.01"], 1, "hidden_size.*nearest"),
    (["--hidden-size", "33"], 1, "hidden_size.*nearest legal hidden_size: 32 or 36"),
    (["--hidden-size", "16"], 1, "hidden_size 16 is smaller.*32.*dslm down"),
    (["--hidden-size", "0"], 1, "hidden_size 0"),
    (["--hidden-size", "-32"], 1, "hidden_size -32"),
    (["--hidden-size", "many"], 2, "many"),
    (["--intermediate-size", "47"], 1, "intermediate_size 47.*dslm down"),
    (["--intermediate-size", str(10**18)], 1, "disk|too large|intermediate_size"),
    (["--num-attention-heads", "5"], 1, "num_attention_heads.*nearest legal num_attention_heads"),
    (["--num-key-value-heads", "3"], 1, "num_key_value_heads|num_attention_heads"),
    (["--num-key-value-heads", "1"], 1, "num_key_value_heads 1.*dslm down"),
    (["--num-hidden-layers", "6"], 2, "num-hidden-layers"),
    (["--params", "1"], 1, "smaller than the source's.*dslm down"),
    (["--params", "0"], 1, "'0' is not a positive number"),
    (["--params", "-5M"], 1, "'-5M' is not a positive number"),
    (["--params", "big"], 1, "'big' is not a number of parameters"),
    (["--params", "1e400"], 1, "1e400|parameters"),
    (["--params", "900T"], 1, "900T"),
    (["--params", "900B"], 1, "900B|900,000,000,000"),
    (["--params", "1M", "-edm", "2"], 1, "--params and multipliers"),
    (["--like", "absent-model"], 1, "absent-model"),
    (["--plan", "absent.yaml"], 1, "absent.yaml"),
    (["--seed", "-1", "-edm", "2"], 1, "seed -1"),
    (["--seed", "x", "-edm", "2"], 2, "x"),
    (["--snr-db", "nan", "-edm", "2"], 1, "snr-db"),
    (["--snr-db", "inf", "-edm", "2"], 1, "snr-db"),
    (["--method", "magic", "-edm", "2"], 2, "magic"),
    (["--split", "both", "-edm", "2"], 2, "both"),
    (["--dtype", "int8", "-edm", "2"], 2, "int8"),
    (["--frobnicate"], 2, "--frobnicate"),
    ([], 1, "nothing to grow"),
    (["-edm", "1", "-upm", "1"], 1, "nothing to grow"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "named"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_command_that_cannot_be_done_says_why(arguments, code, named, source, tmp_path, capsys):
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["up", str(source), "-o", str(tmp_path / "out"), *arguments], code)
    assert re.search(named, line), line


@pytest.mark.parametrize(
    "arguments", [["up"], ["up", "a", "-i", "b"], ["upp", "a"], ["--params"], ["plan", "a"]]
)
def test_a_wrong_command_line_is_a_usage_error(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with nothing_happens(tmp_path):
        assert "--help" in one_line(capsys, arguments, 2)


PLAN_EDITS = {
    "smaller": ("hidden_size: 64", "hidden_size: 16", "hidden_size 16"),
    "illegal": ("hidden_size: 64", "hidden_size: 65", "hidden_size"),
    "other layers": ("num_hidden_layers: 3", "num_hidden_layers: 4", "num_hidden_layers|another model"),
    "other model": ("family: llama", "family: qwen2", "another model"),
    "unknown method": ("hidden_size: hypercloning", "hidden_size: magic", "magic"),
    "no method": ("  hidden_size: hypercloning\n", "", "hidden_size"),
    "unknown split": ("split: uneven", "split: sideways", "sideways"),
    "unknown dtype": ("dtype: null", "dtype: I4", "I4"),
    "negative seed": ("seed: 0", "seed: -3", "seed"),
    "seed a word": ("seed: 0", "seed: lucky", "seed|plan.yaml"),
}


@pytest.mark.parametrize(("before", "after", "named"), PLAN_EDITS.values(), ids=PLAN_EDITS)
def test_a_plan_that_was_edited_is_checked_again(before, after, named, source, tmp_path, capsys):
    text = doubled(source).to_yaml()
    assert before in text
    head, _, tail = text.rpartition(before) if before in ("hidden_size: 64",) else text.partition(before)
    path = tmp_path / "plan.yaml"
    path.write_text(head + after + tail)
    with nothing_happens(tmp_path):
        line = one_line(capsys, ["up", str(source), "-o", str(tmp_path / "out"), "--plan", str(path)], 1)
    assert re.search(named, line), line


@pytest.mark.parametrize(
    "option", [["--dtype", "float32"], ["--seed", "7"], ["-edm", "2"], ["--untie"]], ids=str
)
def test_a_plan_is_not_silently_mixed_with_options(option, source, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(doubled(source).to_yaml())
    with nothing_happens(tmp_path):
        command = ["up", str(source), "-o", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.yaml")]
        line = one_line(capsys, [*command, *option], 2)
    assert "--plan" in line


# ---------------------------------------------------------------- places for the output


def _occupied(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "out" / "config.json").write_text("{}")
    return tmp_path / "out"


def _file(tmp_path: Path) -> Path:
    (tmp_path / "out").write_text("irreplaceable")
    return tmp_path / "out"


def _link(tmp_path: Path, to: str, name: str = "link") -> Path:
    (tmp_path / name).symlink_to(tmp_path / to)
    return tmp_path / name


PLACES: dict[str, tuple[Callable[[Path], Path], bool, str]] = {
    # where, whether --overwrite is given, what the message says
    "not empty": (_occupied, False, "not empty.*--overwrite"),
    "a file": (_file, False, "is a file"),
    "a file, overwrite": (_file, True, "is a file"),
    "the source": (lambda t: t / "tiny", False, "source"),
    "the source, overwrite": (lambda t: t / "tiny", True, "source"),
    "the source by another path": (lambda t: t / "tiny" / ".." / "tiny", True, "source"),
    "the source by a link": (lambda t: _link(t, "tiny"), True, "source"),
    "inside the source": (lambda t: t / "tiny" / "out", True, "source"),
    "deep inside the source": (lambda t: t / "tiny" / "a" / "b" / "out", True, "source"),
    "inside the source by a link": (lambda t: _link(t, "tiny") / "out", True, "source"),
    "the source's parent": (lambda t: t, True, "source"),
    "the source's parent by a link": (lambda t: _link(t, "."), True, "source"),
    "under a file": (lambda t: _file(t) / "below", False, "out"),
}


@pytest.mark.parametrize(("place", "overwrite", "named"), PLACES.values(), ids=PLACES)
def test_a_place_that_must_not_be_written_is_refused(place, overwrite, named, source, tmp_path):
    out = place(tmp_path)
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match=named) as caught:
        grow(source, out, overwrite=overwrite)
    assert caught.value.hint


def test_any_folder_above_the_source_is_refused(original, tmp_path):
    shutil.copytree(original, tmp_path / "a" / "b" / "tiny")
    for out in (tmp_path / "a" / "b", tmp_path / "a"):
        with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="source"):
            grow(tmp_path / "a" / "b" / "tiny", out, overwrite=True)


def test_the_source_by_a_link_is_the_source_too(source, tmp_path):
    """The source named through a link, the output in the folder it really lies in."""
    link = _link(tmp_path, "tiny")
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="source"):
        grow(link, source / "out")


def test_a_relative_place_is_judged_where_it_lies(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    for out in (Path(), Path("out"), Path("..")):
        with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="source"):
            grow(Path(), out, overwrite=True)


def test_an_empty_folder_is_a_place(source, tmp_path):
    (tmp_path / "out").mkdir()
    grow(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]
    assert open_folder(tmp_path / "out").sizes.hidden_size == 64


def test_a_folder_below_folders_that_do_not_exist_is_a_place(source, tmp_path):
    grow(source, tmp_path / "a" / "b" / "out")
    assert open_folder(tmp_path / "a" / "b" / "out").sizes.hidden_size == 64
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.parametrize("linked", [False, True])
def test_overwrite_leaves_nothing_stale(linked, source, tmp_path):
    out = _occupied(tmp_path)
    (out / "model-00001-of-00009.safetensors").write_text("stale")
    (out / "sub").mkdir()
    before = snapshot(source)
    if linked:
        out = _link(tmp_path, "out")
    grow(source, out, overwrite=True)
    assert not (out / "thesis.txt").exists()
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "dslm.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert snapshot(source) == before


def test_overwrite_never_deletes_what_is_not_a_model(source, tmp_path, monkeypatch):
    out = _occupied(tmp_path)
    (out / "config.json").unlink()
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="not a model"):
        grow(source, out, overwrite=True)
    (out / "config.json").write_text("{}")
    (out / "below").mkdir()
    for here in (out, out / "below"):
        monkeypatch.chdir(here)
        with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="folder you are in"):
            grow(source, out, overwrite=True)


def test_what_appeared_while_writing_is_not_overwritten(source, tmp_path):
    out = tmp_path / "out"

    def meanwhile(label: str, done: int, total: int) -> None:
        if not out.exists():
            _occupied(tmp_path)

    with pytest.raises((DslmError, OSError)):
        grow(source, out, progress=meanwhile)
    assert (out / "thesis.txt").read_text() == "irreplaceable"


def test_what_a_killed_run_left_is_no_obstacle(source, tmp_path):
    """A container gives every run the same process id, so the same hidden name comes again."""
    left = Writer(tmp_path / "out", []).folder
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    grow(source, tmp_path / "out")
    assert open_folder(tmp_path / "out").sizes.hidden_size == 64


@pytest.mark.parametrize("after", [1, 2])
def test_ctrl_c_between_the_two_renames_loses_nothing(after, source, tmp_path, monkeypatch):
    """The old folder steps aside, the new one takes its place: one of the two is there whenever it stops."""
    out, rename, calls = _occupied(tmp_path), Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        found = rename(self, target)
        calls.append(target)
        if len(calls) == after:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grow(source, out, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (out / "thesis.txt").exists() is (after == 1)
    assert (out / "model.safetensors").exists() is (after == 2)


# ---------------------------------------------------------------- full disks and interruptions


def test_too_little_disk_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    needed = sum(tensor.numel() * 4 for tensor in pico.make_model("llama", "gqa-tied").state_dict().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, needed))
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match="not enough disk"):
        grow(source, tmp_path / "out")


class _Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.file.write(memoryview(data)[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _fills_after(room: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        opened = Path.open

        def filling(self, mode="r", *arguments, **keys):
            file = opened(self, mode, *arguments, **keys)
            return _Full(file, room) if "w" in mode and ".partial" in str(self) else file

        monkeypatch.setattr(Path, "open", filling)

    return patch


def _fails(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*arguments, **keys):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda monkeypatch: monkeypatch.setattr(owner, name, fail)


FULL = {
    "at the header": _fills_after(10),
    "in the middle": _fills_after(60_000),
    "at the sync": _fails(writer_module.os, "fsync"),
    "at the small files": _fails(writer_module.shutil, "copyfile"),
}


@pytest.mark.parametrize("fill", FULL.values(), ids=FULL)
@pytest.mark.parametrize("occupied", [False, True])
def test_a_disk_that_fills_leaves_everything_as_it_was(fill, occupied, source, tmp_path, monkeypatch, capsys):
    out = _occupied(tmp_path) if occupied else tmp_path / "out"
    with monkeypatch.context() as patched, nothing_happens(tmp_path):
        fill(patched)
        line = one_line(
            capsys,
            ["up", str(source), "-o", str(out), "-edm", "2", *(["--overwrite"] if occupied else [])],
            1,
        )
    assert "No space left" in line


def test_a_failure_leaves_no_new_folders_above_the_output(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, nothing_happens(tmp_path):
        FULL["in the middle"](patched)
        with pytest.raises((DslmError, OSError)):
            grow(source, tmp_path / "a" / "b" / "out")


def _raise_at(call: int, error: BaseException) -> Callable[[str, int, int], None]:
    calls = iter(range(10**6))

    def progress(label: str, done: int, total: int) -> None:
        if next(calls) == call or (call == -1 and done == total):
            raise error

    return progress


@pytest.mark.parametrize("call", [0, 7, -1])
@pytest.mark.parametrize("occupied", [False, True])
def test_an_interruption_leaves_everything_as_it_was(call, occupied, source, tmp_path):
    out = _occupied(tmp_path) if occupied else tmp_path / "out"
    with nothing_happens(tmp_path), pytest.raises(KeyboardInterrupt):
        grow(source, out, overwrite=True, progress=_raise_at(call, KeyboardInterrupt()))


@pytest.mark.parametrize("error", [VerificationError("not the same", "look"), KeyboardInterrupt()])
def test_a_result_that_fails_its_check_never_appears(error, source, tmp_path):
    def check(folder: Path) -> dict[str, str]:
        assert open_folder(folder).sizes.hidden_size == 64, "the check sees the finished checkpoint"
        raise error

    out = _occupied(tmp_path)
    with nothing_happens(tmp_path), pytest.raises(type(error)):
        grow(source, out, check=check, overwrite=True)


def test_ctrl_c_leaves_nothing_and_says_so_in_one_line(source, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "dslm.cli.main",
        "up",
        str(source),
        "-o",
        str(out),
        "-edm",
        "2",
        "-upm",
        "2",
    ]
    before = snapshot(tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*")):  # the transformers import beside it takes seconds
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "it never began to write"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert printed == ""
    assert complaint.strip() == "dslm: interrupted; no unfinished output is left"  # after the line of the ^C
    assert snapshot(tmp_path) == before


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
