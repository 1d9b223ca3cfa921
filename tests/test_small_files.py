"""The small files of an output: copied, written anew, or left out."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from dslm.checkpoint.reader import open_folder
from writing import contents, grow, make_source, read_config

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
    "adapter_config.json": b'{"base_model_name_or_path": "someone/something"}',
    "trainer_state.json": b"{}",
}


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
