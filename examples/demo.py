"""The main job on a small real model, as a user would type it: describe, plan, grow, prove, shrink, generate.

Run by ``make demo``. Needs no network: SmolLM2-135M comes from a package. Everything is written below
``demo-output`` and can be deleted.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

MODEL = "demo:smollm2-135m"
OUT = Path("demo-output")
DSLM = str(Path(sys.executable).with_name("dslm"))
TALK = ["--temperature", "0", "-n", "24", "--dtype", "float32", "-q"]
STEPS = [
    ("What is it? Headers only: nothing is loaded.", ["desc", MODEL]),
    ("Which shapes near 360M parameters are legal?", ["plan", MODEL, "--params", "360M", "-n", "4"]),
    (
        "Twice as wide, by copies that share what they are read with. Proved while it is written:",
        ["up", MODEL, "-o", f"{OUT}/double", "-edm", "2", "-upm", "2", "--verify", "--overwrite"],
    ),
    (
        "Any width will do, not only whole multiples; here the stream and the FFN by 1.5:",
        ["up", MODEL, "-o", f"{OUT}/half-more", "-edm", "1.5", "-upm", "1.5", "--overwrite"],
    ),
    ("How close is that, next to what rounding does?", ["diff", MODEL, f"{OUT}/half-more", "--no-liveness"]),
    (
        "Net2Net widens the FFN alone, by units drawn at random:",
        [
            "up",
            MODEL,
            "-o",
            f"{OUT}/net2net",
            "--intermediate-size",
            "2000",
            "--method",
            "net2net",
            "--overwrite",
        ],
    ),
    (
        "Padding adds heads and units that are silent until they are trained:",
        ["up", MODEL, "-o", f"{OUT}/padded", "--params", "200M", "--method", "padding", "--overwrite"],
    ),
    (
        "Back again: what growing made redundant is found in the weights alone and goes without loss:",
        ["down", f"{OUT}/double", "-o", f"{OUT}/back", "--like", MODEL, "--overwrite"],
    ),
    ("Is it the source?", ["diff", MODEL, f"{OUT}/back", "--no-liveness"]),
    (
        "Smaller than the source: an eighth of the FFN goes, and least squares makes up for it. With so little text, "
        "which the model writes itself and from which optimiser steps would learn nothing, this shows how it works "
        "and not how good it gets:",
        [
            "down",
            MODEL,
            "-o",
            f"{OUT}/smaller",
            "--intermediate-size",
            "1344",
            "--samples",
            "8",
            "--sequence-length",
            "256",
            "--refine",
            "0",
            "--overwrite",
        ],
    ),
    ("They talk; in float32, where rounding tips no near tie. The source:", ["gen", MODEL, *TALK]),
    ("The model of twice the width:", ["gen", f"{OUT}/double", *TALK]),
    ("The smaller one:", ["gen", f"{OUT}/smaller", *TALK]),
    ("The padded one:", ["gen", f"{OUT}/padded", *TALK]),
]


def main() -> int:
    """Run every step, stopping at the first that fails."""
    begin = time.monotonic()
    OUT.mkdir(exist_ok=True)
    for title, arguments in STEPS:
        print(f"\n--- {title}\n$ dslm {' '.join(arguments)}\n", flush=True)
        code = subprocess.run([DSLM, *arguments]).returncode
        if code != 0:
            return code
    print(
        f"\n--- Done in {time.monotonic() - begin:.0f} s. The models are in {OUT}/; each has a card (README.md)."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
