"""Looking into a running block: what its linear modules get and give, and in which order they run.

Shape letters: B windows, T tokens, D hidden size, X input features, Y outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dslm.families.axes import Role
from dslm.shrink.walk import Stop, Walk


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear modules of a block that read the same input, in the order in which blocks run.

    Attributes:
        names: their weights' names on disk.
        writes: whether they write the residual stream.
    """

    names: tuple[str, ...]
    writes: bool


@dataclass(frozen=True, slots=True)
class Attention:
    """A part of a block that ends with the matrix that reads the heads.

    Attributes:
        module: the part's name in the block.
        last: that matrix' module's name in the part.
        results: how many results the part gives, the stream's first; None where it gives that alone.
    """

    module: str
    last: str
    results: int | None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What one pass through a block shows.

    Attributes:
        stages: its linear modules in running order.
        attention: what can be skipped once what its last matrix reads is known; None if the block has no such part.
    """

    stages: tuple[Stage, ...]
    attention: Attention | None

    @property
    def writers(self) -> list[str]:
        """Names of the weights that write the stream, in running order."""
        return [name for stage in self.stages if stage.writes for name in stage.names]


def anatomy(walk: Walk, layer: int, hidden_BTD: Tensor) -> Anatomy:
    """Run a loaded block once and see how it is built."""
    seen: list[tuple[str, Tensor]] = []
    heads: dict[str, Tensor] = {}
    linears = walk.linears(layer)
    handles = []
    for module, name in linears.items():

        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
            seen.append((name, args[0]))
            if reads_heads(walk, name):
                heads[name] = out

        handles.append(module.register_forward_hook(hook))
    given: dict[str, Any] = {}
    for part, module in walk.blocks[layer].named_children():

        def keep(module: nn.Module, args: Any, out: Any, part: str = part) -> None:
            given[part] = out

        handles.append(module.register_forward_hook(keep))
    try:
        walk.run(layer, hidden_BTD)
    finally:
        for handle in handles:
            handle.remove()
    stages: list[Stage] = []
    last: Tensor | None = None
    for name, x in seen:
        if x is last:
            stages[-1] = Stage((*stages[-1].names, name), stages[-1].writes)
        else:
            stages.append(Stage((name,), writes_stream(walk, name)))
        last = x
    return Anatomy(tuple(stages), _attention(walk, layer, heads, given))


def _attention(
    walk: Walk, layer: int, heads: Mapping[str, Tensor], given: Mapping[str, Any]
) -> Attention | None:
    """The part of the block whose result is, as it stands, what the matrix that reads the heads gives."""
    modules = {name: module for module, name in walk.linears(layer).items()}
    for name, y in heads.items():
        for part, out in given.items():
            if (out[0] if isinstance(out, tuple) else out) is not y:
                continue
            for last, module in walk.blocks[layer].get_submodule(part).named_modules():
                if last and module is modules[name]:
                    return Attention(part, last, len(out) if isinstance(out, tuple) else None)
    return None


def reads_heads(walk: Walk, name: str) -> bool:
    """Whether a matrix reads what attention heads give."""
    return "head_dim" in walk.places[name].line.spec.axes[1].dimensions


def writes_stream(walk: Walk, name: str) -> bool:
    """Whether a matrix writes the residual stream."""
    axis = walk.places[name].line.spec.axes[0]
    return axis.role is Role.WRITE and "hidden" in axis.dimensions


def reads_stream(walk: Walk, name: str) -> bool:
    """Whether a matrix reads the residual stream."""
    axis = walk.places[name].line.spec.axes[1]
    return axis.role is Role.READ and axis.dimensions == ("hidden",)


def bias_of(walk: Walk, name: str) -> str | None:
    """The name of a matrix's bias, if it has one."""
    bias = name.removesuffix("weight") + "bias"
    return bias if bias in walk.places else None


def with_one(x_NX: Tensor) -> Tensor:
    """Features and, behind them, a one for the bias."""
    return torch.cat([x_NX, torch.ones_like(x_NX[..., :1])], dim=-1)


def watch(
    walk: Walk, layer: int, hidden_BTD: Tensor, names: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a loaded block to its end, and keep what some of its matrices read.

    Returns:
        The block's output, and ``[B * T, X]`` for each name.
    """
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(_on_input(found, name, -1))
        for module, name in walk.linears(layer).items()
        if name in names
    ]
    try:
        return walk.run(layer, hidden_BTD), found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def tap(
    walk: Walk, layer: int, hidden_BTD: Tensor, *, inputs: Collection[str] = (), outputs: Collection[str] = ()
) -> dict[str, Tensor]:
    """Run a loaded block until everything asked for was seen.

    Args:
        walk: the model.
        layer: the block, which is loaded.
        hidden_BTD: what it gets.
        inputs: names of weights whose input is wanted; it is returned under the name.
        outputs: names of weights whose output is wanted; it is returned under ``name + ":out"``.

    Returns:
        ``[B * T, X]`` or ``[B * T, Y]`` for each.
    """
    found: dict[str, Tensor] = {}
    wanted = len(inputs) + len(outputs)
    handles = []
    for name in inputs:
        module, _ = walk.places[name].owners[0]
        handles.append(module.register_forward_pre_hook(_on_input(found, name, wanted)))
    for name in outputs:
        module, _ = walk.places[name].owners[0]
        handles.append(module.register_forward_hook(_on_output(found, name, wanted)))
    try:
        walk.run(layer, hidden_BTD)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _on_input(found: dict[str, Tensor], name: str, wanted: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = args[0].flatten(0, -2)
        if len(found) == wanted:
            raise Stop

    return hook


def _on_output(found: dict[str, Tensor], name: str, wanted: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found[name + ":out"] = out.flatten(0, -2)
        if len(found) == wanted:
            raise Stop

    return hook
