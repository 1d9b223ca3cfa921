"""A checkpoint as it lies on disk: described from headers, read a few rows at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dslm.checkpoint.headers import ITEMSIZE, Entry, read_header, read_index, read_json
from dslm.errors import CheckpointError, UnsupportedFamilyError
from dslm.families import Family, family_of
from dslm.sizes import Sizes

if TYPE_CHECKING:
    import torch

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class _OpenFiles(dict[Path, int]):
    """File -> its descriptor."""

    def close(self) -> None:
        while self:
            os.close(self.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()  # a copy opens files of its own


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model in the Hugging Face layout, opened but not loaded.

    Attributes:
        name: what to call it: the folder's name or the hub id.
        folder: where it lies; None where only its description was fetched.
        config: the JSON of its ``config.json``, as written.
        family: its family's table.
        entries: tensor name -> where it lies, left-overs that no model reads taken out.
        adapter: folder of low-rank adapters that are put on when the model is loaded; they are not among the entries.
    """

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    family: Family
    entries: Mapping[str, Entry]
    adapter: Path | None = None
    _files: _OpenFiles = field(default_factory=_OpenFiles, repr=False, compare=False)

    @property
    def sizes(self) -> Sizes:
        """The model's dimensions."""
        return Sizes.from_config(self.family, self.config)

    @property
    def context(self) -> int | None:
        """How many tokens the model can see at once; None if its config does not say."""
        key = self.family.size_keys.get("positions", "max_position_embeddings")
        length = self.family.resolve(self.config).get(key)
        return length if isinstance(length, int) else None

    @property
    def dtype(self) -> str:
        """The dtype that most of its parameters have, as a safetensors code."""
        counts: Counter[str] = Counter()
        for entry in self.entries.values():
            counts[entry.dtype] += entry.parameters
        return counts.most_common(1)[0][0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype, as a fresh tensor.

        Nothing else of the file is read and nothing stays in memory. A vector counts as rows of one number.

        Raises:
            CheckpointError: the file has become shorter than its header says.
        """
        import torch

        entry = self.entries[name]
        row_bytes = prod(entry.shape[1:]) * ITEMSIZE[entry.dtype]
        buffer = bytearray((stop - start) * row_bytes)
        self._fill(entry, buffer, entry.start + start * row_bytes)
        flat = torch.frombuffer(buffer, dtype=torch_dtype(entry.dtype))
        return flat.view(stop - start, *entry.shape[1:])

    def read_finite_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """`read_rows`, refusing what is no number: a NaN would spread to everything that is computed from it.

        Raises:
            CheckpointError: they hold NaN or infinite numbers, or the file has become shorter.
        """
        import torch

        rows = self.read_rows(name, start, stop)
        low, high = torch.aminmax(rows)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{self.name}: {name!r} holds NaN or infinite numbers in rows {start} to {stop - 1}",
                "the checkpoint is broken; use one from before that",
            )
        return rows

    def _fill(self, entry: Entry, buffer: bytearray, position: int) -> None:
        if entry.file is None:
            raise CheckpointError(
                f"only the description of {self.name} was fetched", "open it with its weights"
            )
        handle = self._files.get(entry.file)
        if handle is None:
            handle = self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
        view = memoryview(buffer)
        while view:
            count = os.preadv(handle, [view], position)
            if count <= 0:
                raise CheckpointError(
                    f"{entry.file} ended while {entry.name!r} was read", "has it been changed?"
                )
            view, position = view[count:], position + count

    def close(self) -> None:
        """Close every file that reading has opened; what is forgotten is closed when nothing refers to it."""
        self._files.close()


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[code]


def open_folder(folder: Path, name: str | None = None) -> Checkpoint:
    """Open a local checkpoint: one safetensors file or several with an index.

    Reads ``config.json`` and headers only.

    Args:
        folder: the checkpoint's folder.
        name: what to call it; the folder's name by default.

    Raises:
        CheckpointError: something is missing, damaged, or not weights we can read.
        UnsupportedFamilyError: the family, a config key or a tensor is unknown.
    """
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist", "give a checkpoint folder, a hub id or a .gguf file"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", "give the folder that holds config.json")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter and no model",
            "give the model that it was trained on, and --adapter FOLDER",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json", "give a checkpoint in the Hugging Face layout")
    config = read_json(folder / "config.json")
    family = family_of(config)
    return describe(name or folder.resolve().name, folder, config, family, read_entries(folder))


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers of its files.

    Raises:
        CheckpointError: there are no safetensors files, or they contradict the index.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_index(index)
        files = sorted(set(weight_map.values()))
    else:
        whole = folder / "model.safetensors"  # beside it may lie the same weights in another layout
        found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
        files = [whole] if whole in found else found
        if len(files) > 1:
            raise CheckpointError(
                f"{folder} holds {len(files)} safetensors files and no model.safetensors.index.json",
                "download the index as well",
            )
    if not files:
        if any(True for pattern in _PICKLED for _ in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} holds pickled weights, which can run code when opened",
                "convert them: load with transformers and save_pretrained(...) writes safetensors",
            )
        raise CheckpointError(f"{folder} has no safetensors weights", "download model.safetensors as well")
    entries: dict[str, Entry] = {}
    for file in files:
        for tensor, entry in read_header(file).items():
            if tensor in entries:
                raise CheckpointError(
                    f"{tensor!r} is in {entries[tensor].file} and in {file}", "download it again"
                )
            entries[tensor] = entry
    if index.is_file():
        for tensor, file in weight_map.items():
            if tensor not in entries or entries[tensor].file != file:
                raise CheckpointError(
                    f"{index} says {tensor!r} is in {file.name}, and it is not", "download it again"
                )
    return entries


def describe(
    name: str, folder: Path | None, config: dict[str, Any], family: Family, entries: Mapping[str, Entry]
) -> Checkpoint:
    """Match what is on disk against the family's table.

    Raises:
        UnsupportedFamilyError: a tensor is not in the table.
        CheckpointError: a tensor is missing, has another shape than the config implies, or is not a float.
    """
    layers = family.dimensions(config)["layers"]
    if layers > len(entries):
        raise CheckpointError(
            f"{name} lacks tensors: its config implies {layers} layers, and it holds {len(entries)}",
            "config and weights do not belong together",
        )
    layout = family.layout(config)
    redundant = {family.head} if family.is_tied(config) else set()
    kept = {k: e for k, e in entries.items() if k not in redundant and not family.is_ignored(k)}
    for tensor, entry in kept.items():
        if entry.dtype not in ITEMSIZE:
            raise CheckpointError(
                f"{name} is quantised: {tensor!r} is {entry.dtype}",
                "resize the unquantised original and quantise the result",
            )
    unknown = sorted(set(kept) - set(layout))
    if unknown:
        raise UnsupportedFamilyError(
            f"{name} has a tensor that the {family.name} table does not know: {_some(unknown)}",
            "nothing is copied that is not understood",
        )
    missing = sorted(set(layout) - set(kept))
    if missing:
        raise CheckpointError(f"{name} lacks {_some(missing)}", "download it again")
    for tensor, entry in kept.items():
        if entry.shape != layout[tensor].shape:
            raise CheckpointError(
                f"{name}: {tensor!r} has shape {list(entry.shape)}, "
                f"and its config implies {list(layout[tensor].shape)} ({layout[tensor].spec.text})",
                "config and weights do not belong together",
            )
    return Checkpoint(name=name, folder=folder, config=config, family=family, entries=kept)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
