"""Growing SmolLM2-135M by 2 x 2: wall time, memory and bytes, against an in-memory implementation and the floors.

Run: ``python benchmarks/grow_smollm2.py [--runs 3]``. Everything is measured in one interleaved run: read the ratios.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from dslm.checkpoint.source import open_checkpoint
from measure import copy_with_fsync, folder_bytes, interleaved, run, save

# Seconds of the two published implementations and of `import torch, transformers` on one other 2-core machine
# (AMD EPYC, medians of 3); their peak memory and bytes do not depend on the machine.
PUBLISHED = {
    "dynamic-sizing-lm": {"seconds": 30.0, "peak_bytes": 4.8e9, "bytes": 2.15e9},
    "ml-hypercloning": {"seconds": 23.0, "peak_bytes": 4.3e9, "bytes": 2.15e9},
}
PUBLISHED_IMPORTS = 2.9


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    source = open_checkpoint("demo:smollm2-135m").folder
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        ours, baseline = work / "dslm", work / "baseline"

        def grow() -> dict[str, float]:
            shutil.rmtree(ours, ignore_errors=True)
            dslm = str(Path(sys.executable).with_name("dslm"))
            seconds, peak = run([dslm, "up", str(source), "-o", str(ours), "-edm", "2", "-upm", "2", "-q"])
            return {"seconds": seconds, "peak_bytes": peak, "bytes": folder_bytes(ours)}

        def in_memory() -> dict[str, float]:
            shutil.rmtree(baseline, ignore_errors=True)
            script = str(Path(__file__).with_name("in_memory_baseline.py"))
            seconds, peak = run([sys.executable, script, str(source), str(baseline)])
            return {"seconds": seconds, "peak_bytes": peak, "bytes": folder_bytes(baseline)}

        def imports() -> dict[str, float]:
            code = "import torch, transformers; transformers.AutoModelForCausalLM"
            return {"seconds": run([sys.executable, "-c", code])[0]}

        def copying() -> dict[str, float]:
            return {"seconds": copy_with_fsync(ours, work / "copy")}

        measures = {"dslm": grow, "in_memory": in_memory, "imports": imports, "copy_of_output": copying}
        medians = interleaved(runs, measures)
    save("grow_smollm2", {"runs": runs, "medians": medians, "ratios": ratios(medians)})


def ratios(medians: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """dslm over each comparison; for the published figures time is counted in imports of torch and transformers."""
    ours, memory = medians["dslm"], medians["in_memory"]
    imports = medians["imports"]["seconds"]
    found = {"in_memory": {key: ours[key] / memory[key] for key in ours}}
    for name, theirs in PUBLISHED.items():
        found[name] = {
            "seconds_in_imports": (ours["seconds"] / imports) / (theirs["seconds"] / PUBLISHED_IMPORTS),
            "peak_bytes": ours["peak_bytes"] / theirs["peak_bytes"],
            "bytes": ours["bytes"] / theirs["bytes"],
        }
    found["floors"] = {
        "imports": ours["seconds"] / imports,
        "copy": ours["seconds"] / medians["copy_of_output"]["seconds"],
    }
    return found


if __name__ == "__main__":
    main()
