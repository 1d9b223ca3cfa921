"""Texts that a tiny model can learn, and runs of the command on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
"""Marks of tests that train: what other packages warn of."""
QUICK = ("--block-size", 16, "--batch-size", 2, "--lr", 1e-2, "--max-steps", 20, "--device", "cpu")


def counting(folder: Path, *, documents: int = 120) -> Path:
    """A JSON-lines file of counted words: what follows what is easily learned."""
    rng = random.Random(0)
    rows = []
    for start in range(documents):
        words = [f"w{3 + (7 * start + 3 * i) % 80}" for i in range(rng.randint(8, 30))]
        rows.append(json.dumps({"text": " ".join(words)}))
    path = folder / "counting.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What `counting` writes."""
    return counting(tmp_path_factory.mktemp("data"))


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics, without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
