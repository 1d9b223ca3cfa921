"""Safetensors headers: what a file says it holds, believed only after it is checked.

The format is an 8-byte little-endian length, a JSON header of that length, then raw data
(https://github.com/huggingface/safetensors#format). Nothing here imports torch or reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dslm.errors import CheckpointError

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one number, for the dtypes that are resized."""

_OTHER_ITEMSIZE = {
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        name: the tensor's name.
        dtype: safetensors code, such as ``BF16``.
        shape: in elements.
        file: the file that holds it, or None where only its description was fetched.
        start: first byte in the file.
        stop: one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None
    start: int
    stop: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: the file is truncated, or its header is not what the data can be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER:
                raise _damaged(path, f"its header claims {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_cover(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header entry of {name!r} is malformed") from error
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise _damaged(path, f"the header entry of {name!r} has a size that is not a whole number")
    if not isinstance(dtype, str):
        raise _damaged(path, f"the header entry of {name!r} has no dtype")
    itemsize = ITEMSIZE.get(dtype) or _OTHER_ITEMSIZE.get(dtype)
    if itemsize is None:
        raise CheckpointError(
            f"{path}: {name!r} has dtype {dtype!r}", "only F64, F32, F16 and BF16 weights are resized"
        )
    if stop - start != prod(shape) * itemsize:
        raise _damaged(
            path, f"{name!r} of shape {list(shape)} in {dtype} does not fill its {stop - start} bytes"
        )
    return Entry(name=name, dtype=dtype, shape=shape, file=path, start=base + start, stop=base + stop)


def _check_cover(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """The data must be covered once, end to end: no overlap, no hole, nothing past the end."""
    position = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start < position:
            raise _damaged(path, f"the data of {entry.name!r} overlaps that of another tensor")
        if entry.start > position:
            raise _damaged(path, f"there is a hole of {entry.start - position} bytes before {entry.name!r}")
        position = entry.stop
    if position > size:
        raise _damaged(path, f"it is truncated: {size} bytes of {position}")
    if position < size:
        raise _damaged(path, f"{size - position} bytes at its end belong to no tensor")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", "download or copy it again")


def read_index(path: Path) -> dict[str, Path]:
    """Read a ``model.safetensors.index.json``: tensor name -> shard.

    Raises:
        CheckpointError: it is not an index, or names a file that is missing or outside its folder.
    """
    value = read_json(path)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no usable weight_map", "download it again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{path} names a shard outside its folder: {name!r}", "this file is not trustworthy"
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names a shard that is missing: {name!r}", "download it again")
    return {tensor: path.parent / name for tensor, name in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: it cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "download or copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", "download or copy it again")
    return value
