"""``dslm desc``: what a model is, from its config and its headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dslm.checkpoint.config import DTYPE_NAMES
from dslm.cli.common import console, model_argument, open_model, output_options, print_json
from dslm.report.tables import columns_table, pairs_table, short_bytes, short_count
from dslm.sizes import count_parameters, kv_cache_bytes_per_token

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint

_PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "ffn": "feed-forward",
    "norm": "norms",
    "head": "output head",
}


@click.command(short_help="Describe a model.")
@model_argument
@output_options
def command(model: str, as_json: bool, quiet: bool) -> None:
    """Describe a model: sizes, exact parameters, bytes, cache.

    Reads the config and the headers only, for a model on the hub too: kilobytes, not gigabytes.
    """
    checkpoint = open_model(model, weights=False, quiet=quiet)
    facts = describe_checkpoint(checkpoint)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that ``dslm desc`` says, as plain values.

    Returns:
        Names and sizes; ``parameters`` by part; ``bytes``, ``kv_cache_bytes_per_token`` and
        ``memory_bytes`` in bytes; ``context_length`` in tokens; ``sliding_window`` with its ``tokens``
        and ``layers``.
    """
    from dslm.checkpoint.headers import ITEMSIZE

    family, config, sizes = checkpoint.family, checkpoint.config, checkpoint.sizes
    counts = count_parameters(family, config)
    files = {entry.file for entry in checkpoint.entries.values() if entry.file is not None}
    context = checkpoint.context
    return {
        "name": checkpoint.name,
        "folder": str(checkpoint.folder) if checkpoint.folder else None,
        "family": family.name,
        "title": family.title,
        "architecture": family.architecture,
        "source": family.source,
        "sizes": sizes.as_dict(),
        "context_length": context,
        "dtype": DTYPE_NAMES[checkpoint.dtype],
        "parameters": counts,
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.entries),
        "files": len(files) or None,
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(sizes, ITEMSIZE[checkpoint.dtype]),
        "sliding_window": _sliding_window(checkpoint),
        "memory_bytes": {"as_stored": checkpoint.nbytes, "float32": counts["total"] * ITEMSIZE["F32"]},
    }


def _sliding_window(checkpoint: Checkpoint) -> dict[str, int | None] | None:
    """How many layers look only ``tokens`` back; ``layers`` is None where the config does not say."""
    family = checkpoint.family
    config = family.resolve(checkpoint.config)
    window, layers = config.get("sliding_window"), checkpoint.sizes.num_hidden_layers
    if not window or config.get("use_sliding_window") is False:
        return None
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    count: int | None
    if isinstance(config.get("layer_types"), list):
        count = config["layer_types"].count("sliding_attention")
    elif isinstance(period, int):
        count = layers - layers // period
    elif "max_window_layers" in config:
        count = max(0, layers - config["max_window_layers"])
    else:
        count = None if "layer_types" in family.per_layer else layers
    return {"tokens": window, "layers": count} if count != 0 else None


def _print(facts: dict[str, Any]) -> None:
    out = console()
    sizes, counts = facts["sizes"], facts["parameters"]
    files = f" in {_plural(facts['files'], 'file')}" if facts["files"] else ""
    memory = facts["memory_bytes"]
    in_float32 = "" if facts["dtype"] == "float32" else f", {short_bytes(memory['float32'])} in float32"
    rows = [
        ("family", f"{facts['title']} ({facts['architecture']})"),
        ("parameters", f"{counts['total']:,} ({short_count(counts['total'])})"),
        ("dtype", facts["dtype"]),
        ("weights", f"{short_bytes(facts['bytes'])}{files}, {facts['tensors']} tensors"),
        ("memory to load", f"{short_bytes(memory['as_stored'])} as stored{in_float32}"),
        ("KV cache", _cache(facts)),
        ("context length", _context(facts)),
        ("embeddings", "tied: input and output share one table" if sizes["tied"] else "untied: two tables"),
    ]
    out.print(facts["name"], style="bold")
    out.print(pairs_table(rows))
    out.print()
    out.print(columns_table(("size", ""), [(k, f"{v:,}") for k, v in sizes.items() if k != "tied"]))
    out.print()
    shares = [
        (_PARTS[part], f"{counts[part]:,}", f"{counts[part] / counts['total']:.1%}")
        for part in _PARTS
        if counts[part]
    ]
    out.print(columns_table(("parameters", "", "share"), [*shares, ("total", f"{counts['total']:,}", "")]))


def _context(facts: dict[str, Any]) -> str:
    return f"{facts['context_length']:,} tokens" if facts["context_length"] else "not in the config"


def _cache(facts: dict[str, Any]) -> str:
    text = f"{facts['kv_cache_bytes_per_token']:,} bytes per token in {facts['dtype']}"
    window = facts["sliding_window"]
    if window is None:
        return text
    layers = facts["sizes"]["num_hidden_layers"]
    which = "some layers" if window["layers"] is None else f"{window['layers']} of {layers} layers"
    return f"{text}; {which} keep only the last {window['tokens']:,} tokens"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
