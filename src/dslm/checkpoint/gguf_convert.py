"""One GGUF file to one plain checkpoint folder, through transformers, with what it may lose on the way checked.

transformers drops tensors it has no place for, fills those that are missing at random, and splits text by a default
rule where it does not know the file's. Here each of these is compared with the file, and mended or refused.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from dslm.checkpoint.gguf_contents import ORIGINAL, Contents, fill_config, read_contents, shortest
from dslm.checkpoint.headers import read_json
from dslm.checkpoint.reader import read_entries
from dslm.errors import CheckpointError
from dslm.families import family_of
from dslm.progress import Progress

_NOT_CONFIG = ("_model_name_or_path", "_name_or_path", "unk_token_id", "quantization_config")
_WHOLE_DIGITS = ("gpt-2", "gpt2", "default", "olmo")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def convert(path: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write a GGUF file as config, bf16 safetensors and tokenizer into an existing folder.

    Peak memory is about two copies of the weights in bf16, and what transformers itself takes.

    Raises:
        CheckpointError: the file is damaged, or lost something on the way.
        UnsupportedFamilyError: it holds something that is not supported.
    """
    from huggingface_hub.errors import StrictDataclassError

    report = progress or (lambda what, done, total: None)
    report(f"reading {path.name}", 0, 3)
    contents = read_contents(path)
    try:
        config = _config(contents)
        report(f"converting the weights of {path.name}", 1, 3)
        missing = _save_weights(contents, folder, config)
        report(f"converting the tokenizer of {path.name}", 2, 3)
        _save_tokenizer(contents, folder, config.max_position_embeddings)
    except (ValueError, KeyError, IndexError, RuntimeError, StrictDataclassError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"transformers cannot convert {path.name}: {reason}", ORIGINAL) from error
    _mend_config(folder)
    _mend_tokenizer(folder, contents)
    _check_nothing_lost(folder, contents, missing)
    report(f"converted {path.name}", 3, 3)


def _config(contents: Contents) -> Any:
    """The transformers config, known to the family table before any weight is read."""
    with _quiet():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(contents.path.parent), gguf_file=contents.path.name)
        fill_config(config, contents)
    family_of(_plain(config.to_diff_dict()))
    return config


def _save_weights(contents: Contents, folder: Path, config: Any) -> list[str]:
    """Write the weights; the names of parameters that the file did not fill are returned."""
    with _quiet():
        import torch
        import transformers

        # Newer versions keep a GGUF's blocks packed unless told not to, and then nothing can be saved.
        may_pack = hasattr(transformers, "GgufConfig")
        extra = {"quantization_config": transformers.GgufConfig(dequantize=True)} if may_pack else {}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(contents.path.parent),
            gguf_file=contents.path.name,
            config=config,
            dtype=torch.bfloat16,
            output_loading_info=True,
            **extra,
        )
        model.save_pretrained(str(folder), max_shard_size="5GB")
    return sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))


def _save_tokenizer(contents: Contents, folder: Path, context: int) -> None:
    with _quiet():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(contents.path.parent), gguf_file=contents.path.name)
        tokenizer.model_max_length = context
        tokenizer.save_pretrained(str(folder))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_CONFIG}


def _mend_config(folder: Path) -> None:
    """Write both spellings of what transformers 5 renamed: without ``rope_theta``, 4.x takes 10000."""
    config = {key: shortest(value) for key, value in _plain(read_json(folder / "config.json")).items()}
    rope = config["rope_parameters"]
    main = rope.get("full_attention", rope)
    config["rope_theta"] = main["rope_theta"]
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if main.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in main.items() if key != "rope_theta"}
    config["torch_dtype"] = config["dtype"]
    _write_json(folder / "config.json", dict(sorted(config.items())))


def _mend_tokenizer(folder: Path, contents: Contents) -> None:
    """Give the tokenizer a class name that every transformers knows, and the digit rule of its own file."""
    settings = read_json(folder / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # In 4.x that class also hands out token types, which no model here takes.
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    _write_json(folder / "tokenizer_config.json", settings)
    if contents.tokenizer != "gpt2" or contents.splitter in ("", *_WHOLE_DIGITS):
        return
    tokenizer = read_json(folder / "tokenizer.json")
    splitting = tokenizer["pre_tokenizer"]
    if contents.splitter in _SINGLE_DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}, splitting]
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        _write_json(folder / "tokenizer.json", tokenizer)
    elif splitting["type"] != "Sequence":  # transformers writes a sequence where it knows the rule
        raise CheckpointError(
            f"{contents.path.name} splits text by the rule {contents.splitter!r}, which is not known here",
            ORIGINAL,
        )


def _check_nothing_lost(folder: Path, contents: Contents, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{contents.path.name} lacks {', '.join(missing[:3])}", "download or copy it again"
        )
    written = sum(entry.parameters for entry in read_entries(folder).values())
    if written != contents.parameters:
        raise CheckpointError(
            f"{contents.path.name} holds {contents.parameters:,} parameters, "
            f"and a {contents.architecture} model of its sizes {written:,}",
            ORIGINAL,
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes, and leave its settings as they were."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
