"""Can every part of a model learn, and can its copies become different?

See ``docs/how-it-works.md``, "A certificate for growth".

*Dead*: a row or column of a matrix that is zero and whose gradient is exactly zero, now and after a few
steps of training. Nothing will ever move it. A padding that zeroes both sides of a new channel makes such rows;
one that zeroes only the writers does not, because the readers pass a gradient back and after one step the
channel carries something. Rows that merely happen to be silent on the text (ReLU units, unused tokens,
positions that were not visited) are not zero, or are left out, and are not blamed.

*Locked*: a unit (FFN unit, head, residual channel) whose numbers, in every tensor that touches it, equal bit for bit
those of another, and whose gradient is the same too. Exchanging the two changes nothing in the model, so no
deterministic training on any data can tell them apart. Not seen: copies that are equal only when units of several
dimensions are exchanged at once, such as two separate models side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dslm.checkpoint.reader import Checkpoint
from dslm.families.axes import Role
from dslm.load import load_model
from dslm.progress import Progress
from dslm.verify.copies import MODEL_WIDE, Copies, find_copies
from dslm.verify.units import Part, parts_of, unit_positions

SPACES = {
    "hidden": "residual channels",
    "embedding": "embedding channels",
    "intermediate": "FFN units",
    "heads": "query heads",
    "kv_heads": "key-value heads",
}
STEPS = 3
TOKENS = 128
_STEP_SIZE = 1e-4


@dataclass(frozen=True, slots=True)
class Space:
    """The units of one dimension, over all blocks.

    Attributes:
        name: what they are, such as ``FFN units``.
        units: how many there are.
        dead: how many have a row or column that can never learn.
        locked: how many are copies that can never differ from their original.
    """

    name: str
    units: int
    dead: int
    locked: int


@dataclass(frozen=True, slots=True)
class Liveness:
    """The certificate of one model.

    Attributes:
        tokens: tokens of the text it was made on.
        spaces: the counts per dimension.
        dead_parameters: numbers in dead rows and columns.
        parameters: all numbers of the model.
        examples: a few dead or locked units by name.
        source: the same for the model it was grown from, where one was given and it matters.
    """

    tokens: int
    spaces: tuple[Space, ...]
    dead_parameters: int
    parameters: int
    examples: tuple[str, ...]
    source: Liveness | None = None

    @property
    def alive(self) -> bool:
        """Whether no dimension has a larger share of dead units than the source had."""
        return all(s.dead * base.units <= base.dead * s.units for s, base in self._with_source())

    @property
    def unlocked(self) -> bool:
        """Whether no dimension has a larger share of locked copies than the source had."""
        return all(s.locked * base.units <= base.locked * s.units for s, base in self._with_source())

    def _with_source(self) -> list[tuple[Space, Space]]:
        before = {space.name: space for space in self.source.spaces} if self.source else {}
        clean = Space(name="", units=1, dead=0, locked=0)
        return [(space, before.get(space.name, clean)) for space in self.spaces]

    def as_dict(self) -> dict[str, Any]:
        """The counts and the two verdicts by name."""
        return {
            "alive": self.alive,
            "unlocked": self.unlocked,
            "tokens": self.tokens,
            "spaces": {s.name: {"units": s.units, "dead": s.dead, "locked": s.locked} for s in self.spaces},
            "dead_parameters": self.dead_parameters,
            "examples": list(self.examples),
            "source": self.source.as_dict() if self.source else None,
        }


def certify(
    checkpoint: Checkpoint,
    window: Tensor,
    *,
    source: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Liveness:
    """Certify that every part of a model can learn and that no two copies are tied for ever.

    Loads the model in float32, takes up to `STEPS` signed-gradient steps on one window in memory, and throws
    the result away. Memory: the weights and their gradients. Nothing is written.

    Args:
        checkpoint: the model to certify.
        window: token ids, ``[1, T]``; the first `TOKENS` are used.
        source: the model it was grown from. If something is found it is certified as well, and what it
            already had is not held against the grown model.
        progress: called with a label, the steps done, and all steps.

    Returns:
        The counts per dimension, with examples.

    Raises:
        CheckpointError: a model cannot be loaded.
    """
    window = window[:, :TOKENS]
    found = _certify(checkpoint, window, progress)
    if source is None or (found.alive and found.unlocked):
        return found
    before = _certify(source, window, progress)
    return Liveness(
        tokens=found.tokens,
        spaces=found.spaces,
        dead_parameters=found.dead_parameters,
        parameters=found.parameters,
        examples=found.examples,
        source=before,
    )


def _certify(checkpoint: Checkpoint, window: Tensor, progress: Progress | None) -> Liveness:
    model = load_model(checkpoint, dtype="float32", attention="eager")
    parts, sizes = parts_of(model, checkpoint), checkpoint.family.dimensions(checkpoint.config)
    watches = [watch for part in parts for watch in _watch(part)]
    copies: list[Copies] = []
    for step in range(STEPS):
        if progress:
            progress(f"training {checkpoint.name} a little", step, STEPS)
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            model(input_ids=window, labels=window, use_cache=False).loss.backward()
        if step == 0:
            copies = find_copies(parts, sizes, tuple(SPACES))
        for watch in watches:
            watch.look()
        if step + 1 == STEPS or not any(watch.silent.any() for watch in watches):
            break
        _step(parts)
    _excuse_idle(watches, sizes)
    if progress:
        progress(f"training {checkpoint.name} a little", STEPS, STEPS)
    return _collect(parts, watches, copies, sizes, window.numel())


def _step(parts: list[Part]) -> None:
    """Move every number a little against its gradient; one whose gradient is exactly zero stays."""
    with torch.no_grad():
        for part in parts:
            if part.parameter.grad is not None:
                part.parameter.sub_(part.parameter.grad.sign_(), alpha=_STEP_SIZE)


@dataclass(slots=True, eq=False)
class _Watch:
    """The rows (or columns) of one matrix that are zero and have had no gradient yet.

    Attributes:
        part: the matrix.
        position: which storage axis is watched.
        silent: bool, one per entry of that axis.
    """

    part: Part
    position: int
    silent: Tensor

    def look(self) -> None:
        """Strike off whatever has a gradient now."""
        gradient = self.part.parameter.grad
        if gradient is not None and bool(self.silent.any()):
            self.silent &= (gradient == 0).all(dim=1 - self.position)


def _excuse_idle(watches: list[_Watch], sizes: dict[str, int]) -> None:
    """Take back what is said of FFN units whose output is read with zeros, but that could fire on another text.

    Where a ReLU stays at zero on this one, the column that reads it gets no gradient either.
    """
    found = [(watch, watch.part.line.spec.axes[watch.position]) for watch in watches]
    places = [(w, axis.role, unit_positions(axis, "intermediate", sizes)) for w, axis in found]
    fed: dict[int | None, Tensor] = {}
    for watch, role, where in places:
        if where is not None and role is not Role.READ:
            silent = watch.silent[where].any(dim=1)
            layer = watch.part.line.layer
            fed[layer] = fed[layer] | silent if layer in fed else silent
    for watch, role, where in places:
        if where is not None and role is Role.READ and watch.part.line.layer in fed:
            watch.silent[where] &= fed[watch.part.line.layer][:, None]


def _watch(part: Part) -> list[_Watch]:
    """Watch both axes of a matrix, except rows of tokens and positions: a text visits only some of them."""
    if part.parameter.dim() != 2:
        return []
    axes = part.line.spec.axes
    return [
        _Watch(part=part, position=position, silent=(part.parameter.detach() == 0).all(dim=1 - position))
        for position, axis in enumerate(axes)
        if not {"vocab", "positions"} & set(axis.dimensions)
    ]


def _collect(
    parts: list[Part], watches: list[_Watch], copies: list[Copies], sizes: dict[str, int], tokens: int
) -> Liveness:
    dead, examples = _dead_units(watches, copies, sizes)
    spaces = []
    for dimension, name in SPACES.items():
        mine = [found for found in copies if found.dimension == dimension]
        # Dead units are often equal as well, all zeros; once is enough.
        locked = [
            (found.original != torch.arange(sizes[dimension])) & ~dead[dimension, found.layer]
            for found in mine
        ]
        examples += [_locked_example(f, units) for f, units in zip(mine, locked, strict=True) if units.any()][
            :1
        ]
        if mine:
            spaces.append(
                Space(
                    name=name,
                    units=sizes[dimension] * len(mine),
                    dead=sum(int(dead[dimension, found.layer].sum()) for found in mine),
                    locked=sum(int(units.sum()) for units in locked),
                )
            )
    return Liveness(
        tokens=tokens,
        spaces=tuple(spaces),
        dead_parameters=_dead_parameters(watches),
        parameters=sum(part.parameter.numel() for part in parts),
        examples=tuple(examples),
    )


def _dead_units(
    watches: list[_Watch], copies: list[Copies], sizes: dict[str, int]
) -> tuple[dict[tuple[str, int | None], Tensor], list[str]]:
    """Units with a dead row or column, per dimension and block, and one example per dimension."""
    dead = {(c.dimension, c.layer): torch.zeros(sizes[c.dimension], dtype=torch.bool) for c in copies}
    examples: dict[str, str] = {}
    for watch in watches:
        line = watch.part.line
        for dimension in SPACES:
            where = unit_positions(line.spec.axes[watch.position], dimension, sizes)
            if where is None:
                continue
            units = watch.silent[where].any(dim=1)
            if bool(units.any()):
                dead[dimension, None if dimension in MODEL_WIDE else line.layer] |= units
                examples.setdefault(dimension, _dead_example(watch, dimension, int(units.nonzero()[0])))
    return dead, list(examples.values())


def _dead_example(watch: _Watch, dimension: str, unit: int) -> str:
    side = ("row", "column")[watch.position]
    index, line = int(watch.silent.nonzero()[0]), watch.part.line
    return f"{line.name}: {side} {index} ({_one(dimension)} {unit}) is zero and gets no gradient"


def _locked_example(found: Copies, units: Tensor) -> str:
    copy = int(units.nonzero()[0])
    noun, block = _one(found.dimension), "" if found.layer is None else f"layer {found.layer}: "
    return f"{block}{noun} {copy} equals {noun} {int(found.original[copy])}, in weights and in gradient"


def _one(dimension: str) -> str:
    return SPACES[dimension].removesuffix("s")


def _dead_parameters(watches: list[_Watch]) -> int:
    """Numbers that lie in a dead row or a dead column, each counted once."""
    live: dict[str, list[int]] = {}
    full: dict[str, list[int]] = {}
    for watch in watches:
        name = watch.part.line.name
        shape = list(watch.part.parameter.shape)
        full.setdefault(name, shape)
        live.setdefault(name, list(shape))[watch.position] -= int(watch.silent.sum())
    return sum(full[n][0] * full[n][1] - live[n][0] * live[n][1] for n in full)
