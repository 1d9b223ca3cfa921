"""Shrinking a model that is larger than the memory it may use.

Run: ``python benchmarks/shrink_limited.py --text FILE [--work FOLDER --layers 48 --limit 1.0]``. The checkpoint is
synthetic (random numbers), deep and of moderate width. In bf16 it is already larger than the limit, which the operating
system enforces on what the process may write to (``ulimit -d``); in float32, as it is computed, it is twice that.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import folder_bytes, run, save
from synthetic import save_byte_tokenizer, write_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 257,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dslm-bench")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--limit", type=float, default=1.0, help="in units of 1e9 bytes")
    parser.add_argument("--sizes", nargs="+", default=["--intermediate-size", "2048"])
    parser.add_argument("--samples", type=int, default=4, help="windows of 512 tokens")
    asked = parser.parse_args()
    work = asked.work / "shrink_limited"
    source, out = work / "source", work / "small"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_checkpoint(source, CONFIG | {"num_hidden_layers": asked.layers})
    save_byte_tokenizer(source)
    dslm = str(Path(sys.executable).with_name("dslm"))
    command = [dslm, "down", str(source), "-o", str(out), "--calibration", str(asked.text)]
    command += ["--samples", str(asked.samples)]
    limited = f'ulimit -d {int(asked.limit * 1e9) // 1024}; exec "$@"'
    seconds, peak = run(["sh", "-c", limited, "sh", *command, *asked.sizes])
    result = {
        "limit_bytes": int(asked.limit * 1e9),
        "source_bytes": folder_bytes(source),
        "output_bytes": folder_bytes(out),
        "tokens": asked.samples * 512,
        "seconds": seconds,
        "peak_resident_bytes": peak,
    }
    shutil.rmtree(work)
    save("shrink_limited", result)


if __name__ == "__main__":
    main()
