"""Growing an 8B-shaped sharded bf16 checkpoint by FFN x 2: time against copying the output, and peak memory.

The checkpoint is synthetic: the shape of Llama-3-8B filled with random numbers. One run needs about 55 GB of disk;
``--layers 8`` makes a quarter of that.

Run: ``python benchmarks/grow_sharded.py --work FOLDER [--layers 32] [--runs 1]``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from dslm.checkpoint.writer import Planned, Writer
from dslm.families import load_family
from measure import copy_with_fsync, folder_bytes, interleaved, run, save

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PIECE = 1 << 24


def make(folder: Path, layers: int) -> None:
    """Write the synthetic source in the usual 5 GB shards."""
    config = CONFIG | {"num_hidden_layers": layers}
    tensors = [Planned(t.name, "BF16", t.shape) for t in load_family("llama").layout(config).values()]
    values = (0.02 * torch.randn(PIECE, generator=torch.Generator().manual_seed(0))).bfloat16()
    with Writer(folder, tensors) as writer:
        for path, shard in writer.order:
            writer.start_shard(path, shard)
            for tensor in shard:
                count = tensor.nbytes // 2
                writer.write(tensor, (values[: min(PIECE, count - i)] for i in range(0, count, PIECE)))
        writer.add_text("config.json", json.dumps(config))
        writer.seal()
        writer.publish()


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dslm-bench")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    source, out = options.work / "source", options.work / "grown"
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    make(source, options.layers)

    def grow() -> dict[str, float]:
        shutil.rmtree(out, ignore_errors=True)
        dslm = str(Path(sys.executable).with_name("dslm"))
        seconds, peak = run([dslm, "up", str(source), "-o", str(out), "-upm", "2", "-q"])
        return {"seconds": seconds, "peak_bytes": peak, "bytes": folder_bytes(out)}

    def copying() -> dict[str, float]:
        if options.runs == 1:
            shutil.rmtree(source)  # it is not needed again, and its 16 GB may be
        return {"seconds": copy_with_fsync(out, options.work / "copy")}

    medians = interleaved(options.runs, {"dslm": grow, "copy_of_output": copying})
    shutil.rmtree(options.work)
    ratio = medians["dslm"]["seconds"] / medians["copy_of_output"]["seconds"]
    result = {
        "layers": options.layers,
        "runs": options.runs,
        "medians": medians,
        "ratios": {"seconds_over_copy": ratio},
    }
    save("grow_sharded", result)


if __name__ == "__main__":
    main()
