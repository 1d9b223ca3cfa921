"""Draws what healing recovers, from results of ``healing.py``.

Run: ``python benchmarks/draw_healing.py healing healing_slice healing_70_50 healing_slice_50``. For each size and each
way of cutting a line goes from the perplexity after the cut to that after the distillation at the first rate; of rows
that are in several results the last counts.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from matplotlib.figure import Figure

from measure import RESULTS

STYLES = {"reconstruct": "o-", "slice": "s--"}


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="of results")
    asked = parser.parse_args()
    rows: dict[tuple[float, str], Any] = {}
    dense, tokens = {}, 0
    for name in asked.names:
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert rows == {} or (found["dense"], found["tokens"]) == (dense, tokens), (
            f"{name} was made otherwise"
        )
        dense, tokens = found["dense"], found["tokens"]
        rows |= {(row["keep"], row["method"]): row for row in found["rows"]}
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(dense), sharey=True)
    for axes, (text, source) in zip(panels, dense.items(), strict=True):
        for number, keep in enumerate(sorted({keep for keep, _ in rows}, reverse=True)):
            for method, style in STYLES.items():
                if (keep, method) in rows:
                    row = rows[keep, method]
                    reached = [row["cut"][text], row["healed"][0]["perplexity"][text]]
                    label = f"{keep:.0%} by {method}"
                    axes.plot([0, tokens], reached, style, color=f"C{number}", label=label)
        axes.axhline(source, color="black", linewidth=1, label="the source")
        axes.set_title({"second": "second corpus"}.get(text, text))
        axes.set_xlabel("tokens of distillation")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(RESULTS / "healing.png", dpi=110)


if __name__ == "__main__":
    main()
