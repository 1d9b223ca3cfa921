"""What a pass through a block shows agrees with the family's table."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.shrink.memo import Memo
from dslm.shrink.tap import anatomy, tap
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored
from dslm.shrink.writers import side


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_the_table_says_what_adds_to_the_stream(family, variant, tmp_path):
    """The writers, or the norms behind them; where a norm runs over the stream itself, neither."""
    walk = Walk(Stored(shrinking.make_source(tmp_path, family, variant)))
    stream = walk.embed(pico.tokens(rows=2, length=20))
    with walk.block(0):
        writers = anatomy(walk, 0, stream).writers
        adds = side(walk, 0, writers, 1, Memo(walk, (2, 20), tmp_path, "memo")).adds
        given = tap(walk, 0, stream, outputs={*writers, *adds})
        out = walk.run(0, stream)

    def missing(names) -> float:
        added = stream + sum(given[f"{name}:out"] for name in names).view_as(stream)
        return float((added - out).abs().max() / (out - stream).abs().max())

    table, config = walk.weights.family, walk.weights.config
    assert missing(adds) < 1e-4 if table.keeps_stream(config) else missing(adds) > 1e-2
    assert missing(writers) < 1e-4 if table.writers_add(config) else missing(writers) > 1e-2
    for writer, norm in zip(writers, adds, strict=True):
        if writer != norm:
            with walk.block(0):
                behind = tap(walk, 0, stream, inputs=[norm])[norm]
            assert torch.equal(behind, given[f"{writer}:out"]), "the norm behind this writer"
    assert len(writers) == 2
