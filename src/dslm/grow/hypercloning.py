"""HyperCloning: new capacity is copies of the old, and readers share what the copies carry.

Source: Samragh et al., "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model
Initialization" (arXiv 2409.12903). The paper clones integer multiples; here any target size is exact, through copies
weighted so that norms do not notice (``docs/how-it-works.md``, "Weighted copies").
"""

from __future__ import annotations

import numpy as np

from dslm.families import Family
from dslm.grow.axis_map import AxisMap, copies, padded, weighted_copies
from dslm.grow.heads import lay_out_heads
from dslm.sizes import Sizes

SOURCE = "https://arxiv.org/abs/2409.12903"


def hidden(family: Family, source: Sizes, target: Sizes, seed: int) -> AxisMap:
    """The residual stream: tiled copies.

    Under RMSNorm any width works, with weighted copies. A LayerNorm also takes the mean off, which unequal counts
    would shift: there as many whole copies as fit are followed by silent channels on a centred stream.
    """
    if family.norm == "rms" or target.hidden_size % source.hidden_size == 0:
        return weighted_copies(np.arange(target.hidden_size) % source.hidden_size, source.hidden_size)
    tiles = target.hidden_size // source.hidden_size
    return padded(
        source.hidden_size, target.hidden_size, tiles=tiles, new_writes=False, normed=True, centred=True
    )


def intermediate(family: Family, source: Sizes, target: Sizes, seed: int) -> AxisMap:
    """FFN units: tiled copies; no norm runs over them, so no weights are needed."""
    return copies(np.arange(target.intermediate_size) % source.intermediate_size, source.intermediate_size)


def heads(family: Family, source: Sizes, target: Sizes, seed: int) -> dict[str, AxisMap]:
    """Whole heads, copied within their groups; weighted where a norm runs over all heads together."""
    layout = lay_out_heads(source, target)
    return {
        "heads": copies(layout.heads, source.num_attention_heads),
        "kv_heads": copies(layout.kv_heads, source.num_key_value_heads),
        "normed heads": weighted_copies(layout.heads, source.num_attention_heads),
        "normed kv_heads": weighted_copies(layout.kv_heads, source.num_key_value_heads),
    }
