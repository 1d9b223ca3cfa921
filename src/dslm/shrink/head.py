"""The end of the model, after its blocks: the output table is re-read like any reader.

An untied table becomes ``W M`` with ``M`` the least-squares map from the student's last state to the teacher's. A tied
one stays the input table, and only the last norm's gain is fitted: ``argmin_c sum |E u - E' (c u')|^2`` has the normal
equations ``(E'^T E' * C_u'u') c = diag(E'^T E C_uu')`` with an elementwise product (``docs/how-it-works.md``).

Shape letters: N tokens, D the teacher's hidden size, S the student's, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dslm.families.axes import Role
from dslm.shrink.fold import Encoder
from dslm.shrink.recipe import Recipe
from dslm.shrink.rotate import Rotation
from dslm.shrink.solve import Moments, solve
from dslm.shrink.streams import Streams
from dslm.shrink.walk import Walk
from dslm.shrink.weights import ROWS, table_on_stream


def fit_head(
    teacher: Walk, student: Walk, stream: Encoder | None, streams: Streams, recipe: Recipe
) -> dict[str, Tensor]:
    """Fit the end of the student.

    Args:
        teacher: the model to follow.
        student: the smaller model.
        stream: what became of the residual stream; None if it stayed.
        streams: both streams after the last block.
        recipe: how to fit.

    Returns:
        The tensors that changed, by their names on disk.
    """
    family, config = student.weights.family, student.weights.config
    tied = family.is_tied(config)
    if not table_on_stream(family, config) or (tied and stream is None):
        return {}
    widths = streams.student.shape[-1], streams.teacher.shape[-1]
    sums = {fit: Moments.zero(*widths, student.device) for fit in (True, False)}
    with teacher.head(), student.head():
        for windows, fit in streams.used():
            goal_ND = teacher.before_head(streams.teacher[windows].to(teacher.device))
            x_NS = student.before_head(streams.student[windows].to(student.device))
            sums[fit].add(x_NS, goal_ND)
    for one in sums.values():
        one.summed()
    if tied:
        return _balanced_norm(teacher, student, sums)
    decoder_DS = torch.eye(streams.teacher.shape[-1], device=student.device)
    if isinstance(stream, Rotation) and family.head in stream.gains:
        gain_D = teacher.weights.read(stream.gains[family.head]) + family.gain_offset
        decoder_DS = decoder_DS * gain_D.to(decoder_DS)
    if stream is not None:
        decoder_DS = stream.read(decoder_DS, 1)
    found = solve(sums[True], sums[False], decoder_DS, {"head": slice(None)}, ridges=recipe.ridges)["head"]
    table = family.embedding if family.is_tied(teacher.weights.config) else family.head
    table_VD = teacher.weights.read(table)
    return {family.head: table_VD @ found.weight_YX.cpu().to(table_VD)}


def _balanced_norm(teacher: Walk, student: Walk, sums: dict[bool, Moments]) -> dict[str, Tensor]:
    """The last norm with the factors that suit a tied table best, kept if they do better on held-out tokens."""
    family = student.weights.family
    table_VS, table_VD = (walk.weights.read(family.embedding) for walk in (student, teacher))
    own_SS = torch.zeros(table_VS.shape[1], table_VS.shape[1], dtype=torch.float64)
    cross_SD = torch.zeros(table_VS.shape[1], table_VD.shape[1], dtype=torch.float64)
    for some_VS, some_VD in zip(torch.split(table_VS, ROWS), torch.split(table_VD, ROWS), strict=True):
        own_SS += some_VS.double().T @ some_VS.double()
        cross_SD += some_VS.double().T @ some_VD.double()

    def loss(sums: Moments, factor_S: Tensor) -> float:
        quadratic = factor_S @ (own_SS * sums.gram_XX.cpu()) @ factor_S
        return float(quadratic - 2.0 * factor_S @ (cross_SD @ sums.cross_YX.cpu()).diagonal())

    ones_S = torch.ones(len(own_SS), dtype=torch.float64)
    system_SS = own_SS * sums[True].gram_XX.cpu()
    goal_S = (cross_SD @ sums[True].cross_YX.cpu()).diagonal()
    best, error = ones_S, loss(sums[False], ones_S)
    for strength in (0.01, 0.1, 1.0):
        damped_SS = system_SS + torch.diag(strength * system_SS.diagonal())
        factor_S = ones_S + torch.linalg.solve(damped_SS, goal_S - system_SS @ ones_S)
        if loss(sums[False], factor_S) < error:
            best, error = factor_S, loss(sums[False], factor_S)
    found = {}
    for name, place in student.places.items():
        if family.is_final_norm(name):
            offset = family.gain_offset if place.line.spec.axes[0].role is Role.GAIN else 0
            stored = student.weights.read(name)
            found[name] = (stored + offset) * best.to(stored) - offset
    return found
