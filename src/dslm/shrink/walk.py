"""Walking a stock transformers model block by block, with the weights of one block in memory.

The model is built by transformers on the meta device, so no model is implemented here; the weights of what runs are
put in place for as long as it runs. What a model passes to its blocks beside the stream (masks, rotary tables) is
recorded from its own forward pass, whose blocks are stubs for that moment.

Shape letters: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dslm.checkpoint.oracle import refused_config, stored_parameters
from dslm.errors import CheckpointError, DslmError, VerificationError
from dslm.families import Tensor as TableTensor
from dslm.load import pick_device
from dslm.shrink.solve import sum_over_processes
from dslm.shrink.weights import Weights

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_WINDOWS = 8
"""Windows that are embedded at once."""
_LOGITS = 2**26
"""Logits at once when a loss is taken: 256 MiB, and as much for their logarithms. With smaller pieces a vocabulary of
262,144 takes longer."""


def walking_device(name: str) -> torch.device:
    """The device of a name for walking a model; ``auto`` takes a CUDA GPU if there is one.

    Raises:
        DslmError: there is no such device here, or it cannot add in float64, as the moments of a shrink need.
    """
    device = pick_device(name)
    if device.type != "mps":
        return device
    if name == "auto":
        return torch.device("cpu")
    raise DslmError("shrinking adds in float64, which the device 'mps' cannot", "take --device cpu")


class Stop(Exception):  # noqa: N818  (not an error: what a hook raises when it has seen enough)
    """Ends a forward pass early."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a tensor of the family's table lives in the loaded model.

    Attributes:
        line: what the table says about it.
        owners: modules and attribute names that hold it; several for a tied table.
    """

    line: TableTensor
    owners: tuple[tuple[nn.Module, str], ...]


class Walk:
    """A stock model whose blocks are loaded one at a time, computed in float32.

    Args:
        weights: where its numbers come from.
        device: where it runs.

    Raises:
        CheckpointError: transformers refuses the config, or the family's table and the class do not agree on a tensor.
    """

    def __init__(self, weights: Weights, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.weights = weights
        self.device = torch.device(device)
        values = {key: value for key, value in weights.config.items() if key != "model_type"}
        with refused_config(CheckpointError, "mend the model's config.json"):
            config = AutoConfig.for_model(weights.config["model_type"], **values)
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.places = _places(self.model, weights)
        self.blocks = _blocks(self.model, weights)
        _fill_buffers(self.model, self.device)
        self._arguments: dict[int, list[Arguments]] = {}

    def embed(self, ids_BT: Tensor, into: Tensor | None = None) -> Tensor:
        """What the first block gets for some windows, ``[B, T, D]`` in float32.

        Args:
            ids_BT: the windows.
            into: where it goes; None for a new tensor where the model runs.
        """
        with self._loaded(self._outside(head=False)):
            if ids_BT.shape[1] not in self._arguments:
                self._record(ids_BT[:1])
            for i in range(0, len(ids_BT), _WINDOWS):
                piece = self._first(ids_BT[i : i + _WINDOWS])
                if into is None:
                    into = piece.new_empty(len(ids_BT), *piece.shape[1:])
                into[i : i + _WINDOWS] = piece
        assert into is not None, "there is a window"
        return into

    def _first(self, ids_BT: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden)
            raise Stop

        self._run_stubs(ids_BT, stub)
        return seen[0]

    def _record(self, ids_1T: Tensor) -> None:
        """Keep what each block is given beside the stream, for windows of this length."""
        seen: list[Arguments] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((args, kwargs))
            if len(seen) == len(self.blocks):
                raise Stop
            return hidden

        self._run_stubs(ids_1T, stub)
        self._arguments[ids_1T.shape[1]] = seen

    @torch.no_grad()
    def _run_stubs(self, ids_BT: Tensor, stub: Callable[..., Tensor]) -> None:
        with _stubs(self.blocks, [stub] * len(self.blocks)), suppress(Stop):
            self.model.base_model(input_ids=ids_BT.to(self.device), use_cache=False)

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """One block with its weights, for as long as the context lasts."""
        with self._loaded(self.names(layer)):
            yield self.blocks[layer]

    def names(self, layer: int) -> list[str]:
        """Names of a block's tensors on disk."""
        return [name for name, place in self.places.items() if place.line.layer == layer]

    @torch.no_grad()
    def run(self, layer: int, hidden_BTD: Tensor) -> Tensor:
        """What a loaded block makes of the stream; `embed` must have seen windows of this length.

        Raises:
            VerificationError: it holds NaN or infinite numbers.
        """
        result = self.forward(layer, hidden_BTD)
        if not torch.isfinite(result).all():
            raise VerificationError(
                f"what block {layer} writes is NaN or infinite",
                "the model is broken there; check it with dslm diff",
            )
        return result

    def forward(self, layer: int, hidden_BTD: Tensor) -> Tensor:
        """The same as `run`, unchecked, and with gradients where they are wanted."""
        args, kwargs = self._arguments[hidden_BTD.shape[1]][layer]
        out = self.blocks[layer](hidden_BTD, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @contextmanager
    def head(self) -> Iterator[None]:
        """The end of the model with its weights, for as long as the context lasts."""
        with self._loaded(self._outside(head=True)):
            yield

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """What the end of the model makes of the stream, ``[B, T, V]``; within `head`, each position for itself."""
        stubs: list[Callable[..., Tensor]] = [lambda hidden, *args, **kwargs: hidden] * len(self.blocks)
        stubs[-1] = lambda *args, **kwargs: hidden_BTD
        width = self.model.get_input_embeddings().embedding_dim
        empty = torch.zeros(*hidden_BTD.shape[:2], width, device=self.device)
        with _stubs(self.blocks, stubs):
            logits: Tensor = self.model(inputs_embeds=empty, use_cache=False).logits
        return logits.float()

    @property
    def vocab(self) -> int:
        """Logits per position."""
        size: int = self.model.get_output_embeddings().out_features
        return size

    def before_head(self, hidden_BTD: Tensor) -> Tensor:
        """What the output table reads, ``[B * T, S]``; within `head`."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].flatten(0, -2))
            raise Stop

        handle = self.model.get_output_embeddings().register_forward_pre_hook(hook)
        try:
            with suppress(Stop):
                self.logits(hidden_BTD)
        finally:
            handle.remove()
        return seen[0]

    def _outside(self, *, head: bool) -> list[str]:
        """Names of the tensors outside the blocks that the beginning, or the end, of the model needs."""
        family = self.weights.family
        skipped = set() if head else {family.head}
        if head and not family.is_tied(self.weights.config):
            skipped.add(family.embedding)
        return [n for n, p in self.places.items() if p.line.layer is None and n not in skipped]

    @contextmanager
    def _loaded(self, names: Sequence[str]) -> Iterator[None]:
        for name in names:
            self.put(name, self.weights.read(name).to(self.device, torch.float32))
        try:
            yield
        finally:
            for name in names:
                self.put(name, torch.empty(self.places[name].line.shape, device="meta"))

    def put(self, name: str, values: Tensor) -> None:
        """Give a tensor of the model other numbers, of the same shape."""
        parameter = nn.Parameter(values, requires_grad=False)
        for module, attribute in self.places[name].owners:
            setattr(module, attribute, parameter)

    def get(self, name: str) -> Tensor:
        """The numbers of a tensor that is loaded."""
        module, attribute = self.places[name].owners[0]
        parameter: Tensor = getattr(module, attribute)
        return parameter.data

    def linears(self, layer: int) -> dict[nn.Module, str]:
        """The linear modules of a block and the names of their weights on disk."""
        return {
            place.owners[0][0]: name
            for name, place in self.places.items()
            if place.line.layer == layer and len(place.line.spec.axes) == 2
        }


def mean_loss(walk: Walk, hidden_BTD: Tensor, ids_BT: Tensor) -> float:
    """Mean cross-entropy in nats per predicted token, over the tokens of all processes of a distributed run.

    Args:
        walk: the model, within its `Walk.head`.
        hidden_BTD: the stream behind its last block.
        ids_BT: the windows, int64.
    """
    size = max(1, _LOGITS // walk.vocab)
    total = 0.0
    for hidden_TD, ids_T in zip(hidden_BTD[:, :-1], ids_BT[:, 1:], strict=True):
        for some_ND, next_N in zip(hidden_TD.split(size), ids_T.split(size), strict=True):
            logits_NV = walk.logits(some_ND[None].to(walk.device))[0]
            total += float(cross_entropy(logits_NV, next_N.to(walk.device), reduction="sum"))
    sums = torch.tensor([total, ids_BT.shape[0] * (ids_BT.shape[1] - 1)], dtype=torch.float64)
    sum_over_processes(sums)
    return float(sums[0] / sums[1])


def _places(model: Any, weights: Weights) -> dict[str, Place]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    layout = weights.family.layout(weights.config)
    parameters = stored_parameters(model, layout)
    return {name: Place(line, tuple(owners[id(parameters[name])])) for name, line in layout.items()}


def _blocks(model: Any, weights: Weights) -> nn.ModuleList:
    layers = weights.family.dimensions(weights.config)["layers"]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(lists) != 1:
        raise CheckpointError(f"{type(model).__name__} does not keep its {layers} blocks in one list")
    return lists[0]


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers (rotary tables, Gemma's multiplier) as transformers does after loading."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if buffers:
            for name, buffer in buffers.items():
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
            model._init_weights(module)


@contextmanager
def _stubs(blocks: nn.ModuleList, stubs: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Let each block do something else for a moment; all that the model asks of a block but its work stays."""
    for block, stub in zip(blocks, stubs, strict=True):
        block.forward = stub
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
