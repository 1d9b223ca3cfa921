"""From computed tensors to a finished checkpoint: the part of a resize that growing and shrinking share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dslm.checkpoint.card import command_of, render_card, without_places
from dslm.checkpoint.config import card_metadata, config_text, files_to_copy
from dslm.checkpoint.oracle import checking_beside
from dslm.checkpoint.reader import Checkpoint
from dslm.checkpoint.writer import Planned, Writer, check_output
from dslm.families import Tensor
from dslm.plan import Plan
from dslm.progress import Progress
from dslm.sizes import count_parameters

Check = Callable[[Path], Mapping[str, Any]]
Rows = Callable[[Tensor, Planned], Iterator[torch.Tensor]]


def planned(
    source: Checkpoint, config: Mapping[str, Any], dtype: str | None, layers: Sequence[int] | None = None
) -> list[Planned]:
    """The tensors of an output with their dtypes: those of the source, or one for all.

    Args:
        source: the model that is resized.
        config: the output's config.
        dtype: safetensors code, or None to keep each tensor's.
        layers: the source block of each block of the output; the one of the same number if None.
    """
    layers = range(source.family.dimensions(config)["layers"]) if layers is None else layers
    return [
        Planned(t.name, dtype or source.entries[origin(source, t, layers)].dtype, t.shape)
        for t in source.family.layout(config).values()
    ]


def origin(source: Checkpoint, tensor: Tensor, layers: Sequence[int]) -> str:
    """The source tensor that an output tensor has its dtype from, and where it grew, what it comes from.

    Args:
        source: the model that is resized.
        tensor: of the output.
        layers: the source block of each block of the output.
    """
    name = tensor.name if tensor.layer is None else tensor.in_layer(layers[tensor.layer])
    if name in source.entries:
        return name
    return source.family.embedding  # a head that was tied


def check_place(
    source: Checkpoint, tensors: list[Planned], out: Path, *, overwrite: bool, beside: int = 0
) -> None:
    """Refuse an output place before any work is done.

    Args:
        source: the model that is resized.
        tensors: what will be written.
        out: where.
        overwrite: an existing folder may be replaced.
        beside: bytes that lie beside it for the time being.

    Raises:
        CheckpointError: the place is taken, touches the source, or has too little room.
    """
    check_output(out, source.folder, beside + sum(t.nbytes for t in tensors), overwrite=overwrite)


def write_output(
    source: Checkpoint,
    plan: Plan,
    config: Mapping[str, Any],
    out: Path,
    rows: Rows,
    *,
    label: str,
    methods: Mapping[str, str],
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
    measured: Mapping[str, Any] | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint: weights as a stream, the edited config, the source's small files, a card and a record.

    Args:
        source: the model that was resized.
        plan: how.
        config: the output's config.
        out: the folder to write.
        rows: computes a tensor as consecutive runs of rows in its dtype.
        label: what is being done, for the progress.
        methods: method -> URL of its source.
        layers: the source block of each block of the output, for its dtypes; the one of the same number if None.
        overwrite: replace an existing folder.
        measured: figures for the card and the record.
        check: given the finished folder before it takes its place, returns more of them; what it raises
            keeps the checkpoint from appearing.
        progress: called with a label, bytes done and bytes in all.

    Returns:
        All that was measured.

    Raises:
        SizeError: transformers refuses the config.
        CheckpointError: the disk is full, or a family's table is wrong.
    """
    layout = source.family.layout(config)
    tensors = planned(source, config, plan.dtype, layers)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    shapes = {tensor.name: tensor.shape for tensor in layout.values()}
    with checking_beside(config, shapes) as verdict, Writer(out, tensors, overwrite=overwrite) as writer:
        for path, shard in writer.order:
            writer.start_shard(path, shard)
            for target in shard:
                if verdict.done():  # a refusal need not wait for the last byte
                    verdict.result()
                writer.write(target, rows(layout[target.name], target))
                done += target.nbytes
                if progress is not None:
                    progress(label, done, total)
        _copy_small_files(writer, source, config)
        writer.seal()
        verdict.result()
        found = dict(measured or {}) | dict(check(writer.folder) if check is not None else {})
        _write_record(writer, source, plan, config, methods, found)
        if progress is not None:
            progress(label, total, total)
        writer.publish()
    return found


def _copy_small_files(writer: Writer, source: Checkpoint, config: Mapping[str, Any]) -> None:
    """The edited config, and everything of the source that a resize does not change."""
    assert source.folder is not None, "weights were read, so there is a folder"
    for path in files_to_copy(source.folder):
        writer.add_copy(path)
    writer.add_text("config.json", config_text(config))


def _write_record(
    writer: Writer,
    source: Checkpoint,
    plan: Plan,
    config: Mapping[str, Any],
    methods: Mapping[str, str],
    measured: Mapping[str, Any],
) -> None:
    """The card for people and the record for programs."""
    assert source.folder is not None, "weights were read, so there is a folder"
    before, after = (count_parameters(source.family, c)["total"] for c in (source.config, config))
    metadata_before = card_metadata(source.folder)
    card = render_card(writer.out.name, plan, (before, after), methods, metadata_before, measured)
    writer.add_text("README.md", card)
    record = {
        "schema": 1,
        "command": command_of(plan),
        "plan": without_places(plan).as_dict(),
        "parameters": {"before": before, "after": after},
        "measured": dict(measured),
        "source": {"headers_sha256": headers_hash(source)},
        "versions": {
            name: metadata.version(name) for name in ("dslm", "torch", "transformers", "safetensors")
        },
    }
    writer.add_text("dslm.json", json.dumps(record, indent=2) + "\n")


def recorded(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``dslm.json`` says about a checkpoint; empty where there is none that can be read."""
    return {} if checkpoint.folder is None else record_of(checkpoint.folder)


def record_of(folder: Path) -> dict[str, Any]:
    """What ``dslm.json`` in a folder says; empty where there is none that can be read."""
    path = folder / "dslm.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def headers_hash(source: Checkpoint) -> str:
    """Fingerprint of what the source holds and where, without reading its weights."""
    listing = [(e.name, e.dtype, e.shape, e.start, e.stop) for e in source.entries.values()]
    return hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()
