"""Growing an 8B-shaped sharded bf16 checkpoint by FFN x 2: time against copying the output, and peak memory.

The checkpoint is synthetic: the shape of Llama-3-8B filled with random numbers. One run needs about 55 GB of disk;
``--layers 8`` makes a quarter of that.

Run: ``python benchmarks/grow_sharded.py --work FOLDER [--layers 32] [--runs 1]``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import copy_with_fsync, folder_bytes, interleaved, run, save
from synthetic import write_checkpoint

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
    write_checkpoint(source, CONFIG | {"num_hidden_layers": options.layers})

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
