"""From what a user asks of a shrink to the sizes to reach: divisors, a share, another model, a number of parameters."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import groupby
from math import ceil, lcm, log
from operator import attrgetter

from dslm.errors import SizeError
from dslm.families import Family
from dslm.families.family import Config
from dslm.shrink_plan import head_pairs, stream_can_shrink
from dslm.sizes import FRIENDLY, Sizes, count_parameters, is_legal
from dslm.targets import Candidate, parse_factor, parse_number

_FINE = 16
_ALIGNED = 8  # channels, so that rows of half-precision weights begin at 16 bytes
_NEAR = 0.01  # shapes that miss by more come after all others
_UNFRIENDLY = {256: 0.0, 128: 0.001, 64: 0.002, 1: 0.004}

# Damage of keeping the share s of a dimension: even and quadratic in -log s for layers and FFN units, so that both are
# cut mildly rather than one deeply; heads and stream cost from the start. Set by hand, from few shapes of SmolLM2-135M.
_LAYERS, _UNITS = 1.7, 1.0
_HEADS, _HEADS_AT_ONCE = 1.0, 0.4
STREAM = 1.0
STREAM_AT_ONCE = {"rotated": 1.1, "selected": 1.35}
"""Linear part of the damage of a narrower stream, by encoder (`dslm.shrink.encoder`)."""


def parse_divisor(text: str) -> Fraction:
    """A divisor such as ``2``, ``1.5`` or ``4/3``, exactly.

    Raises:
        SizeError: it is not a number, or is smaller than 1.
    """
    return parse_factor("divisor", text, "down only shrinks; dslm up grows")


def parse_share(text: str) -> Fraction:
    """A share of the parameters to keep, such as ``0.8`` or ``4/5``, exactly.

    Raises:
        SizeError: it is not a number between 0 and 1.
    """
    try:
        value = parse_number(text)
    except (ValueError, ZeroDivisionError) as error:
        raise SizeError(f"share {text!r} is not a number", "give one such as 0.8 or 4/5") from error
    if value <= 0:
        raise SizeError(f"share {text} is not positive", "give a share between 0 and 1, such as 0.8")
    if value >= 1:
        raise SizeError(f"share {text} is not below 1", "down only shrinks; dslm up grows")
    return value


def divided(family: Family, config: Config, hidden: Fraction, intermediate: Fraction) -> Sizes:
    """The source's sizes with the stream and the FFN divided.

    Head counts are divided with the stream and ``head_dim`` stays. Where a head count would not come out whole, the
    nearest legal pair of counts is taken.

    Raises:
        SizeError: a width would not be whole or legal; the hint names the nearest that are.
    """
    source = Sizes.from_config(family, config)
    target = source
    if hidden != 1:
        target = _with_hidden(family, config, source, _whole("hidden_size", source.hidden_size, hidden))
    return target.replace(
        intermediate_size=_whole("intermediate_size", source.intermediate_size, intermediate)
    )


def _whole(word: str, size: int, divisor: Fraction) -> int:
    quotient = size / divisor
    if quotient.denominator == 1:
        return int(quotient)
    step = 64 if size % 64 == 0 and quotient >= 64 else 1
    below, above = int(quotient) // step * step, (int(quotient) // step + 1) * step
    options = " or ".join(f"{n} (divided by {size / n:.6g})" for n in (below, above) if 0 < n < size)
    raise SizeError(
        f"{word} {size} divided by {divisor} is not a whole number",
        f"nearest: {options}" if options else "give a smaller divisor",
    )


def _with_hidden(family: Family, config: Config, source: Sizes, hidden_size: int) -> Sizes:
    """The source's sizes with a narrower stream, and head counts that follow it as closely as is legal.

    Raises:
        SizeError: no head counts fit this stream.
    """
    ratio = hidden_size / source.hidden_size
    options = list(_headed(family, config, source.replace(hidden_size=hidden_size), source))
    if not options:
        raise SizeError(
            f"no head counts are legal for {family.name} with hidden_size {hidden_size}",
            _nearest_widths(family, config, source, hidden_size),
        )

    def distance(target: Sizes) -> tuple[float, int]:
        follows = abs(log(target.num_key_value_heads / source.num_key_value_heads / ratio))
        return follows, -target.num_attention_heads

    return min(options, key=distance)


def _nearest_widths(family: Family, config: Config, source: Sizes, hidden_size: int) -> str:
    near = sorted(range(1, source.hidden_size), key=lambda n: abs(n - hidden_size))
    legal = (n for n in near if any(_headed(family, config, source.replace(hidden_size=n), source)))
    found = [n for n, _ in zip(legal, range(2), strict=False)]
    return f"nearest legal hidden_size: {' or '.join(map(str, found))}"


def _headed(family: Family, config: Config, shape: Sizes, source: Sizes) -> Iterator[Sizes]:
    """A shape with every head count that is legal and can be reached from the source.

    As many query heads stay with each key-value head as it had, unless no such count is legal.
    """
    group = source.num_attention_heads // source.num_key_value_heads
    whole = [(heads, kv) for heads, kv in head_pairs(source) if heads == kv * group]
    other = [(heads, kv) for heads, kv in head_pairs(source) if heads != kv * group]
    for pairs in (whole, other):
        shapes = [shape.replace(num_attention_heads=heads, num_key_value_heads=kv) for heads, kv in pairs]
        legal = [sizes for sizes in shapes if is_legal(family, config, sizes)]
        if legal:
            yield from legal
            return


@dataclass(frozen=True, slots=True)
class _Line:
    """A stream and head counts; with them the count is ``fixed + layers * (block + unit * intermediate_size)``."""

    sizes: Sizes
    fixed: int
    block: int
    unit: int

    def units(self, parameters: int, layers: int) -> float:
        """The ``intermediate_size`` that comes to this many parameters."""
        return ((parameters - self.fixed) / layers - self.block) / self.unit

    def count(self, layers: int, units: int) -> int:
        """Exact parameters."""
        return self.fixed + layers * (self.block + self.unit * units)


def shrink_candidates(
    family: Family, config: Config, parameters: int, *, count: int = 8, untie: bool = False
) -> list[Candidate]:
    """Legal shapes near a number of parameters below the source's, best first.

    For every stream, number of heads and number of layers the FFN that comes closest is found. Shapes are
    ranked by distance from the target plus what cutting each dimension is likely to cost: mild cuts of layers and FFN
    together cost least, heads and stream more.

    Args:
        family: the family's table.
        config: the source's config.
        parameters: how many the result should have.
        count: how many candidates to return.
        untie: the result has two tables.

    Raises:
        SizeError: the target is not below the source, or below the smallest shape there is.
    """
    source = Sizes.from_config(family, config)
    now = count_parameters(family, config)["total"]
    if parameters >= now:
        raise SizeError(
            f"{parameters:,} parameters is not smaller than the source's {now:,}",
            "down only shrinks; dslm up grows",
        )
    shape = source.replace(tied=False) if untie else source
    shapes = _shapes(family, config, shape)
    _check_possible(_narrowest(family, config, shape, shapes), parameters)
    damage = partial(_damage, shape, encoder="rotated" if family.rotates else "selected")
    best = _Best(count)
    for sizes in sorted(shapes, key=damage):
        if best.is_beyond(damage(sizes)):  # of this and all that follow
            break
        if not _can_be(family, config, shape, sizes):
            continue
        line = _line(family, config, sizes)
        for layers in range(source.num_hidden_layers, 0, -1):
            if best.is_beyond(damage(sizes.replace(num_hidden_layers=layers))):
                break
            for units in _unit_counts(shape.intermediate_size, line.units(parameters, layers)):
                found = _candidate(line, layers, units, parameters, damage)
                if found.parameters < now:
                    best.add(found)
    return best.candidates


class _Best:
    """So many candidates at most, best first: those near the target by their score, then the others."""

    def __init__(self, count: int) -> None:
        self._count, self._added = count, 0
        self._kept: list[tuple[bool, float, int, int, Candidate]] = []

    def add(self, candidate: Candidate) -> None:
        """Take a candidate in, and the worst out if there are too many."""
        self._added += 1
        key = abs(candidate.off) > _NEAR, candidate.score, candidate.parameters, self._added
        insort(self._kept, (*key, candidate))
        del self._kept[self._count :]

    def is_beyond(self, score: float) -> bool:
        """Whether a candidate of such a score, or a higher one, would not be kept."""
        return len(self._kept) == self._count and self._kept[-1][:2] < (False, score)

    @property
    def candidates(self) -> list[Candidate]:
        return [kept[-1] for kept in self._kept]


def _narrowest(family: Family, config: Config, source: Sizes, shapes: list[Sizes]) -> list[_Line]:
    """Of each width the heads that make the fewest parameters."""
    ordered = sorted(shapes, key=lambda s: (s.hidden_size, s.num_attention_heads + s.num_key_value_heads))
    lines = []
    for _, same in groupby(ordered, key=attrgetter("hidden_size")):
        least = next((sizes for sizes in same if _can_be(family, config, source, sizes)), None)
        if least is not None:
            lines.append(_line(family, config, least))
    return lines


def _shapes(family: Family, config: Config, source: Sizes) -> list[Sizes]:
    """Every stream and head count to try, legal or not."""
    step = source.head_dim if family.head_dim == "derived" else 64
    if source.hidden_size < 8 * step and family.head_dim != "derived":
        step = max(1, source.hidden_size // 8)
    widths = [source.hidden_size]
    if stream_can_shrink(family, config, source.tied):
        narrower = range(step, source.hidden_size, step)
        if family.head_dim != "derived" and not any(
            _keeps_heads(family, config, source, n) for n in narrower
        ):
            step = lcm(source.num_attention_heads, _ALIGNED)  # 9 heads must divide the stream: 504 = 9 * 56
        widths += sorted({*narrower, *range(step, source.hidden_size, step)}, reverse=True)
    return [
        source.replace(hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv)
        for width in widths
        for heads, kv in head_pairs(source)
    ]


def _keeps_heads(family: Family, config: Config, source: Sizes, hidden_size: int) -> bool:
    return is_legal(family, config, source.replace(hidden_size=hidden_size))


def _can_be(family: Family, config: Config, source: Sizes, target: Sizes) -> bool:
    """Whether sizes are legal and the same tensors exist.

    OPT has projections only where the table is not as wide as the stream.
    """
    if not is_legal(family, config, target):
        return False
    both = (family.present(sizes.into_config(family, config)) for sizes in (source, target))
    before, after = (dict(present).keys() for present in both)
    return before == after


def _line(family: Family, config: Config, sizes: Sizes) -> _Line:
    def total(layers: int, units: int) -> int:
        tried = sizes.replace(num_hidden_layers=layers, intermediate_size=units)
        return count_parameters(family, tried.into_config(family, config))["total"]

    one, two, wide = total(1, 1), total(2, 1), total(1, 2)
    unit = wide - one
    block = two - one - unit
    return _Line(sizes, fixed=one - block - unit, block=block, unit=unit)


def _check_possible(lines: list[_Line], parameters: int) -> None:
    least = min(lines, key=lambda line: line.count(1, 1))
    smallest, sizes = least.count(1, 1), least.sizes
    if parameters < smallest:
        raise SizeError(
            f"{parameters:,} parameters is too few: a table of {sizes.vocab_size:,} x {sizes.hidden_size} and 1 layer "
            f"with one FFN unit have {smallest:,}",
            "ask for more, or start from a smaller model",
        )


def _unit_counts(most: int, exact: float) -> set[int]:
    """Sizes of the FFN near the exact one, at several roundings, and all of it where that is near."""
    fine = _FINE if most >= _FINE**2 and most % _FINE == 0 else 1
    near = {round(exact / step) * step for step in (*FRIENDLY, fine)}
    if exact >= 1:
        near.add(max(1, (ceil(exact / fine) - 1) * fine))
    if exact > most - fine:
        near.add(most)
    return {units for units in near if 1 <= units <= most}


def _candidate(
    line: _Line, layers: int, units: int, parameters: int, damage: Callable[[Sizes], float]
) -> Candidate:
    sizes = line.sizes.replace(num_hidden_layers=layers, intermediate_size=units)
    total = line.count(layers, units)
    off = total / parameters - 1
    friendly = next((n for n in FRIENDLY if sizes.hidden_size % n == 0 and units % n == 0), 1)
    score = abs(off) + damage(sizes) + _UNFRIENDLY[friendly]
    return Candidate(sizes, total, off, friendly, score)


def _damage(source: Sizes, sizes: Sizes, encoder: str) -> float:
    layers = log(source.num_hidden_layers / sizes.num_hidden_layers)
    units = log(source.intermediate_size / sizes.intermediate_size)
    heads = log(source.num_attention_heads / sizes.num_attention_heads)
    stream = log(source.hidden_size / sizes.hidden_size)
    return (
        _LAYERS * layers**2
        + _UNITS * units**2
        + _HEADS_AT_ONCE * heads
        + _HEADS * heads**2
        + STREAM_AT_ONCE[encoder] * stream
        + STREAM * stream**2
    )
