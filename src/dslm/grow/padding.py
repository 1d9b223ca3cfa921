"""Padding: new capacity is silent at the start, reading at random and writing zero, or the reverse.

Zero padding as in "Composable function-preserving expansions" (Gesmundo and Maile, arXiv 2308.06103), with two changes.
Old channels are scaled by ``sqrt(D / d)``, so that a norm keeps its mean square and the weight of its epsilon; and one
side of everything new is random, so that it gets a gradient.
"""

from __future__ import annotations

import numpy as np

from dslm.families import Family
from dslm.grow import hypercloning
from dslm.grow.axis_map import AxisMap, padded
from dslm.grow.heads import lay_out_heads
from dslm.sizes import Sizes

SOURCE = "https://arxiv.org/abs/2308.06103"


def hidden(family: Family, source: Sizes, target: Sizes, seed: int) -> AxisMap:
    """The residual stream: new channels carry zero and are read at random."""
    return padded(
        source.hidden_size, target.hidden_size, new_writes=False, normed=True, centred=family.norm == "layer"
    )


def intermediate(family: Family, source: Sizes, target: Sizes, seed: int) -> AxisMap:
    """FFN units: new ones read the stream at random and write zero to it."""
    return padded(source.intermediate_size, target.intermediate_size, new_writes=True, normed=False)


def heads(family: Family, source: Sizes, target: Sizes, seed: int) -> dict[str, AxisMap]:
    """New heads have random queries, keys and values, and an output of zero.

    Where a norm runs over all heads together (OLMo-2) random queries and keys would disturb the old ones, so new
    heads are copies there, as in `hypercloning`.
    """
    if any(axis.normed for specs in family.tensors.values() for spec in specs for axis in spec.axes):
        return hypercloning.heads(family, source, target, seed)
    layout = lay_out_heads(source, target)
    return {
        "heads": _silent(layout.heads, layout.new_heads, source.num_attention_heads),
        "kv_heads": _silent(layout.kv_heads, layout.new_kv_heads, source.num_key_value_heads),
    }


def _silent(source: np.ndarray, new: np.ndarray, size: int) -> AxisMap:
    return AxisMap(size=size, source=source, new=new, amplitude=np.ones(len(source)), new_writes=True)
