"""Does growing beat starting over? A small byte-level Llama is trained, grown, and trained on.

Run: ``python benchmarks/growing_pays.py [--tokens 4M --small-tokens 4M --seeds 3 --rates 1e-3 2e-3]``. It grows about
four times, to twice the widths or to four times the depth, and is compared with the same shape from scratch. The text
is the source of Python's own standard library, which every machine has. All runs use ``dslm.train_checkpoint``, the
same data, blocks and schedule; of several ``--rates`` each kind of run takes its best. Counted are the tokens after
which a grown model's held-out loss is the one with which the scratch model ends, and FLOPs (6 per parameter and token),
those of the small model included.

A reduced run, all ways with plain rates and one seed, is ``--tokens 400k --small-tokens 400k --recipes plain``: 20
minutes of one thread on an AMD EPYC. For a GPU: ``--tokens 20M --small-tokens 20M --hidden 128 --seeds 3 --rates 1e-3
2e-3 4e-3``, which was not run yet.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dslm.checkpoint.source import open_checkpoint
from dslm.plan import plan_growth
from dslm.resizing import resize
from dslm.sizes import count_parameters
from dslm.targets import parse_count
from dslm.train.run import train_checkpoint
from dslm.train.settings import Training
from measure import RESULTS, save
from synthetic import save_byte_tokenizer

WAYS = {
    "even": {"split": "even"},
    "uneven": {"split": "uneven"},
    "noise": {"snr_db": 10.0},
    "padding": {"method": "padding"},
    "mixed": {"methods": {"intermediate_size": "padding", "num_attention_heads": "padding"}},
    "depth": {},
}
DEEP = ("depth",)
"""Ways that add blocks; the others widen."""


def corpus(place: Path, characters: int) -> Path:
    """So much source of the standard library as JSON lines, a module each."""
    root = Path(sysconfig.get_path("stdlib"))
    rows, size = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: hash_of(path.relative_to(root))):
        if "site-packages" in path.parts or size >= characters:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        rows.append(json.dumps({"text": text}))
        size += len(text)
    found = place / "stdlib.jsonl"
    found.write_text("\n".join(rows), encoding="utf-8")
    return found


def hash_of(path: Path) -> int:
    """An order of files that has nothing to do with their names."""
    return sum((i + 1) * b for i, b in enumerate(str(path).encode())) * 2654435761 % 2**32


def fresh(place: Path, hidden: int, layers: int, seed: int) -> str:
    """A model with random weights as transformers makes it, with a tokenizer of bytes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32,
        max_position_embeddings=1024, eos_token_id=256, bos_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    save_byte_tokenizer(place)
    return str(place)


def learn(model: str, out: Path, data: Path, tokens: int, rate: float, seed: int, recipe: str = "plain"):
    """Train; pairs of tokens and held-out loss."""
    asked = Training(
        data=(str(data),), tokens=tokens, learning_rate=rate, seed=seed, recipe=recipe, block_size=256, batch_size=16,
        held_out=0.03, eval_every=max(1, tokens // (16 * 256) // 40), weight_decay=0.1,
    )  # fmt: skip
    train_checkpoint(open_checkpoint(model), asked, out, overwrite=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["tokens"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def reached(curve, loss: float) -> float | None:
    """Tokens at which a curve first is at a loss, between evaluations linearly; None if never."""
    if curve[0][1] <= loss:
        return 0.0
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * min(1.0, (high - loss) / max(1e-9, high - low))
    return None


def gain(
    when: float | None, tokens: int, small_tokens: int, small_flops: int, flops: int
) -> dict[str, object]:
    """How much less a grown model needs for the loss of the scratch model, given the tokens that it does need.

    Args:
        when: those tokens; None if it never gets there.
        tokens: of the scratch model.
        small_tokens: of the small model before it grew.
        small_flops: per token of the small model.
        flops: per token of the large ones.
    """
    found: dict[str, object] = {"flops_per_token": [small_flops, flops], "tokens_to_scratch": when}
    if when is not None:
        found["times_fewer_tokens"] = tokens / when if when else None  # it starts there
        found["times_fewer_flops"] = tokens * flops / (when * flops + small_tokens * small_flops)
    return found


def draw(rows: list[dict], path: Path) -> None:
    """Held-out loss against tokens, the mean over seeds: from scratch in black or grey, each way in its colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    curves: dict[tuple[str, bool], list] = {}
    for row in rows:
        if row["run"] != "small":
            curves.setdefault((row["run"], row.get("recipe") == "growth"), []).append(row["curve"])
    scratch = {"scratch": "black", "scratch, deep": "grey"}
    for (run, growth), found in curves.items():
        tokens = [tokens for tokens, _ in found[0]]
        losses = [mean(loss for _, loss in points) for points in zip(*found, strict=True)]
        colour = scratch.get(run) or f"C{list(WAYS).index(run)}"
        label = run + (", growth rates" if growth else "")
        axes.plot(tokens, losses, "--" if growth else "-", color=colour, linewidth=1.2, label=label)
    axes.set_ylim(top=3.0)
    axes.set_xlabel("bytes read after growing")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def compare(asked: argparse.Namespace, place: Path, data: Path, seed: int, before: list[dict]) -> list[dict]:
    """All runs of one seed; results so far are saved after each."""
    tokens, small_tokens = parse_count(asked.tokens), parse_count(asked.small_tokens)
    rows: list[dict] = []
    shapes = {"scratch": (2 * asked.hidden, asked.layers)}
    if set(asked.ways) & set(DEEP):
        shapes["scratch, deep"] = (asked.hidden, 4 * asked.layers)
    scratch = {}
    for name, (hidden, layers) in shapes.items():
        model = fresh(place / name, hidden, layers, seed)
        curves = {r: learn(model, place / "out", data, tokens, r, seed) for r in asked.rates}
        rate = min(curves, key=lambda r: curves[r][-1][1])
        scratch[name] = (open_checkpoint(model), curves[rate])
        rows.append({"seed": seed, "run": name, "rate": rate, "curve": curves[rate]})
    small = fresh(place / "small", asked.hidden, asked.layers, seed)
    learned = learn(small, place / "learned", data, small_tokens, rows[0]["rate"], seed)
    rows.append({"seed": seed, "run": "small", "rate": rows[0]["rate"], "curve": learned})
    source = open_checkpoint(str(place / "learned"))
    for way in asked.ways:
        large, curve = scratch["scratch, deep" if way in DEEP else "scratch"]
        target = large.sizes
        options = dict(WAYS[way])
        methods = options.pop("methods", {})
        plan = plan_growth("small", source.family, source.config, target, seed=seed, **options)
        plan = replace(plan, methods={**plan.methods, **methods})
        resize(source, plan, place / "grown", overwrite=True)
        flops = [6 * count_parameters(c.family, c.config)["total"] for c in (source, large)]
        for recipe in asked.recipes:
            tried = {
                r: learn(str(place / "grown"), place / "out", data, tokens, r, seed, recipe)
                for r in asked.rates
            }
            best = min(tried, key=lambda r: tried[r][-1][1])
            when = reached(tried[best], curve[-1][1])
            row = {"seed": seed, "run": way, "recipe": recipe, "rate": best, "curve": tried[best]}
            rows.append(row | gain(when, tokens, small_tokens, *flops))
            row = rows[-1]
            shown = {k: v for k, v in row.items() if k != "curve"}
            print(shown, row["curve"][0], row["curve"][-1], flush=True)
            draw(before + rows, RESULTS / f"{asked.name}.png")
            save(asked.name, {"tokens": tokens, "small_tokens": small_tokens, "rows": before + rows})
    return rows


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", default="1M", help="of the scratch model; the grown ones get as many at most"
    )
    parser.add_argument("--small-tokens", default="1M", help="of the small model")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--recipes", nargs="+", default=["plain", "growth"])
    parser.add_argument("--name", default="growing_pays", help="of the result and its picture")
    parser.add_argument("--go-on", action="store_true", help="keep the seeds that the saved result has")
    asked = parser.parse_args()
    tokens, small_tokens = parse_count(asked.tokens), parse_count(asked.small_tokens)
    rows = []
    if asked.go_on:
        saved = json.loads((RESULTS / f"{asked.name}.json").read_text(encoding="utf-8"))
        if (saved["tokens"], saved["small_tokens"]) != (tokens, small_tokens):
            raise SystemExit("The saved result is about other numbers of tokens.")
        rows = saved["rows"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = corpus(place, 2 * max(tokens, small_tokens))
        for seed in sorted(set(range(asked.seeds)) - {row["seed"] for row in rows}):
            rows += compare(asked, place, data, seed, rows)


if __name__ == "__main__":
    main()
