"""Adapters by peft: put onto a model, four-bit or not, and merged into it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dslm.checkpoint.reader import Checkpoint
from dslm.errors import CheckpointError, RecipeError, tells_of_memory
from dslm.load import load_model, need
from dslm.train.settings import Training

_ALL = "all-linear"
_CANNOT_RUN = (ImportError, RuntimeError, NotImplementedError, AttributeError)
"""What bitsandbytes, and transformers for it, raise where it is too old or there is no device for it."""


def load_four_bit(checkpoint: Checkpoint, device: str) -> Any:
    """A model with its matrices in NF4, double quantised, computed in bfloat16 (QLoRA, arXiv 2305.14314).

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        RecipeError: it cannot run here.
        CheckpointError: transformers cannot load the model.
    """
    import torch
    from transformers import BitsAndBytesConfig

    need("bitsandbytes", "qlora", "--qlora")
    peft = need("peft", "train", "--qlora")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        model = load_model(checkpoint, dtype="bfloat16", device=device, quantization=nf4)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    except (CheckpointError, *_CANNOT_RUN) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if not isinstance(cause, _CANNOT_RUN) or tells_of_memory(cause):
            raise
        why = " ".join(str(cause).split())[:200]
        raise RecipeError(f"bitsandbytes cannot run here: {why}", "train with --lora instead") from error


def add_adapters(model: Any, asked: Training) -> Any:
    """Put low-rank adapters onto a model (LoRA, arXiv 2106.09685).

    Args:
        model: the base, whose own weights are frozen.
        asked: rank, scale, dropout and target of the adapters.

    Raises:
        MissingExtraError: peft is not installed.
        RecipeError: there are no such modules, or the adapter could not be merged.
    """
    peft = need("peft", "train", "training adapters")
    names = [name.strip() for name in asked.lora_target.split(",") if name.strip()]
    if [name.lower() for name in names] == [_ALL]:
        names = [_ALL]
    else:
        _check_targets(model, names, merge=asked.merge)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=asked.lora_r,
        lora_alpha=asked.lora_alpha,
        lora_dropout=asked.lora_dropout,
        target_modules=_ALL if names == [_ALL] else names,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = ""  # peft asks the hub about what it finds there
    return adapted


def _check_targets(model: Any, names: list[str], *, merge: bool) -> None:
    """Refuse modules that are not there, and those into which no adapter can be merged."""
    if _ALL in names:
        raise RecipeError(f"{_ALL} beside other modules", f"{_ALL} stands alone")
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    places = {place: m for place, m in model.named_modules() if hasattr(m, "in_features") or m in tables}
    found = {name: [place for place in places if f".{place}".endswith(f".{name}")] for name in names}
    if missing := [name for name in names if not found[name]] or [""] * (not names):
        known = sorted({place.rpartition(".")[2] for place in places})
        raise RecipeError(
            f"no modules called {missing[0]!r} to put adapters on", f"take {_ALL}, or of {', '.join(known)}"
        )
    if merge and tables[0].weight is tables[1].weight:
        for name, ends in found.items():
            if any(places[place] in tables for place in ends):
                raise RecipeError(
                    f"what is learned by {name} cannot be merged: table and head are one matrix in this model",
                    "leave out --merge, or untie the model with dslm up --untie",
                )


def merge_adapter(checkpoint: Checkpoint, adapter: Path) -> Any:
    """The unquantised base in float32 with an adapter added into its matrices: a plain model."""
    peft = need("peft", "train", "merging an adapter")
    model = load_model(checkpoint, dtype="float32")
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
