"""Stock transformers models and tokenizers of a checkpoint, loaded quietly and only from its folder."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dslm.errors import CheckpointError, DslmError, MissingExtraError, enough_memory

if TYPE_CHECKING:
    import torch

    from dslm.checkpoint.reader import Checkpoint

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def need(package: str, extra: str, what: str) -> Any:
    """Import an optional package.

    Raises:
        MissingExtraError: it is not installed; the hint is the command that installs it.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it remarks on kernels that it does without
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(f"{what} needs {package}", f"pip install 'dslm[{extra}]'") from error


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str | None = None,
    quantization: Any = None,
) -> Any:
    """Load the weights with transformers' own class, and the adapter that goes with them, ready for inference.

    Args:
        checkpoint: an opened checkpoint with its weights.
        dtype: one of `DTYPES`; ``auto`` is the dtype of the checkpoint.
        device: one of `DEVICES`.
        attention: transformers' name of an attention implementation; None is the model's own default.
        quantization: transformers' configuration of a quantisation that is done while loading.

    Returns:
        A ``PreTrainedModel`` in evaluation mode.

    Raises:
        CheckpointError: transformers cannot load it, or the adapter is for another model.
        MissingExtraError: the adapter needs a package that is not installed.
        DslmError: there is no such device.
        OutOfMemoryError: the memory is not enough for it.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    unfit = (OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError, StrictDataclassError)

    silence_transformers()
    folder, target = _folder(checkpoint), pick_device(device)
    numbers = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with enough_memory(
            f"to load {checkpoint.name}", "take a machine with more of it, or a smaller model"
        ):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=numbers,
                attn_implementation=attention,
                quantization_config=quantization,
                device_map=None if quantization is None else {"": target},
                local_files_only=True,
                trust_remote_code=False,
            )
    except unfit as error:
        raise CheckpointError(f"transformers cannot load {checkpoint.name}: {first_line(error)}") from error
    if checkpoint.adapter is not None:
        _put_on(model, checkpoint.adapter, checkpoint.name)
    return (model if quantization is not None else model.to(target)).eval()


def _put_on(model: Any, adapter: Path, name: str) -> None:
    """Give a model's own layers the adapter's; they stay apart, so nothing is rounded."""
    peft = need("peft", "train", "an adapter")
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        peft.PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{adapter} cannot be put on {name}: {first_line(error)}", "give the model that it was trained on"
        ) from error
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):  # prompts, for example
        raise CheckpointError(
            f"{adapter} changes no layer of a model", "give an adapter with low-rank matrices for layers"
        )


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's folder holds a tokenizer."""
    folder = checkpoint.folder
    return folder is not None and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a checkpoint.

    Returns:
        A transformers tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    folder = _folder(checkpoint)
    if not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer",
            f"copy tokenizer.json and tokenizer_config.json of the model it was made from into {folder}",
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    silence_transformers()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:  # the tokenizer's class is told by the config
        raise CheckpointError(
            f"transformers refuses the config of {checkpoint.name}: {first_line(error)}",
            "mend its config.json",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} cannot be loaded: {first_line(error)}",
            "copy its files again from the original model",
        ) from error


def check_token_ids(name: str, vocab: int, ids: Iterable[int]) -> None:
    """Refuse tokens that a model does not have.

    Args:
        name: of the model.
        vocab: rows of its table.
        ids: what its tokenizer gave.

    Raises:
        CheckpointError: one is not in the table.
    """
    highest = max(ids, default=0)
    if highest >= vocab:
        raise CheckpointError(
            f"the tokenizer of {name} gives token {highest}, and the model has {vocab}",
            "tokenizer and model do not belong together",
        )


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes the first accelerator there is.

    Raises:
        DslmError: this machine, or this build of torch, has no such device.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(candidate for candidate in ("cuda", "mps", "cpu") if there[candidate])
    if not there.get(name):
        usable = ", ".join(candidate for candidate, present in there.items() if present)
        raise DslmError(f"torch finds no device {name!r} here", f"usable: {usable}")
    return torch.device(name)


def silence_transformers() -> None:
    """Keep transformers' reports and bars off the terminal; dslm checks what it loads itself."""
    from transformers.utils import logging as noise

    noise.set_verbosity_error()
    noise.disable_progress_bar()


def _folder(checkpoint: Checkpoint) -> Path:
    if checkpoint.folder is None:
        raise CheckpointError(
            f"only the description of {checkpoint.name} was fetched", "open it with its weights"
        )
    return checkpoint.folder


def first_line(error: BaseException) -> str:
    """What an error says, on one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
