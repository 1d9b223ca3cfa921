"""Every family grown by 1.5 in hidden_size and intermediate_size together, checked in stock transformers.

No weights of these families are at hand offline, so each is a small random model of the real class with its default
switches (tied or not, norms, biases, windows). OPT under its tied table is also untied, which the refusal asks for.

Run: ``python benchmarks/grow_families.py``.
"""

from __future__ import annotations

import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from dslm.checkpoint.reader import open_folder
from dslm.errors import RecipeError
from dslm.families import family_names
from dslm.plan import plan_growth
from dslm.resizing import resize
from dslm.targets import scaled
from measure import save

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def make(name: str, folder: Path, dtype: torch.dtype) -> None:
    """A small random model: 4 layers, 128 wide, 8 heads in 4 groups."""
    keys = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 512}
    keys |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
    if "kv_heads" in _sizes(name):
        keys |= {"num_key_value_heads": 4}
    if "head_dim" in _sizes(name):
        keys |= {"head_dim": 16}
    config = AutoConfig.for_model(name, **keys, **{_sizes(name)["intermediate"]: 384})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
    model.to(dtype).save_pretrained(folder)


def _sizes(name: str) -> dict[str, str]:
    from dslm.families import load_family

    return dict(load_family(name).size_keys)


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Logits on 256 random tokens, in float32 at least."""
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()
    ids = torch.randint(3, 512, (2, 128), generator=torch.Generator().manual_seed(1))
    return model(ids).logits.double()


def measure(name: str, dtype: torch.dtype) -> dict[str, object]:
    """Grow one family and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make(name, work / "source", dtype)
        source = open_folder(work / "source")
        target = scaled(source.family, source.config, Fraction(3, 2), Fraction(3, 2))
        untied = False
        try:
            resize(source, plan_growth(name, source.family, source.config, target), work / "out")
        except RecipeError:
            untied, target = True, target.replace(tied=False)
            resize(source, plan_growth(name, source.family, source.config, target), work / "out")
        before, after = logits(work / "source", dtype), logits(work / "out", dtype)
        kl = torch.nn.functional.kl_div(
            after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
        )
        return {
            "relative_difference": ((before - after).abs().max() / before.abs().max()).item(),
            "kl": kl.sum(-1).mean().item(),
            "agreement": (before.argmax(-1) == after.argmax(-1)).double().mean().item(),
            "untied": untied,
        }


def main() -> None:
    """Measure and save."""
    warnings.simplefilter("ignore")
    found = {
        name: {label: measure(name, dtype) for label, dtype in DTYPES.items()} for name in family_names()
    }
    save("grow_families", {"growth": "hidden_size x 1.5, intermediate_size x 1.5", "families": found})


if __name__ == "__main__":
    main()
