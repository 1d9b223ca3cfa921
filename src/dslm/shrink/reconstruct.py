"""Shrinking one block: choose what stays, then re-read it by least squares on what the smaller model really sees.

Teacher and student walk side by side. In each block the stages run in order: matrices that read the stream aim at what
the teacher's compute from its own stream; matrices that write it aim at where the teacher's stream goes, so that each
block also repairs what earlier blocks have lost (``docs/how-it-works.md``, "Re-reading").

Shape letters: B windows, T tokens, N tokens of a batch, D hidden size, X input features, Y outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dslm.progress import Progress
from dslm.shrink.fold import Encoder, Fold, Key, axis_fold
from dslm.shrink.memo import Memo
from dslm.shrink.recipe import Recipe
from dslm.shrink.solve import Moments, place_of_share, solve, sum_over_processes
from dslm.shrink.steps import step_towards_logits, step_towards_stream, steps_to_take
from dslm.shrink.streams import Streams, token_weights
from dslm.shrink.survivors import Survivors, enough
from dslm.shrink.tap import Anatomy, Stage, anatomy, bias_of, tap, watch, with_one
from dslm.shrink.walk import Walk
from dslm.shrink.weights import as_kept
from dslm.shrink.writers import StreamWriter, side
from dslm.sizes import Sizes


@dataclass(slots=True, eq=False)
class Rebuilder:
    """Rebuilds the blocks of a student one after the other.

    Attributes:
        teacher: the model to follow.
        student: the smaller model, whose weights are the teacher's seen through ``folds``.
        folds: space -> fold; the folds of a block are chosen when it is reached.
        stream: what becomes of the residual stream; None if it stays.
        source: the teacher's sizes.
        target: the student's sizes.
        recipe: how blocks are rebuilt.
        felt: what `dslm.shrink.importance` gave for the teacher; empty where norms choose.
        teacher_memo: what the teacher's attention makes of each window, for the block at hand.
        student_memo: the same of the student's, once the matrices before it are solved.
        dtypes: the student's tensor -> what it is kept in; empty for float32.
        progress: called with a label, steps done and steps in all, while a block takes steps.
        errors: relative squared error of the student's stream after each block, on held-out windows.
    """

    teacher: Walk
    student: Walk
    folds: dict[Key, Fold]
    stream: Encoder | None
    source: Sizes
    target: Sizes
    recipe: Recipe
    felt: Mapping[str, Tensor]
    teacher_memo: Memo
    student_memo: Memo
    dtypes: Mapping[str, torch.dtype]
    progress: Progress | None = None
    errors: list[float] = field(default_factory=list)

    def block(self, layer: int, since: int, origin: int, until: int, streams: Streams) -> dict[str, Tensor]:
        """Rebuild one block and move both streams past it.

        Args:
            layer: the student's block.
            since: the teacher's block behind the last one that was kept; this one, if none is dropped between.
            origin: the teacher's block that it comes from.
            until: the teacher's next block that is kept; those between are dropped, and this block makes up for them.
            streams: both streams before the block; they are moved on.

        Returns:
            The block's tensors by their names on disk.
        """
        with self.teacher.block(origin):
            shape = anatomy(self.teacher, origin, streams.teacher[:1].to(self.teacher.device))
            attention = shape.attention if self.recipe.solve else None  # a plain cut sees it once anyway
            self.teacher_memo.turn_to(origin, attention)
            self.student_memo.turn_to(layer, attention)
            self._look_ahead(origin, shape, streams)
        for skipped in range(origin + 1, until):
            with self.teacher.block(skipped):
                for windows in streams.batches():
                    moved = self.teacher.run(skipped, streams.ahead[windows].to(self.teacher.device))
                    streams.ahead[windows] = moved.cpu()
        with self.teacher.block(origin), self.student.block(layer):
            if self.recipe.solve:
                for stage in shape.stages:
                    self._stage(stage, shape, layer, origin, streams)
            beside_gap, is_last = not since == origin == until - 1, until == self.source.num_hidden_layers
            if not (is_last and self.recipe.last_steps):  # that one is for `finish`
                self._step(
                    layer, streams, self.recipe.gap_steps if beside_gap else 0, astray=until > layer + 1
                )
            self._move_on(layer, streams)
            return {name: self.student.get(name).cpu() for name in self.student.names(layer)}

    def _look_ahead(self, origin: int, shape: Anatomy, streams: Streams) -> None:
        """Run the teacher's block; on the way choose the units and heads that stay."""
        _, fit = place_of_share(streams.fit)
        survivors = Survivors(
            self.teacher,
            self.source,
            self.target,
            shape.writers,
            self.felt,
            refitted=self.recipe.solve and enough(fit * streams.teacher.shape[1], self.source),
            weigh_tokens=self.recipe.weigh_tokens,
        )
        for windows in streams.batches():
            hidden = streams.teacher[windows].to(self.teacher.device)
            with self.teacher_memo.of(windows):
                watched = survivors.watched if windows.start < streams.fit else ()
                out, seen = watch(self.teacher, origin, hidden, watched)
            streams.ahead[windows] = out.cpu()
            survivors.see(seen, out.flatten(0, 1))
        self.folds.update({(word, origin): fold for word, fold in survivors.folds().items()})

    def _weights(self, stream_ND: Tensor) -> Tensor | None:
        """What tokens count, given the stream behind; None where all count alike."""
        return token_weights(stream_ND) if self.recipe.weigh_tokens else None

    def _stage(self, stage: Stage, shape: Anatomy, layer: int, origin: int, streams: Streams) -> None:
        if stage.writes:
            for name in stage.names:
                self._solve_writer(name, shape, layer, origin, streams)
        elif self.recipe.readers:
            self._solve_readers(stage.names, layer, origin, streams)

    def _solve_readers(self, names: tuple[str, ...], layer: int, origin: int, streams: Streams) -> None:
        """Matrices that read the same input aim at what the teacher's compute, for the units and heads that stay."""
        own = [_moved(name, origin, layer) for name in names]
        prior_YX = torch.cat([_affine(self.student, name) for name in own])
        target_YX = torch.cat([self._kept_rows(name, origin) for name in names])
        widths = prior_YX.shape[1], target_YX.shape[1]
        sums = {fit: Moments.zero(*widths, self.student.device) for fit in (True, False)}
        powers = {fit: Moments.zero(widths[1], 0, self.student.device) for fit in (True, False)}
        for windows, fit in streams.used():
            with self.student_memo.of(windows, own):
                x_NX = _read(self.student, layer, streams.student[windows], own[0])
            with self.teacher_memo.of(windows, names):
                wanted_NX = _read(self.teacher, origin, streams.teacher[windows], names[0])
            sums[fit].add(x_NX, wanted_NX)
            powers[fit].add(wanted_NX, wanted_NX[:, :0])
        moments = {
            fit: sums[fit].summed().through(target_YX, powers[fit].summed().gram_XX) for fit in (True, False)
        }
        self._accept(moments, prior_YX, own)

    def _kept_rows(self, name: str, origin: int) -> Tensor:
        """Rows of a teacher's matrix, and its bias behind them, as the student's writes them."""
        line = self.teacher.places[name].line
        sizes = self.teacher.weights.family.dimensions(self.teacher.weights.config)
        fold = axis_fold(line.spec.axes[0], origin, self.folds, sizes)
        rows = _affine(self.teacher, name)
        return rows if fold is None else fold.write(rows, 0)

    def _solve_writer(self, name: str, shape: Anatomy, layer: int, origin: int, streams: Streams) -> None:
        """A matrix that writes the stream aims at where the teacher's stream goes; so does the norm behind it."""
        position, family = shape.writers.index(name), self.teacher.weights.family
        own = [_moved(writer, origin, layer) for writer in shape.writers]
        writer = StreamWriter(
            side(self.teacher, origin, shape.writers, position, self.teacher_memo),
            side(self.student, layer, own, position, self.student_memo),
            last=position == len(own) - 1,
            follows=self.recipe.drift and family.keeps_stream(self.teacher.weights.config),
            encoded=self._encoded,
            weighted=self._weights,
        )
        prior_YX = _affine(self.student, own[position])
        sums = {
            fit: Moments.zero(prior_YX.shape[1], len(prior_YX), self.student.device) for fit in (True, False)
        }
        for windows, fit in streams.used():
            sums[fit].add(*writer.regression(streams, windows))
        moments = {fit: one.summed() for fit, one in sums.items()}
        self._accept(moments, prior_YX, [own[position]], writer.outputs_count())
        gain_Y = writer.refit_gain(streams, self.recipe.ridges)
        if gain_Y is not None:
            assert writer.student.norm is not None, "whose gain it is"
            self._put(writer.student.norm, gain_Y)

    def _encoded(self, hidden_ND: Tensor) -> Tensor:
        """The teacher's stream as the student carries it."""
        return hidden_ND if self.stream is None else self.stream.write(hidden_ND, -1)

    def _accept(
        self,
        moments: dict[bool, Moments],
        prior_YX: Tensor,
        names: list[str],
        count_Y: Tensor | None = None,
    ) -> None:
        """Solve for some matrices that read the same input, and put the results in place."""
        parts, start = {}, 0
        for name in names:
            stop = start + len(self.student.get(name))
            parts[name] = slice(start, stop)
            start = stop
        fit, held_out = moments[True], moments[False]
        found = solve(fit, held_out, prior_YX, parts, ridges=self.recipe.ridges, count_Y=count_Y)
        for name, solution in found.items():
            weight_YX = solution.weight_YX
            if bias := bias_of(self.student, name):
                self._put(bias, weight_YX[:, -1].clone())
                weight_YX = weight_YX[:, :-1]
            self._put(name, weight_YX.contiguous())

    def _put(self, name: str, values: Tensor) -> None:
        """Give a tensor of the student the numbers that it will be kept with."""
        self.student.put(name, self._kept(name, values))

    def _kept(self, name: str, values: Tensor) -> Tensor:
        return as_kept(name, values, self.dtypes)

    def _step(self, layer: int, streams: Streams, most: int, *, astray: bool) -> None:
        """Train a block towards where the teacher's stream goes, in so many steps of its own at most."""
        steps = steps_to_take(self.recipe, streams, most)
        if steps:
            self.student_memo.turn_to(layer, None)
            step_towards_stream(
                self.student,
                layer,
                streams,
                self._encoded,
                steps=steps,
                astray=astray,
                kept=self._kept,
                progress=self.progress,
            )

    def finish(self, layer: int, streams: Streams) -> dict[str, Tensor]:
        """Train the last block, and the norm behind it, towards what the teacher says; both streams are behind it.

        Args:
            layer: the student's last block.
            streams: both streams, and the student's before the block; its own is computed anew.

        Returns:
            The tensors that were trained, by their names on disk; none if that did not help.
        """
        if not self.recipe.last_steps:
            return {}
        steps = steps_to_take(self.recipe, streams, self.recipe.last_steps)
        if not steps:
            return {}
        with self.student.block(layer), self.teacher.head(), self.student.head():
            self.student_memo.turn_to(layer, None)
            names = step_towards_logits(
                self.teacher,
                self.student,
                layer,
                streams,
                steps=steps,
                kept=self._kept,
                progress=self.progress,
            )
            if names:
                self.errors.pop()
                self._pass(layer, streams)
            return {name: self.student.get(name).cpu() for name in names}

    def _move_on(self, layer: int, streams: Streams) -> None:
        """Move both streams past the block; the student's before it is kept for the moment."""
        for windows in streams.batches():
            streams.teacher[windows] = streams.ahead[windows]
            streams.behind[windows] = streams.student[windows]
        self._pass(layer, streams)

    def _pass(self, layer: int, streams: Streams) -> None:
        """Run the student's block on the stream before it, and note how far behind it both are apart."""
        off, whole = 0.0, 0.0
        for windows in streams.batches():
            with self.student_memo.of(windows):
                out = self.student.run(layer, streams.behind[windows].to(self.student.device)).cpu()
            streams.student[windows] = out
            if windows.start in streams.deciding:
                goal = self._encoded(streams.teacher[windows].to(self.student.device)).cpu()
                scale = goal.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)
                off += float(((out - goal).square() / scale).sum())
                whole += goal.numel()
        off, whole = sum_over_processes(torch.tensor([off, whole], dtype=torch.float64)).tolist()
        self.errors.append(off / whole)


def _moved(name: str, origin: int, layer: int) -> str:
    """The name that a tensor of block ``origin`` has in block ``layer``."""
    return name.replace(f".{origin}.", f".{layer}.", 1)


def _affine(walk: Walk, name: str) -> Tensor:
    """A loaded matrix with its bias as a last column, where it has one."""
    bias = bias_of(walk, name)
    weight_YX = walk.get(name)
    return weight_YX if bias is None else torch.cat([weight_YX, walk.get(bias)[:, None]], dim=1)


def _read(walk: Walk, layer: int, hidden_BTD: Tensor, name: str) -> Tensor:
    """What a matrix reads, with a one behind it where it has a bias."""
    x_NX = tap(walk, layer, hidden_BTD.to(walk.device), inputs=[name])[name]
    return with_one(x_NX) if bias_of(walk, name) else x_NX
