"""The grammar of a family table: what each axis of a tensor stands for, and which way it points.

A line describes one tensor in storage order::

    "hidden <- (heads head_dim)"                       a matrix; the arrow runs from what is read to what is written
    "vocab -> hidden"                                  a table; rows are looked up, columns are written
    "bias intermediate"                                a vector added to what a matrix writes
    "gain hidden"                                      a norm's multiplicative vector
    "shift hidden"                                     a norm's additive vector
    "normed (heads head_dim) <- hidden"                what is written goes through a norm over its whole width
    "normed bias (heads head_dim)"                     the same for the bias that is added before that norm
    "2+positions -> hidden"                            two rows in front of the positions
    "(heads head_dim)+(kv_heads head_dim) <- hidden"   a concatenation along one storage axis
    "(heads 3 head_dim) <- hidden"                     merged dimensions, one of them a literal
    "bias intermediate if mlp_bias"                    the tensor exists only where the condition holds

Nothing here knows any model: a parsed line is a `TensorSpec`, and sizes come from outside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod

from dslm.errors import UnsupportedFamilyError

DIMENSIONS = (
    "vocab",
    "hidden",
    "intermediate",
    "heads",
    "kv_heads",
    "head_dim",
    "positions",
    "embedding",
)


class Role(Enum):
    """What a storage axis does to the dimension it is made of."""

    WRITE = "write"
    READ = "read"
    GAIN = "gain"
    SHIFT = "shift"
    BIAS = "bias"


@dataclass(frozen=True, slots=True)
class Block:
    """Dimensions merged into one run of storage, outermost first: ``(heads 3 head_dim)``."""

    factors: tuple[str | int, ...]

    def size(self, sizes: Mapping[str, int]) -> int:
        """Number of entries, with ``sizes`` giving each dimension's size."""
        return prod(f if isinstance(f, int) else sizes[f] for f in self.factors)

    def __str__(self) -> str:
        text = " ".join(str(f) for f in self.factors)
        return f"({text})" if len(self.factors) > 1 else text


@dataclass(frozen=True, slots=True)
class Axis:
    """One storage axis: blocks laid end to end, all with the same role."""

    blocks: tuple[Block, ...]
    role: Role
    normed: bool = False

    def size(self, sizes: Mapping[str, int]) -> int:
        """Length of the axis, with ``sizes`` giving each dimension's size."""
        return sum(block.size(sizes) for block in self.blocks)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the dimensions the axis is made of, in storage order, without repeats."""
        names = [f for block in self.blocks for f in block.factors if isinstance(f, str)]
        return tuple(dict.fromkeys(names))

    def __str__(self) -> str:
        return "+".join(str(block) for block in self.blocks)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One line of a family table, parsed.

    Attributes:
        axes: storage axes in order; one for a vector, two for a matrix.
        condition: when the tensor exists, over config keys; empty means always.
        text: the line as written, for messages.
    """

    axes: tuple[Axis, ...]
    condition: str
    text: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape on disk, in elements."""
        return tuple(axis.size(sizes) for axis in self.axes)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of all dimensions of the tensor, without repeats."""
        return tuple(dict.fromkeys(name for axis in self.axes for name in axis.dimensions))


_VECTOR_ROLES = {"bias": Role.BIAS, "gain": Role.GAIN, "shift": Role.SHIFT}
_WORD = re.compile(r"[a-z_]+|\d+")


def parse_line(text: str) -> TensorSpec:
    """Parse one line of a family table.

    Raises:
        UnsupportedFamilyError: the line is not in the grammar; the message repeats the line and the part.
    """
    body, _, condition = text.partition(" if ")
    normed = body.startswith("normed ")
    body = body.removeprefix("normed ").strip()
    first, _, rest = body.partition(" ")
    if first in _VECTOR_ROLES:
        axes: tuple[Axis, ...] = (_parse_axis(rest, _VECTOR_ROLES[first], text, normed=normed),)
    else:
        left, arrow, right = body.partition("<-")
        if arrow:
            roles = Role.WRITE, Role.READ
        else:
            left, arrow, right = body.partition("->")
            roles = Role.READ, Role.WRITE
        if not arrow:
            raise UnsupportedFamilyError(
                f"table line {text!r} has no direction",
                "write 'out <- in', 'in -> out', 'gain x', 'shift x' or 'bias x'",
            )
        axes = tuple(
            _parse_axis(side, role, text, normed=normed and role is Role.WRITE)
            for side, role in zip((left, right), roles, strict=True)
        )
    return TensorSpec(axes=axes, condition=condition.strip(), text=text)


def _parse_axis(text: str, role: Role, line: str, *, normed: bool = False) -> Axis:
    blocks = tuple(_parse_block(part.strip(), line) for part in text.split("+"))
    return Axis(blocks=blocks, role=role, normed=normed)


def _parse_block(text: str, line: str) -> Block:
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    words = inner.split()
    if not words or (len(words) > 1 and inner is text):
        raise UnsupportedFamilyError(
            f"table line {line!r}: {text!r} is not an axis", "merge dimensions with ( )"
        )
    for word in words:
        if not _WORD.fullmatch(word) or (not word.isdigit() and word not in DIMENSIONS):
            raise UnsupportedFamilyError(
                f"table line {line!r}: unknown dimension {word!r}", f"known are {', '.join(DIMENSIONS)}"
            )
    return Block(tuple(int(word) if word.isdigit() else word for word in words))
