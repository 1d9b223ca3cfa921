"""Shrinking holds one block in memory, whatever the model's depth; large streams lie in files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import shrinking
from dslm.shrink import streams

MEASURE = """
import json, resource, sys
from pathlib import Path

import torch, transformers  # both belong to the baseline
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dslm.checkpoint.reader import open_folder
from dslm.families import load_family
from dslm.plan import plan_shrink
from dslm.shrink import down
from dslm.shrink.calibrate import Calibration


def make_source(folder, layers, hidden=256, units=2048):
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": units, "num_hidden_layers": layers,
              "num_attention_heads": 4, "vocab_size": 256, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for tensor in load_family("llama").layout(config).values():
        tensors[tensor.name] = torch.empty(tensor.shape).normal_(0, 0.05, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values()) * 4


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shrink(place):
    source = open_folder(place)
    units = source.sizes.intermediate_size * 5 // 32
    target = source.sizes.replace(hidden_size=source.sizes.hidden_size * 3 // 4, intermediate_size=units,
                                  num_attention_heads=2, num_key_value_heads=2)
    plan = plan_shrink("m", source.family, source.config, target, samples=32, length=16)
    down.shrink_checkpoint(source, plan, place.with_name(place.name + "-out"), device="cpu")


def windows(*arguments, **options):
    ids = torch.randint(256, (32, 16), generator=torch.Generator().manual_seed(0))
    return Calibration(ids[:28], ids[28:], "nowhere")


place = Path(sys.argv[1])
if len(sys.argv) > 2:  # in a process of its own: what is made here is not to be measured
    print(json.dumps({name: make_source(place / name, int(layers)) for name, layers in
                      (pair.split("=") for pair in sys.argv[2:])}))
    sys.exit()
torch.set_num_threads(1)
down.calibration = windows  # a model that writes its own text is loaded whole for that
make_source(place / "tiny", 2, 32, 64)
shrink(place / "tiny")  # the libraries' own code and buffers, which differ from processor to processor, are not meant
base = peak()
shrink(place / "small")
after_small = peak()
shrink(place / "large")
print(json.dumps({"base": base, "after_small": after_small, "after_large": peak()}))
"""


def run(*arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "60000", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_is_one_block_whatever_the_depth(tmp_path):
    sizes = run(str(tmp_path), "small=2", "large=18")
    found = run(str(tmp_path))
    shutil.rmtree(tmp_path)
    assert sizes["large"] > 130e6
    assert found["after_large"] - found["base"] < 80e6, found
    assert found["after_large"] - found["after_small"] < 18e6, found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_streams_in_files_give_the_same_bytes(family, tmp_path, monkeypatch):
    variant = {"llama": "gqa-tied", "gemma2": "windows-softcaps"}[family]
    source = shrinking.make_source(tmp_path / "source", family, variant)
    target = shrinking.smaller_in_all(source.sizes)
    made = []

    def from_file(path, **options):
        made.append(path.rpartition("/")[2])
        return whole(path, **options)

    whole = torch.from_file
    monkeypatch.setattr(torch, "from_file", from_file)
    losses = {}
    for place, limit in (("memory", streams.IN_MEMORY), ("files", 1000)):
        monkeypatch.setattr(streams, "IN_MEMORY", limit)
        losses[place] = shrinking.down(source, tmp_path / place, target).losses
        once = ["teacher", "ahead", "student", "heads", "heads-anew"]
        # The streams for gradients are more than those that a rebuilding has in memory, and go to a file anyway.
        gradients = ["metrics", "between"] if place == "files" else ["between"]
        expected = once * 3 if place == "files" else []  # two choices of layers are built before the last
        assert [
            name.partition("-")[0] if "metrics" in name else name for name in made
        ] == gradients + expected
        made.clear()
    weights = [(tmp_path / place / "model.safetensors").read_bytes() for place in losses]
    assert weights[0] == weights[1]
    assert losses["memory"] == losses["files"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "memory", "files"}
