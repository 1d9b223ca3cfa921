"""Growing: methods that map a dimension to a larger one, one file each, and what applies their maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dslm.families import Family
from dslm.grow import hypercloning, net2net, padding
from dslm.grow.axis_map import AxisMap
from dslm.sizes import Sizes

MapOne = Callable[[Family, Sizes, Sizes, int], AxisMap]
MapHeads = Callable[[Family, Sizes, Sizes, int], dict[str, AxisMap]]


@dataclass(frozen=True, slots=True)
class Method:
    """A named, cited rule: for each kind of dimension, the map from source to target sizes.

    Each function takes the family, the source sizes, the target sizes and the seed.
    """

    name: str
    source: str
    hidden: MapOne
    intermediate: MapOne
    heads: MapHeads


METHODS = {
    name: Method(name, module.SOURCE, module.hidden, module.intermediate, module.heads)
    for name, module in (("hypercloning", hypercloning), ("net2net", net2net), ("padding", padding))
}
