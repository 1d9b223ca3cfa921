"""Running commands and measuring them: wall time and peak memory with all child processes, several runs, as JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def run(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; returns wall seconds and peak memory in bytes, its child processes included.

    Memory is the kernel's own maximum for the process, or, where it has children, the largest sampled sum of
    proportional set sizes (a page that two processes share counts once) if that is more.

    Raises:
        SystemExit: the command failed; its own output says why.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    done = threading.Event()
    sampled = [0.0]

    def sample() -> None:
        while not done.wait(0.05):
            tree = _tree(process.pid)
            if len(tree) > 1:
                sampled[0] = max(sampled[0], sum(map(_proportional_bytes, tree)))

    watcher = threading.Thread(target=sample)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    own = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return seconds, max(own, sampled[0])


def _tree(pid: int) -> list[int]:
    """A process and its descendants, where the kernel lists them."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        listed = [int(child) for child in children.read_text().split()]
    except OSError:
        listed = []
    return [pid, *(one for child in listed for one in _tree(child))]


def _proportional_bytes(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def copy_with_fsync(source: Path, target: Path) -> float:
    """Copy the files of a folder through the page cache and sync them; returns seconds."""
    target.mkdir(parents=True)
    begin = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 << 20)
            writer.flush()
            os.fsync(writer.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def interleaved(
    runs: int, measures: dict[str, Callable[[], dict[str, float]]]
) -> dict[str, dict[str, float]]:
    """Run each measure in turn, ``runs`` times over, so that a busy minute hits all; returns medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for turn in range(runs):
        for name, measure in measures.items():
            found[name].append(measure())
            print(f"run {turn + 1} of {runs}: {name} {found[name][-1]}", file=sys.stderr)
    return {
        name: {key: statistics.median(one[key] for one in rows) for key in rows[0]}
        for name, rows in found.items()
    }


def folder_bytes(folder: Path) -> int:
    """Bytes of all weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}


def save(name: str, result: dict[str, object]) -> None:
    """Write ``results/NAME.json`` with the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    # Where a file lies is of no use to anyone else.
    arguments = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    text = json.dumps({"schema": 1, "command": command, "machine": machine(), **result}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
