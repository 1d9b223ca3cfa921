"""A matrix that writes the residual stream: what it reads in the smaller model, and what it should write.

It aims at where the teacher's stream goes, less where the student's already is. Where a norm stands behind it (OLMo-2,
Gemma 2 and 3) that is what the norm should give. The matrix then aims at the direction that makes the norm give it; no
matrix changes the size of what a norm gives, so its gain is fitted behind it.

Shape letters: N tokens of some windows, D the teacher's hidden size, X input features, Y the student's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dslm.shrink.memo import Memo
from dslm.shrink.solve import sum_over_processes
from dslm.shrink.streams import Streams
from dslm.shrink.tap import bias_of, tap, with_one
from dslm.shrink.walk import Walk

_DAMPING = 0.01
"""Added to the square of a gain before it divides, relative to the mean over channels: a channel that a norm nearly
silences is not asked for more than it can give."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of the two models, at one of its blocks, which is loaded.

    Attributes:
        walk: the model.
        layer: the block's number.
        writer: the weight that is meant.
        adds: what the block adds to the stream until then: writers, or the norms behind them; the last is its own.
        memo: what attention makes of each window.
    """

    walk: Walk
    layer: int
    writer: str
    adds: tuple[str, ...]
    memo: Memo

    @property
    def norm(self) -> str | None:
        """The gain of the norm behind the writer, if there is one."""
        return None if self.adds[-1] == self.writer else self.adds[-1]

    def see(
        self, stream_BTD: Tensor, windows: slice, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """What some modules of the block get and give for some windows of the stream before it, as of `tap`."""
        if not inputs and not outputs:
            return {}
        hidden_BTD = stream_BTD[windows].to(self.walk.device)
        with self.memo.of(windows):
            return tap(self.walk, self.layer, hidden_BTD, inputs=inputs, outputs=outputs)


def side(walk: Walk, layer: int, writers: Sequence[str], position: int, memo: Memo) -> Side:
    """The writer at a position of a loaded block, whose writers are named in running order."""
    norms = walk.weights.family.branch_norms
    adds = tuple(f"{norm.replace('{layer}', str(layer))}.weight" for norm in norms) or tuple(writers)
    assert len(adds) == len(writers), "the table names a norm for each writer, or for none"
    return Side(walk, layer, writers[position], adds[: position + 1], memo)


@dataclass(frozen=True, slots=True, eq=False)
class StreamWriter:
    """A writer in both models.

    Attributes:
        teacher: where it comes from.
        student: where it is solved.
        last: nothing in the block adds to the stream behind it.
        follows: it aims at the stream; else at what the teacher's writes.
        encoded: from the teacher's stream to what the student carries of it.
        weighted: what tokens count, given the teacher's stream behind the block; None where all count alike.
    """

    teacher: Side
    student: Side
    last: bool
    follows: bool
    encoded: Callable[[Tensor], Tensor]
    weighted: Callable[[Tensor], Tensor | None]

    def regression(self, streams: Streams, windows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the student's reads ``[N, X]``, what it should write ``[N, Y]``, and what each token counts ``[N]``."""
        name = self.student.writer
        earlier = self.student.adds[:-1] if self.follows else ()
        seen = self.student.see(streams.student, windows, inputs=[name], outputs=earlier)
        x_NX = with_one(seen[name]) if bias_of(self.student.walk, name) else seen[name]
        weight_N = self._weights(streams, windows)
        if not self.follows:
            given = self.teacher.see(streams.teacher, windows, outputs=[self.teacher.writer])
            return x_NX, self.encoded(given[f"{self.teacher.writer}:out"]), weight_N
        wanted_NY, usual_NY = self._wanted(streams, windows, seen)
        if usual_NY is not None:
            wanted_NY, weight_N = before_norm(wanted_NY, usual_NY, self._gain(), self._epsilon, weight_N)
        return x_NX, wanted_NY, weight_N

    def outputs_count(self) -> Tensor | None:
        """What an error in each output counts, ``[Y]``, for choosing the ridge: the square of the gain behind it."""
        return self._gain().square() if self.student.norm and self.follows else None

    def refit_gain(self, streams: Streams, ridges: Sequence[float]) -> Tensor | None:
        """What to store for the gain of the norm behind the writer; None if it is best as it is, or there is none.

        With ``u`` what the norm gives without its gain and ``t`` what it should give, the gain goes from ``g`` to
        ``g + sum w u (t - g u) / ((1 + ridge) sum w u^2)`` in each channel, with the ridge that does best on held-out
        windows, in those channels where it does any good there.
        """
        norm = self.student.norm
        if norm is None or not self.follows:
            return None
        stored_Y, gain_Y = self.student.walk.get(norm), self._gain().double()
        sums = {fit: gain_Y.new_zeros(2, len(gain_Y)) for fit in (True, False)}
        self.student.walk.put(
            norm, torch.full_like(stored_Y, 1.0 - self.student.walk.weights.family.gain_offset)
        )
        for windows, fit in streams.used():
            seen = self.student.see(streams.student, windows, outputs=self.student.adds)
            wanted_NY, _ = self._wanted(streams, windows, seen)
            u_NY, weight_N = seen[f"{norm}:out"], self._weights(streams, windows)
            weighted_NY = u_NY if weight_N is None else u_NY * weight_N[:, None]
            sums[fit] += torch.stack([(weighted_NY * t_NY).sum(dim=0) for t_NY in (wanted_NY, u_NY)])
        self.student.walk.put(norm, stored_Y)
        (cross_Y, power_Y), (held_cross_Y, held_power_Y) = (
            sum_over_processes(sums[fit]) for fit in (True, False)
        )
        step_Y = (cross_Y - gain_Y * power_Y) / power_Y.clamp_min(1e-300)
        best_Y, least = None, 0.0
        for ridge in ridges:
            change_Y = step_Y / (1.0 + ridge)
            error_Y = change_Y * ((2.0 * gain_Y + change_Y) * held_power_Y - 2.0 * held_cross_Y)
            change_Y, error = change_Y * (error_Y < 0.0), float(error_Y.clamp_max(0.0).sum())
            if error < least:
                best_Y, least = stored_Y + change_Y.to(stored_Y), error
        return best_Y

    @property
    def _epsilon(self) -> float:
        """What the norm behind the writer adds to the mean square."""
        assert self.student.norm is not None, "asked for only where there is a norm"
        norm: Any = self.student.walk.places[self.student.norm].owners[0][0]
        return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)

    def _gain(self) -> Tensor:
        assert self.student.norm is not None, "asked for only where there is a norm"
        return self.student.walk.get(self.student.norm) + self.student.walk.weights.family.gain_offset

    def _weights(self, streams: Streams, windows: slice) -> Tensor | None:
        return self.weighted(streams.ahead[windows].flatten(0, 1).to(self.student.walk.device))

    def _wanted(
        self, streams: Streams, windows: slice, seen: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What the writer, or the norm behind it, should give, ``[N, Y]``.

        With it comes what the teacher's writer gives, as the student carries it, where a norm stands behind it.

        Args:
            streams: both streams before the block.
            windows: which of them.
            seen: what the student's block has added so far.
        """
        names = () if self.last else self.teacher.adds
        own = (self.teacher.writer,) if self.teacher.norm else ()
        given = self.teacher.see(streams.teacher, windows, outputs=[*names, *own])
        where = self.student.walk.device
        goal_ND = streams.ahead[windows].flatten(0, 1).to(where)
        if not self.last:
            added = torch.stack([given[f"{name}:out"] for name in names]).sum(dim=0)
            goal_ND = streams.teacher[windows].flatten(0, 1).to(where) + added
        wanted_NY = self.encoded(goal_ND) - streams.student[windows].flatten(0, 1).to(where)
        for name in self.student.adds[:-1]:
            wanted_NY = wanted_NY - seen[f"{name}:out"]
        return wanted_NY, self.encoded(given[f"{own[0]}:out"]) if own else None


def before_norm(
    wanted_NY: Tensor, usual_NY: Tensor, gain_Y: Tensor, epsilon: float, weight_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What to write in front of a norm with a gain, ``u -> g u / rms(u)``, so that it gives what is wanted.

    Only a direction can be asked for, since a norm gives every token the same size; what is asked for is as large as
    what the teacher's writer gives, which is what a matrix can do.

    Args:
        wanted_NY: what the norm should give.
        usual_NY: what it gets in the teacher.
        gain_Y: its gain.
        epsilon: what it adds to the mean square.
        weight_N: what tokens count behind the norm; None where all count alike.

    Returns:
        What it should get, and what tokens count there.
    """
    square_N1 = usual_NY.square().mean(dim=1, keepdim=True) + epsilon
    damping = _DAMPING * gain_Y.square().mean()
    inverse_Y = gain_Y / (gain_Y.square() + damping).clamp_min(torch.finfo(gain_Y.dtype).tiny)
    off_NY = wanted_NY - gain_Y * usual_NY / square_N1.sqrt()
    asked_NY = usual_NY + square_N1.sqrt() * inverse_Y * off_NY
    asked_NY = asked_NY * (square_N1 / (asked_NY.square().mean(dim=1, keepdim=True) + epsilon)).sqrt()
    weights_N = square_N1[:, 0].reciprocal()
    return asked_NY, weights_N if weight_N is None else weight_N * weights_N
