"""Shrinking in every family: a small byte-level model of each is trained and shrunk, one axis at a time.

Run: ``python benchmarks/shrink_families.py [--families olmo2 gemma2] [--tokens 400k]``. The text is the source of
Python's own standard library, which every machine has. Each model has 6 layers of 96 channels and 288 FFN units, as
its family builds them, and loses in turn a third of its FFN, two layers, and a quarter of the stream where the family
allows that. Reported is the loss on modules that were neither trained nor fitted on, in nats per byte, of the model and
of what is left of it: only cut, re-read without following the stream, the closed form, and with steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dslm.checkpoint.source import open_checkpoint
from dslm.errors import SizeError
from dslm.families import family_names
from dslm.plan import plan_shrink
from dslm.shrink.approximate import choose_layers
from dslm.shrink.encoder import survey_stream
from dslm.shrink.rebuild import Windows, importance_for, rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.survey import few
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.targets import parse_count
from growing_pays import corpus, learn
from measure import save
from synthetic import save_byte_tokenizer

HIDDEN, FFN, LAYERS, HEADS, LENGTH = 96, 288, 6, 4, 256
CUTS = {
    "ffn": {"intermediate_size": FFN * 2 // 3},
    "layers": {"num_hidden_layers": LAYERS - 2},
    "hidden": {"hidden_size": HIDDEN * 3 // 4},
}
RECIPES = {
    "slice": Recipe(solve=False),
    "no_drift": Recipe(drift=False).closed(),
    "closed_form": Recipe().closed(),
    "reconstruct": Recipe(),
}
OWN_KEYS = {
    "opt": {"ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
    "gemma": {"head_dim": HIDDEN // HEADS},
    "gemma2": {"head_dim": HIDDEN // HEADS, "query_pre_attn_scalar": HIDDEN // HEADS, "sliding_window": 128},
    "gemma3_text": {
        "head_dim": HIDDEN // HEADS,
        "query_pre_attn_scalar": HIDDEN // HEADS,
        "sliding_window": 128,
    },
    "qwen3": {"head_dim": HIDDEN // HEADS},
}


def fresh(family: str, place: Path) -> str:
    """A model with random weights as transformers makes it, with a tokenizer of bytes."""
    torch.manual_seed(0)
    keys = {
        "vocab_size": 257, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "max_position_embeddings": 512,
        "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256,
    }  # fmt: skip
    if family in ("opt", "gpt_neox"):
        del keys["num_key_value_heads"]
    if family == "opt":
        del keys["intermediate_size"]
    config = AutoConfig.for_model(family, **keys, **OWN_KEYS.get(family, {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    save_byte_tokenizer(place)
    return str(place)


def windows_of(tokenizer, text: str, count: int, draw: torch.Generator) -> torch.Tensor:
    """Windows from anywhere in a text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = torch.randperm(len(ids) // LENGTH - 1, generator=draw)[:count] * LENGTH
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


def shrink(source, windows: Windows, cut: dict[str, int]) -> dict[str, object] | None:
    """Losses before and after, by recipe; None where the family cannot lose that."""
    target = source.sizes.replace(**cut)
    try:
        plan_shrink("model", source.family, source.config, target)
    except SizeError:
        return None
    weights, stream, chosen, felt = Stored(source), None, {}, {}
    if "hidden_size" in cut:
        survey = survey_stream(Walk(weights), few(windows.fit), tied=target.tied)
        stream = survey.encoder(target.hidden_size)
    row: dict[str, object] = {}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            if recipe.solve not in chosen:
                best = Recipe(solve=recipe.solve)
                felt[recipe.solve] = importance_for(Walk(weights), target, windows, place, best)
                chosen[recipe.solve] = choose_layers(
                    weights, target, stream, windows, place, recipe=best, felt=felt[recipe.solve]
                )
            found = rebuild(
                weights, target, chosen[recipe.solve], stream, windows, place, recipe=recipe,
                felt=felt[recipe.solve],
            )  # fmt: skip
        row["source"], row[name] = found.losses["other"]
    return row | {"layers_cut": chosen[False], "layers": chosen[True]}


def main() -> None:
    """Train, shrink and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=family_names(), choices=family_names())
    parser.add_argument("--tokens", default="400k", help="that each model learns from")
    parser.add_argument("--windows", type=int, default=128, help="of 256 bytes to fit on")
    parser.add_argument("--name", default="shrink_families", help="of the result")
    asked = parser.parse_args()
    tokens, rows = parse_count(asked.tokens), []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = corpus(place, 6 * tokens)
        modules = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
        first = len(modules) // 2
        data.write_text("\n".join(json.dumps({"text": text}) for text in modules[:first]), encoding="utf-8")
        draw, byte_tokens = torch.Generator().manual_seed(0), place / "tokenizer"
        save_byte_tokenizer(byte_tokens)
        tokenizer = AutoTokenizer.from_pretrained(byte_tokens)
        seen = windows_of(tokenizer, "".join(modules[:first]), asked.windows + 16, draw)
        other = windows_of(tokenizer, "".join(modules[first:]), 64, draw)
        windows = Windows(seen[16:], seen[:16], {"other": other})
        for family in asked.families:
            learn(fresh(family, place / "fresh"), place / "out", data, tokens, 2e-3, 0)
            source = open_checkpoint(str(place / "out"))
            for axis, cut in CUTS.items():
                row = shrink(source, windows, cut)
                if row is not None:
                    rows.append({"family": family, "axis": axis} | row)
                    print(rows[-1], flush=True)
                    save(asked.name, {"tokens": tokens, "windows": asked.windows, "rows": rows})


if __name__ == "__main__":
    main()
