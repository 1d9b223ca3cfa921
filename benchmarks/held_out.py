"""Perplexity in one protocol: articles that nothing was fitted on, windows of 1024 tokens, float32.

A WikiText file is split by article (lines like `` = Title = ``). Windows do not overlap; each begins with the start
token where the tokenizer opens a text with one, as that of Gemma does and that of SmolLM2 does not. The mean is over
predicted tokens.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

LENGTH = 1024


def articles(path: Path) -> list[str]:
    """The articles of a WikiText file."""
    pieces = re.split(r"(?m)^(?= = [^=\n]+ = \n)", path.read_text(encoding="utf-8"))
    return [piece for piece in pieces if piece.startswith(" = ")]


def cut(tokenizer, text: str, count: int, seed: int) -> torch.Tensor:
    """So many windows of a text, drawn at random."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer("a")["input_ids"][:1]
    opens = start if start == [tokenizer.bos_token_id] else []
    read = LENGTH - len(opens)
    windows = torch.tensor(ids[: len(ids) // read * read]).view(-1, read)
    windows = torch.cat(
        [torch.tensor(opens * len(windows), dtype=torch.int64).view(len(windows), -1), windows], dim=1
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


@torch.no_grad()
def perplexities(model: Any, checks: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity of a model on the windows of each text."""
    found = {}
    for text, windows in checks.items():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows]
        found[text] = math.exp(sum(losses) / len(losses))
    return found
