"""What a pass through a block shows agrees with the family's table."""

from __future__ import annotations

import pytest

import pico
import shrinking
from dslm.shrink.tap import anatomy, tap
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_the_table_says_whether_writers_add_to_the_stream(family, variant, tmp_path):
    walk = Walk(Stored(shrinking.make_source(tmp_path, family, variant)))
    stream = walk.embed(pico.tokens(rows=2, length=20))
    with walk.block(0):
        writers = anatomy(walk, 0, stream).writers
        given = tap(walk, 0, stream, outputs=writers)
        out = walk.run(0, stream)
    written = stream + sum(given.values()).view_as(stream)
    off = float((written - out).abs().max() / (out - stream).abs().max())
    adds = walk.weights.family.writers_add(walk.weights.config)
    assert off < 1e-4 if adds else off > 1e-2
    assert len(writers) == 2
