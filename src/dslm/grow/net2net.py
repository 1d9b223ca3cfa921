"""Net2WiderNet: new units repeat old ones drawn at random, and their readers compensate exactly.

Source: Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer" (arXiv 1511.05641, section
3.1, equations 3 to 5). The paper's compensation divides by the number of copies; here the split does, exactly.
"""

from __future__ import annotations

import numpy as np

from dslm.errors import RecipeError
from dslm.families import Family
from dslm.grow.axis_map import AxisMap, copies
from dslm.sizes import Sizes

SOURCE = "https://arxiv.org/abs/1511.05641"


def hidden(family: Family, source: Sizes, target: Sizes, seed: int) -> AxisMap:
    """Refused: unweighted random copies of the residual stream change what its norms compute.

    Raises:
        RecipeError: always.
    """
    raise _ffn_only("hidden_size")


def intermediate(family: Family, source: Sizes, target: Sizes, seed: int) -> AxisMap:
    """FFN units: the old ones in place, then a random draw from them with replacement."""
    size = source.intermediate_size
    drawn = np.random.default_rng(seed).integers(0, size, target.intermediate_size - size)
    return copies(np.concatenate([np.arange(size), drawn]), size)


def heads(family: Family, source: Sizes, target: Sizes, seed: int) -> dict[str, AxisMap]:
    """Refused, as `hidden` is: heads belong to groups, and a random draw ignores them.

    Raises:
        RecipeError: always.
    """
    raise _ffn_only("num_attention_heads")


def _ffn_only(word: str) -> RecipeError:
    return RecipeError(f"net2net widens the FFN only, not {word}", "use --method hypercloning or padding")
