"""Writing a checkpoint as a stream: header first, one piece of one tensor in memory, all or nothing on disk.

safetensors itself has no incremental writer. Every size is known from the plan, so each shard's header goes first and
the data follows in header order. The folder is built beside its final place and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from dslm.checkpoint.headers import ITEMSIZE
from dslm.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
_OF_A_MODEL = ("config.json", "adapter_config.json")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written: its name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


def folder_above(out: Path) -> Path:
    """The nearest folder above an output place that is there already: what is unfinished lies on the same disk."""
    return next(parent for parent in out.resolve().parents if parent.exists())


def check_output(out: Path, source: Path | None, nbytes: int, *, overwrite: bool) -> None:
    """Refuse an output place before anything is written.

    Args:
        out: where the checkpoint is to go.
        source: folder of the source, which must stay untouched.
        nbytes: bytes that will be written.
        overwrite: an existing folder may be replaced.

    Raises:
        CheckpointError: the place is taken, is or touches the source, or has too little room.
    """
    place = out.resolve()
    if source is not None:
        origin = source.resolve()
        if place == origin or origin in place.parents or place in origin.parents:
            raise CheckpointError(
                f"output {out} would touch the source {source}", "write somewhere else with -o"
            )
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"output {out} is a file", "write somewhere else with -o")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(
            f"output {out} exists and is not empty", "choose another with -o, or give --overwrite"
        )
    here = Path.cwd()
    if place == here or place in here.parents:
        raise CheckpointError(
            f"output {out} is the folder you are in, or above it", "write somewhere else with -o"
        )
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in _OF_A_MODEL):
        raise CheckpointError(
            f"output {out} holds something that is not a model, which --overwrite would delete",
            "choose another with -o",
        )
    parent = folder_above(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"cannot write into {parent}", "choose another place with -o")
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise CheckpointError(
            f"not enough disk: {nbytes / 1e9:.2f} GB are needed and {parent} has {free / 1e9:.2f} GB free",
            "free some space or choose another place with -o",
        )


class Writer:
    """A checkpoint being written; a context manager that leaves the finished folder, or nothing.

    Args:
        out: final folder.
        tensors: everything that will be written. They are laid out widest dtype first, for alignment.
        overwrite: a folder that is there when the output is finished may be replaced.
        shard_bytes: a new shard starts before one would grow past this many bytes.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[Planned],
        *,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out = out.resolve()
        self.folder = self.out.parent / f".{self.out.name}.{os.getpid()}.partial"
        self._overwrite = overwrite
        self._made: list[Path] = []
        order = sorted(tensors, key=lambda t: -ITEMSIZE[t.dtype])
        self._shards = _shards(order, shard_bytes)
        self._file: BinaryIO | None = None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Writer:
        self._made = [p for p in self.folder.parents if not p.exists()]
        numbered = (self.folder.with_suffix(f".{i}.partial") for i in count(1))
        self.folder = next(path for path in chain([self.folder], numbered) if not path.exists())
        self.folder.mkdir(parents=True)
        return self

    @property
    def order(self) -> list[tuple[Path, list[Planned]]]:
        """Shards in the order in which they must be written, with the tensors of each in order."""
        if len(self._shards) == 1:
            names = ["model.safetensors"]
        else:
            names = [
                f"model-{i:05}-of-{len(self._shards):05}.safetensors" for i in range(1, len(self._shards) + 1)
            ]
        return [(self.folder / name, tensors) for name, tensors in zip(names, self._shards, strict=True)]

    def start_shard(self, path: Path, tensors: Sequence[Planned]) -> None:
        """Open a shard and write its header."""
        self._end_shard()
        self._file = path.open("wb", buffering=0)
        self._file.write(_header(tensors))

    def write(self, tensor: Planned, pieces: Iterable[torch.Tensor]) -> None:
        """Write the next tensor of the shard, as consecutive pieces of it in its dtype."""
        import torch

        assert self._file is not None, "start_shard comes first"
        written = 0
        for piece in pieces:
            view = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            written += len(view)
            self._finish_write()
            self._writing = self._thread.submit(_write_all, self._file, view)
        assert written == tensor.nbytes, f"{tensor.name}: {written} bytes of {tensor.nbytes}"

    def _finish_write(self) -> None:
        """Wait for the piece that is on its way to the disk while the next one is computed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def add_text(self, name: str, text: str) -> None:
        """Write a text file beside the weights."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def add_copy(self, path: Path, name: str | None = None) -> None:
        """Copy a file or a folder byte for byte, under its own name unless another is given."""
        target = self.folder / (name or path.name)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, target)

    def _end_shard(self) -> None:
        self._finish_write()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def seal(self) -> None:
        """Close the last shard and write the index where there are several."""
        self._end_shard()
        if len(self._shards) > 1:
            shards = self.order
            total = sum(t.nbytes for _, tensors in shards for t in tensors)
            weight_map = {t.name: path.name for path, tensors in shards for t in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.add_text(INDEX, json.dumps(index, indent=2) + "\n")

    def publish(self) -> None:
        """Sync everything and move the folder to its place."""
        for path in self.folder.iterdir():
            if path.suffix != ".safetensors":
                sync(path)
        sync(self.folder)
        self._move_into_place()
        sync(self.out.parent)

    def _move_into_place(self) -> None:
        if not self.out.exists():
            self.folder.rename(self.out)
            return
        if any(self.out.iterdir()) and not self._overwrite:
            raise CheckpointError(
                f"output {self.out} appeared while this was written", "choose another with -o"
            )
        old = self.folder.with_suffix(".old")
        try:
            self.out.rename(old)
            self.folder.rename(self.out)
        finally:  # whatever comes between the two renames, Ctrl-C too, the old folder goes back
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(self.out)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def _write_all(file: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _shards(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        stop = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
