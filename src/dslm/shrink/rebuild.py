"""Shrinking a whole model: teacher and student walk side by side, and each finished block goes to disk.

Shape letters: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dslm.errors import CheckpointError
from dslm.families import Family
from dslm.progress import Progress
from dslm.shrink.fold import Encoder, Fold, Key
from dslm.shrink.head import fit_head
from dslm.shrink.importance import importance
from dslm.shrink.memo import Memo
from dslm.shrink.recipe import Recipe
from dslm.shrink.reconstruct import Rebuilder
from dslm.shrink.streams import Streams, empty_stream
from dslm.shrink.walk import Walk, mean_loss
from dslm.shrink.weights import Folded, Weights, as_kept, stored
from dslm.sizes import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Tokens for shrinking, each int64 ``[windows, tokens]``.

    Attributes:
        fit: what is fitted on.
        held_out: what chooses between candidates, and is reported.
        checks: other texts that are only reported, by what to call them.
    """

    fit: Tensor
    held_out: Tensor
    checks: Mapping[str, Tensor]

    @property
    def all(self) -> Tensor:
        """Every window, in this order."""
        return torch.cat([self.fit, self.held_out, *self.checks.values()])


@dataclass(frozen=True, slots=True, eq=False)
class Rebuilt:
    """A shrunk model: its finished tensors lie in a folder, the others are the source's seen through folds.

    Attributes:
        base: the folded source.
        files: tensor name -> the file that holds it.
        dtypes: tensor name -> what it is kept in; empty for float32.
        losses: text -> mean cross-entropy in nats per token before and after.
        errors: relative squared error of the stream after each block, on held-out windows.
    """

    base: Folded
    files: Mapping[str, Path]
    dtypes: Mapping[str, torch.dtype]
    losses: Mapping[str, tuple[float, float]]
    errors: tuple[float, ...]

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.base.family

    @property
    def config(self) -> Mapping[str, object]:
        """The smaller model's config."""
        return self.base.config

    def read(self, name: str) -> Tensor:
        """A whole tensor, as it is kept, in float32 or wider."""
        if name not in self.files:
            return as_kept(name, self.base.read(name), self.dtypes)
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor if tensor.dtype is torch.float64 else tensor.float()


@dataclass(slots=True, eq=False)
class _Run:
    """What one shrink needs all along."""

    teacher: Walk
    student: Walk
    streams: Streams
    folder: Path
    dtypes: Mapping[str, torch.dtype]
    files: dict[str, Path]

    def keep(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        """Put finished tensors on disk."""
        if not tensors:
            return
        path = self.folder / f"{label}.safetensors"
        kept = {
            name: stored(name, tensor, self.dtypes.get(name, tensor.dtype)).contiguous()
            for name, tensor in tensors.items()
        }
        try:
            save_file(kept, path)
        except SafetensorError as error:  # what it says of a full disk too
            raise CheckpointError(
                f"cannot write into {self.folder.parent}: {error}", "free some space and try again"
            ) from error
        self.files.update(dict.fromkeys(tensors, path))


def rebuild(
    source: Weights,
    target: Sizes,
    layers: tuple[int, ...],
    stream: Encoder | None,
    windows: Windows,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    felt: Mapping[str, Tensor] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Rebuilt:
    """Shrink a model to the target's sizes.

    One block of each model and its moments are in memory at a time, and the streams of all windows.

    Args:
        source: the model to shrink.
        target: sizes to reach.
        layers: the source's layers that stay; the first is always among them.
        stream: what becomes of the residual stream; None if it stays.
        windows: calibration and check tokens, all of one length.
        folder: where finished blocks go, and streams too large for memory.
        recipe: how blocks are rebuilt.
        felt: what `importance_for` gave, where that is already in hand.
        dtypes: what each tensor is kept in, by its name in the source: each block is rounded before the next one is
            fitted. None for float32.
        device: where the models run.
        progress: called with a label, blocks done and blocks in all.
    """
    before = Sizes.from_config(source.family, source.config)
    folds: dict[Key, Fold] = {}
    base = Folded(source, target, layers, folds, stream)
    kept = {}
    if dtypes is not None:
        table = dtypes[source.family.embedding]  # that of a head that was tied
        kept = {name: dtypes.get(base.origin(name), table) for name in base.family.layout(base.config)}
    files: dict[str, Path] = {}
    finished = Rebuilt(base, files, kept, {}, ())  # the student is read from where its blocks are put
    teacher, student = Walk(source, device), Walk(finished, device)
    recipe = recipe or Recipe()
    if felt is None:
        felt = importance_for(teacher, target, windows, folder, recipe, progress)
    tokens = windows.all
    streams = Streams(
        teacher=_embedded(teacher, tokens, folder, "teacher"),
        ahead=empty_stream((*tokens.shape, before.hidden_size), folder, "ahead"),
        student=_embedded(student, tokens, folder, "student"),
        fit=len(windows.fit),
        held_out=len(windows.held_out),
    )
    run = _Run(teacher, student, streams, folder, kept, files)
    used = len(windows.fit) + len(windows.held_out), tokens.shape[1]
    rebuilder = Rebuilder(
        teacher,
        student,
        folds,
        stream,
        before,
        target,
        recipe,
        felt,
        Memo(teacher, used, folder, "heads"),
        Memo(student, used, folder, "heads-anew"),
        kept,
        progress,
    )
    behind = (0, *(layer + 1 for layer in layers[:-1]))
    following = (*layers[1:], before.num_hidden_layers)
    for layer, (since, origin, until) in enumerate(zip(behind, layers, following, strict=True)):
        run.keep(f"block-{layer}", rebuilder.block(layer, since, origin, until, streams))
        if progress is not None:
            progress("shrinking", layer + 1, len(layers))
    if rebuilder.recipe.solve:
        run.keep("head", fit_head(teacher, student, stream, streams, rebuilder.recipe))
    run.keep("end", rebuilder.finish(len(layers) - 1, streams))
    return Rebuilt(base, run.files, kept, _losses(run, windows), tuple(rebuilder.errors))


def importance_for(
    teacher: Walk,
    target: Sizes,
    windows: Windows,
    folder: Path,
    recipe: Recipe,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """What the loss feels in a model's blocks; nothing where no units or heads go, or the recipe looks at norms alone.

    Arguments as of `rebuild`; the teacher is that of its source. The result is as of `importance`.
    """
    sizes = Sizes.from_config(teacher.weights.family, teacher.weights.config)
    asks = recipe.asks_loss and _insides(sizes) != _insides(target)
    return importance(teacher, windows.fit, folder, progress) if asks else {}


def _insides(sizes: Sizes) -> tuple[int, int, int]:
    return sizes.intermediate_size, sizes.num_attention_heads, sizes.num_key_value_heads


def _embedded(walk: Walk, ids_BT: Tensor, folder: Path, name: str) -> Tensor:
    """What the first block gets for some windows, where streams lie."""
    width = Sizes.from_config(walk.weights.family, walk.weights.config).hidden_size
    return walk.embed(ids_BT, empty_stream((*ids_BT.shape, width), folder, name))


def _losses(run: _Run, windows: Windows) -> dict[str, tuple[float, float]]:
    """Mean cross-entropy of both models on the held-out windows and on each text to check."""
    parts, start = {}, len(windows.fit)
    for label, ids in {"held-out": windows.held_out, **windows.checks}.items():
        parts[label] = ids, slice(start, start + len(ids))
        start += len(ids)
    found: dict[str, list[float]] = {}
    for walk, stream in ((run.teacher, run.streams.teacher), (run.student, run.streams.student)):
        with walk.head():
            for label, (ids, where) in parts.items():
                found.setdefault(label, []).append(mean_loss(walk, stream[where], ids))
    return {label: (pair[0], pair[1]) for label, pair in found.items()}
