"""Growing as a stream: little memory, and the check that runs beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from writing import make_source

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
