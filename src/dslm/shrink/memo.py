"""What a block's attention hands to its last matrix, kept so that attention runs once and not in every stage.

Shape letters: B windows, T tokens, X what the last matrix of attention reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dslm.shrink.streams import empty_stream
from dslm.shrink.tap import Attention
from dslm.shrink.walk import Walk


class Memo:
    """What attention made of each window so far, for one block of a model at a time.

    It holds for as long as nothing before the last matrix of attention changes; that matrix may, since it runs anew.

    Args:
        walk: the model.
        shape: of the windows that it is for, ``[B, T]``: the first so many, those that solving uses.
        folder: where it goes if it is too large for memory.
        name: of the file there.
    """

    def __init__(self, walk: Walk, shape: tuple[int, int], folder: Path, name: str) -> None:
        self._walk, self._folder, self._name = walk, folder, name
        self._shape = shape
        self._room: Tensor | None = None
        self._known = torch.zeros(shape[0], dtype=torch.bool)
        self._layer = 0
        self._attention: Attention | None = None

    def turn_to(self, layer: int, attention: Attention | None) -> None:
        """Forget everything, and look at another block from now on; at none if its attention is not told."""
        self._layer, self._attention = layer, attention
        self._known[:] = False

    @contextmanager
    def of(self, windows: slice, wanted: Collection[str] = ()) -> Iterator[None]:
        """While these windows run through the block, attention is remembered, or replaced by what it is known to be.

        Args:
            windows: which.
            wanted: names of matrices that have to run; if attention holds one before its last, it runs too.
        """
        if self._attention is None or windows.stop > len(self._known):
            yield
            return
        module = self._walk.blocks[self._layer].get_submodule(self._attention.module)
        last = module.get_submodule(self._attention.last)
        names = self._walk.linears(self._layer)
        if any(names.get(part) in wanted for part in module.modules() if part is not last):
            yield
            return
        if bool(self._known[windows].all()):
            assert self._room is not None
            known, results = self._room[windows].to(self._walk.device), self._attention.results

            def replay(*args: Any, **kwargs: Any) -> Any:
                out = last(known)
                return out if results is None else (out, *[None] * (results - 1))

            module.forward = replay
            try:
                yield
            finally:
                del module.forward
            return

        def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._room is None or self._room.shape[-1] != args[0].shape[-1]:
                self._room = empty_stream((*self._shape, args[0].shape[-1]), self._folder, self._name)
            self._room[windows] = args[0].cpu()
            self._known[windows] = True

        handle = last.register_forward_pre_hook(remember)
        try:
            yield
        finally:
            handle.remove()
