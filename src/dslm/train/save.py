"""A trained model on disk: a plain checkpoint like its base, or an adapter, with a card and a record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from dslm.checkpoint.card import front_matter, short_figure
from dslm.checkpoint.config import card_metadata, config_text, files_to_copy
from dslm.checkpoint.oracle import stored_parameters
from dslm.checkpoint.reader import Checkpoint, torch_dtype
from dslm.checkpoint.writer import Planned, Writer
from dslm.errors import CheckpointError
from dslm.families import Tensor
from dslm.output import headers_hash, planned, recorded
from dslm.progress import Progress
from dslm.sizes import count_parameters


def table_lines(model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameter names of a loaded model -> their lines of the family's table.

    Raises:
        CheckpointError: the table and the transformers class do not agree.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layout = checkpoint.family.layout(checkpoint.config)
    parameters = stored_parameters(model, layout)
    return {names[id(parameters[name])]: line for name, line in layout.items()}


def save_plain(
    checkpoint: Checkpoint,
    state: Mapping[str, torch.Tensor],
    lines: Mapping[str, Tensor],
    out: Path,
    run: Mapping[str, Any],
    extra: Mapping[str, Path],
    *,
    overwrite: bool,
    progress: Progress | None = None,
) -> None:
    """Write trained weights as a checkpoint like their base: same names, same dtypes, same small files.

    Args:
        checkpoint: the base.
        state: parameter name -> numbers.
        lines: parameter name -> its line of the family's table.
        out: folder to write.
        run: what is recorded about the training.
        extra: names of files and folders in the output -> where they are now.
        overwrite: replace an existing folder.
        progress: called with a label, bytes done and bytes in all.

    Raises:
        CheckpointError: the place is taken, the disk is full, or the numbers are not finite.
    """
    by_name = {line.name: state[name] for name, line in lines.items()}
    tensors = planned(checkpoint, checkpoint.config, None)
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    with Writer(out, tensors, overwrite=overwrite) as writer:
        for path, shard in writer.order:
            writer.start_shard(path, shard)
            for target in shard:
                writer.write(target, _rows(by_name[target.name], target))
                done += target.nbytes
                if progress is not None:
                    progress("writing", done, total)
        writer.add_text("config.json", config_text(checkpoint.config))
        _finish(writer, checkpoint, run, extra)
        writer.seal()
        writer.publish()


def _rows(values: torch.Tensor, target: Planned) -> Iterator[torch.Tensor]:
    cast = values.detach().cpu().to(torch_dtype(target.dtype))
    if not torch.isfinite(cast).all():
        raise CheckpointError(
            f"{target.name!r} holds NaN or infinite numbers after training", "lower --learning-rate"
        )
    yield cast


def save_adapter(
    checkpoint: Checkpoint,
    adapter: Path,
    out: Path,
    run: Mapping[str, Any],
    extra: Mapping[str, Path],
    *,
    overwrite: bool,
) -> None:
    """Write an adapter as peft loads it, with the base's tokenizer, a card and a record beside it."""
    with Writer(out, [], overwrite=overwrite) as writer:
        for path in sorted(adapter.iterdir()):
            if path.name != "README.md":
                writer.add_copy(path)
        _finish(writer, checkpoint, run, extra)
        writer.publish()


def _finish(
    writer: Writer, checkpoint: Checkpoint, run: Mapping[str, Any], extra: Mapping[str, Path]
) -> None:
    assert checkpoint.folder is not None, "weights were read, so there is a folder"
    for path in files_to_copy(checkpoint.folder):
        writer.add_copy(path)
    for name, path in extra.items():
        if path.exists():
            writer.add_copy(path, name)
    before = recorded(checkpoint)
    record = {
        **({"schema": 1} | before),
        "trained": [*before.get("trained", []), {**run, "base_headers_sha256": headers_hash(checkpoint)}],
        "parameters": before.get("parameters")
        or {"total": count_parameters(checkpoint.family, checkpoint.config)["total"]},
        "versions": {
            name: metadata.version(name) for name in ("dslm", "torch", "transformers", "accelerate")
        },
    }
    writer.add_text("dslm.json", json.dumps(record, indent=2) + "\n")
    writer.add_text("README.md", _card(writer.out.name, checkpoint, run, picture="loss.png" in extra))


def _card(name: str, checkpoint: Checkpoint, run: Mapping[str, Any], *, picture: bool) -> str:
    """The model card; of a resized model, its own with a section on the training."""
    assert checkpoint.folder is not None, "weights were read, so there is a folder"
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    text = (resources.files("dslm.checkpoint") / "trained.md.jinja").read_text(encoding="utf-8")
    card = checkpoint.folder / "README.md"
    # What the card of a resized model says about the resize stays true.
    resized = "plan" in recorded(checkpoint) and card.is_file()
    front = front_matter(run["base"], card_metadata(checkpoint.folder), ["dslm", "trained"])
    section = template.from_string(text).render(
        name=name,
        front_matter="" if resized else yaml.safe_dump(front, sort_keys=False),
        run=run,
        picture=picture,
        measured={label: short_figure(value) for label, value in run["measured"].items()},
    )
    if not resized:
        return section
    before = card.read_text(encoding="utf-8", errors="replace")
    return re.sub("(?m)^# .*$", lambda _: f"# {name}", before, count=1) + section
