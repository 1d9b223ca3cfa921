"""What cuts cost a model: as predicted before anything is re-read, and as they were built.

Run: ``python benchmarks/shrink_cuts.py --text wiki.txt --second other.txt``. SmolLM2-135M, single cuts and a few
shapes, by the closed form; of layers those in the middle go. ``dslm plan`` weighs cuts of one axis against cuts of
another by what is left of them here (`dslm.shrink.search.LEFT`). Texts and windows are those of
``benchmarks/shrink.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dslm.checkpoint.source import open_checkpoint
from dslm.load import load_tokenizer
from dslm.shrink.capture import captured, damage, shares_cut
from dslm.shrink.encoder import survey_stream
from dslm.shrink.importance import importance
from dslm.shrink.rebuild import Windows, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.survey import few
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.sizes import count_parameters
from held_out import articles, cut
from measure import save

SHAPES = (
    "30,1152,576,9,3", "30,768,576,9,3", "30,240,576,9,3",  # FFN units
    "30,1536,576,6,3", "30,1536,576,6,2", "30,1536,504,9,3",  # query heads, groups of heads, stream
    "24,1536,576,9,3", "28,1280,576,9,3",  # layers, layers and units
    "22,1104,432,9,3", "23,640,576,6,2", "28,464,576,6,2",  # half the size
)  # fmt: skip
"""Layers, FFN units, hidden size, query heads, key-value heads."""
WORDS = (
    "num_hidden_layers",
    "intermediate_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def middle(layers: int, count: int) -> tuple[int, ...]:
    """The layers that stay if those in the middle go."""
    return tuple(layer for layer in range(layers) if not count // 2 <= layer < count // 2 + layers - count)


def main() -> None:
    """Measure and save, after each cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--windows", type=int, default=8, help="windows of 1,024 tokens to fit on")
    parser.add_argument("--evaluate", type=int, default=8, help="windows of each text to evaluate on")
    parser.add_argument("--name", default="shrink_cuts", help="of the result")
    asked = parser.parse_args()
    source = open_checkpoint("demo:smollm2-135m")
    tokenizer, weights, sizes = load_tokenizer(source), Stored(source), source.sizes
    whole = articles(asked.text)
    first = int(0.4 * len(whole))
    calibration = cut(tokenizer, "".join(whole[first:]), asked.windows + 4, seed=0)
    checks = {
        "articles": cut(tokenizer, "".join(whole[:first]), asked.evaluate, seed=1),
        "second": cut(tokenizer, asked.second.read_text(encoding="utf-8"), asked.evaluate, seed=1),
    }
    windows = Windows(calibration[4:], calibration[:4], checks)
    survey = survey_stream(Walk(weights), few(windows.fit), tied=sizes.tied)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        felt = importance(Walk(weights), windows.fit, Path(folder))
        known = captured(weights, windows, Recipe(), lambda: felt)
        for shape in asked.shapes:
            sizes_asked = dict(zip(WORDS, map(int, shape.split(",")), strict=True))
            target = sizes.replace(**sizes_asked)
            narrower = target.hidden_size != sizes.hidden_size
            with tempfile.TemporaryDirectory() as room:
                found = rebuild(
                    weights, target, middle(sizes.num_hidden_layers, target.num_hidden_layers),
                    survey.encoder(target.hidden_size) if narrower else None, windows, Path(room),
                    recipe=Recipe().closed(), felt=felt,
                )  # fmt: skip
            after = target.into_config(source.family, source.config)
            cuts = {axis: share for axis, share in shares_cut(sizes, target).items() if share}
            rows.append(
                sizes_asked
                | {
                    "left_out": sorted(set(range(sizes.num_hidden_layers)) - set(found.base.layers)),
                    "parameters": count_parameters(source.family, after)["total"],
                    "predicted_nats": {axis: damage(known.damages[axis], cuts[axis]) for axis in cuts},
                    "nats": {text: after - before for text, (before, after) in found.losses.items()},
                }
            )
            save(asked.name, {"tokens": windows.fit.numel(), "rows": rows})


if __name__ == "__main__":
    main()
