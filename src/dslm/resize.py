"""The one loop: for each tensor of the target, read what it comes from, apply its maps, write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dslm.checkpoint.card import command_of, render_card
from dslm.checkpoint.config import card_metadata, config_text, files_to_copy, with_dtype
from dslm.checkpoint.oracle import checking_beside
from dslm.checkpoint.reader import Checkpoint, torch_dtype
from dslm.checkpoint.writer import Planned, Writer, check_output
from dslm.errors import CheckpointError
from dslm.families import Family, Tensor
from dslm.grow import METHODS
from dslm.grow.apply import grown_rows
from dslm.grow.maps import Growth, build_growth
from dslm.grow.split import Split, split_named
from dslm.plan import Plan, check_plan
from dslm.sizes import count_parameters

Progress = Callable[[str, int, int], None]
Check = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Resized:
    """What a resize made.

    Attributes:
        folder: the finished checkpoint.
        parameters: before and after.
        nbytes: bytes of weights written.
        measured: what the check that was asked for found.
    """

    folder: Path
    parameters: tuple[int, int]
    nbytes: int
    measured: Mapping[str, Any]


def target_config(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's config with the plan's sizes and dtype."""
    return with_dtype(plan.target.into_config(source.family, source.config), plan.dtype)


def resize(
    source: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    check: Check | None = None,
    progress: Progress | None = None,
) -> Resized:
    """Write the checkpoint that a plan describes.

    Memory stays at a few pieces of one tensor (`dslm.grow.apply.CHUNK_BYTES`), whatever the model's size. The
    output appears whole or not at all, and is the same bytes for the same plan.

    Args:
        source: the model to grow.
        plan: what to make of it.
        out: folder to write.
        overwrite: replace an existing folder.
        check: given the finished checkpoint before it takes its place, returns what it measured; what it raises
            keeps the checkpoint from appearing.
        progress: called with a label, bytes done and bytes in all.

    Raises:
        SizeError, RecipeError: the plan has no exact solution, or transformers refuses the sizes.
        CheckpointError: the output place is not usable, or the source changed while it was read.
    """
    check_plan(plan, source.family, source.config)
    config = target_config(source, plan)
    layout = source.family.layout(config)
    planned = [_planned(source, tensor, plan) for tensor in layout.values()]
    total = sum(tensor.nbytes for tensor in planned)
    check_output(out, source.folder, total, overwrite=overwrite)
    growth = build_growth(source.family, source.config, plan, torch_dtype(plan.dtype or source.dtype))
    split = split_named(plan.split, plan.snr_db)
    parameters = _count(source.family, source.config), _count(source.family, config)
    shapes = {tensor.name: tensor.shape for tensor in layout.values()}
    done = 0
    with (
        checking_beside(config, shapes) as verdict,
        Writer(out, planned, overwrite=overwrite) as writer,
    ):
        for path, tensors in writer.order:
            writer.start_shard(path, tensors)
            for target in tensors:
                writer.write(target, _grown(source, layout[target.name], target, growth, plan, split))
                done += target.nbytes
                if progress is not None:
                    progress("growing", done, total)
        _copy_small_files(writer, source, config)
        writer.seal()
        verdict()
        measured = check(writer.folder) if check is not None else {}
        _write_record(writer, source, plan, parameters, measured)
        if progress is not None:
            progress("growing", total, total)
        writer.publish()
    return Resized(folder=out, parameters=parameters, nbytes=total, measured=measured)


def _planned(source: Checkpoint, tensor: Tensor, plan: Plan) -> Planned:
    return Planned(tensor.name, plan.dtype or source.entries[_origin(source, tensor)].dtype, tensor.shape)


def _origin(source: Checkpoint, tensor: Tensor) -> str:
    """The source tensor that a target tensor comes from: itself, or the table for a head that was tied to it."""
    return tensor.name if tensor.name in source.entries else source.family.embedding


def _grown(
    source: Checkpoint, tensor: Tensor, target: Planned, growth: Growth, plan: Plan, split: Split
) -> Iterator[torch.Tensor]:
    origin = _origin(source, tensor)
    return grown_rows(
        tensor,
        growth.tensor_map(tensor),
        source.entries[origin].shape[0],
        partial(_read_finite, source, origin),
        torch_dtype(target.dtype),
        split,
        plan.seed,
    )


def _read_finite(source: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a source tensor, which must be numbers: a NaN would spread to every copy."""
    rows = source.read_rows(name, start, stop)
    low, high = torch.aminmax(rows)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{source.name}: {name!r} holds NaN or infinite numbers in rows {start} to {stop - 1}",
            "the checkpoint is broken; use one from before that",
        )
    return rows


def _copy_small_files(writer: Writer, source: Checkpoint, config: Mapping[str, Any]) -> None:
    """The edited config, and everything of the source that a resize does not change."""
    assert source.folder is not None, "weights were read, so there is a folder"
    for path in files_to_copy(source.folder):
        writer.add_copy(path)
    writer.add_text("config.json", config_text(config))


def _write_record(
    writer: Writer, source: Checkpoint, plan: Plan, parameters: tuple[int, int], measured: Mapping[str, Any]
) -> None:
    """The card for people and the record for programs."""
    assert source.folder is not None, "weights were read, so there is a folder"
    citations = {name: method.source for name, method in METHODS.items()}
    metadata_before = card_metadata(source.folder)
    card = render_card(writer.out.name, plan, parameters, citations, metadata_before, measured)
    writer.add_text("README.md", card)
    record = {
        "schema": 1,
        "command": command_of(plan),
        "plan": plan.as_dict(),
        "parameters": {"before": parameters[0], "after": parameters[1]},
        "measured": dict(measured),
        "source": {"headers_sha256": _headers_hash(source)},
        "versions": {
            name: metadata.version(name) for name in ("dslm", "torch", "transformers", "safetensors")
        },
    }
    writer.add_text("dslm.json", json.dumps(record, indent=2) + "\n")


def _count(family: Family, config: Mapping[str, Any]) -> int:
    return count_parameters(family, config)["total"]


def _headers_hash(source: Checkpoint) -> str:
    """Fingerprint of what the source holds and where, without reading its weights."""
    listing = [(e.name, e.dtype, e.shape, e.start, e.stop) for e in source.entries.values()]
    return hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()
