"""From what a user asks for to the sizes to reach: multipliers, another model's shape, a number of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import log2

from dslm.errors import SizeError
from dslm.families import Family
from dslm.families.family import Config
from dslm.sizes import FRIENDLY, Sizes, check_legal, count_parameters, is_legal

_WIDEST = 8
_LARGEST_FACTOR = 1000
_LARGEST_COUNT = 10**15
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?")
_FARTHEST = 0.5
_LONGEST = 30


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal shape near a target.

    Attributes:
        sizes: the shape.
        parameters: exactly how many it has.
        off: relative distance from the target, signed.
        friendly: largest of 256, 128 and 64 that divides both widths, or 1.
        score: what candidates are ranked by; smaller is better.
    """

    sizes: Sizes
    parameters: int
    off: float
    friendly: int
    score: float


def parse_multiplier(text: str) -> Fraction:
    """A multiplier such as ``2``, ``1.5`` or ``4/3``, exactly.

    Raises:
        SizeError: it is not a number, or is smaller than 1.
    """
    return parse_factor("multiplier", text, "up only grows; dslm down shrinks")


def parse_factor(word: str, text: str, below_one: str) -> Fraction:
    """A multiplier or divisor of at least 1, exactly.

    Args:
        word: what it is called.
        text: what was given.
        below_one: what to do where it is smaller than 1.

    Raises:
        SizeError: it is not a number, smaller than 1, or larger than any use.
    """
    try:
        value = parse_number(text)
    except (ValueError, ZeroDivisionError) as error:
        raise SizeError(f"{word} {text!r} is not a number", "give one such as 2, 1.5 or 4/3") from error
    if value <= 0:
        raise SizeError(f"{word} {text} is not positive", "give 1 or more")
    if value < 1:
        raise SizeError(f"{word} {text} is smaller than 1", below_one)
    if value > _LARGEST_FACTOR:
        raise SizeError(f"{word} {text} is too large", f"give at most {_LARGEST_FACTOR}")
    return value


def parse_number(text: str) -> Fraction:
    """A fraction of ordinary length; ``1e999999999`` would be a number of as many digits."""
    _, _, exponent = text.lower().partition("e")
    if len(text) > _LONGEST or len(exponent.lstrip("+-")) > 3:
        raise ValueError(text)
    return Fraction(text)


def scaled(family: Family, config: Config, hidden: Fraction, intermediate: Fraction) -> Sizes:
    """The source's sizes with the stream and the FFN multiplied.

    Head counts are multiplied with the stream and ``head_dim`` stays. Where a head count would not come out
    whole, the nearest legal pair of counts is taken.

    Raises:
        SizeError: a width would not be whole or legal; the hint names the nearest that are.
    """
    source = Sizes.from_config(family, config)
    if hidden == 1:
        target = source
    else:
        width = _whole("hidden_size", source.hidden_size, hidden)
        target = with_hidden(family, config, source, width)
    return target.replace(
        intermediate_size=_whole("intermediate_size", source.intermediate_size, intermediate)
    )


def _whole(word: str, size: int, multiplier: Fraction) -> int:
    product = size * multiplier
    if product.denominator == 1:
        return int(product)
    step = 64 if size % 64 == 0 else 1
    below, above = int(product) // step * step, (int(product) // step + 1) * step
    options = " or ".join(f"{n} (times {n / size:.6g})" for n in (below, above) if n > size)
    raise SizeError(f"{word} {size} times {multiplier} is not a whole number", f"nearest: {options}")


def with_hidden(family: Family, config: Config, source: Sizes, hidden_size: int) -> Sizes:
    """The source's sizes with another stream, and head counts that follow it as closely as is legal.

    Raises:
        SizeError: no head counts fit this stream.
    """
    ratio = hidden_size / source.hidden_size
    if family.head_dim == "derived":
        heads = hidden_size // source.head_dim
        target = source.replace(hidden_size=hidden_size, num_attention_heads=heads, num_key_value_heads=heads)
        check_legal(family, config, target)
        return target
    group = source.num_attention_heads // source.num_key_value_heads
    options = []
    for kv_heads in range(source.num_key_value_heads, int(source.num_key_value_heads * ratio) + 2):
        target = source.replace(
            hidden_size=hidden_size, num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads
        )
        if is_legal(family, config, target):
            options.append((abs(kv_heads / source.num_key_value_heads / ratio - 1), target))
    if not options:
        near = sorted(range(source.hidden_size, 2 * hidden_size), key=lambda n: abs(n - hidden_size))
        legal = islice((n for n in near if _has_heads(family, config, source, n)), 2)
        raise SizeError(
            f"no head counts are legal for {family.name} with hidden_size {hidden_size}",
            f"nearest legal hidden_size: {' or '.join(map(str, legal))}",
        )
    return min(options, key=lambda option: (option[0], -option[1].num_attention_heads))[1]


def _has_heads(family: Family, config: Config, source: Sizes, hidden_size: int) -> bool:
    return hidden_size >= source.hidden_size and is_legal(
        family, config, source.replace(hidden_size=hidden_size)
    )


def like(source: Sizes, other: Sizes) -> Sizes:
    """The source's sizes with the widths, head counts and depth of another model.

    Raises:
        SizeError: the other model differs in something that growing does not change.
    """
    if source.head_dim != other.head_dim:
        raise SizeError(
            f"that model has head_dim {other.head_dim}, and the source {source.head_dim}: head_dim cannot change, "
            "since every rotary frequency depends on it",
            "give the other sizes by name instead",
        )
    return source.replace(
        hidden_size=other.hidden_size,
        intermediate_size=other.intermediate_size,
        num_attention_heads=other.num_attention_heads,
        num_key_value_heads=other.num_key_value_heads,
        num_hidden_layers=other.num_hidden_layers,
    )


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str, what: str = "parameters") -> int:
    """A number of something such as ``1B``, ``360M``, ``134515008`` or ``134,515,008``.

    Args:
        text: what to read; commas stand before groups of three digits.
        what: parameters or tokens.

    Raises:
        SizeError: it is not one.
    """
    example = "give one such as 360M or 1.5B" if what == "parameters" else "give one such as 100k or 5M"
    unit = _UNITS.get(text[-1:].upper(), 1)
    number = text[:-1] if unit > 1 else text
    try:
        if "," in number and not _GROUPED.fullmatch(number):
            raise ValueError(text)
        value = parse_number(number.replace("_", "").replace(",", "")) * unit
    except (ValueError, ZeroDivisionError) as error:
        raise SizeError(f"{text!r} is not a number of {what}", example) from error
    if value < 1:
        raise SizeError(f"{text!r} is not a positive number of {what}", example)
    if value > _LARGEST_COUNT:
        raise SizeError(f"{text!r} is too many {what}", example)
    return int(value)


def candidates(
    family: Family,
    config: Config,
    parameters: int,
    *,
    count: int = 8,
    untie: bool = False,
    method: str = "hypercloning",
) -> list[Candidate]:
    """Legal shapes near a number of parameters, best first.

    For every width of the stream the FFN that comes closest is found, since the count is linear in it. Shapes are
    ranked by distance from the target, by how far they change the model's proportions, and by whether both
    widths are multiples of 256, 128 or 64, which hardware and block quantisation like.

    Args:
        family: the family's table.
        config: the source's config.
        parameters: how many the result should have.
        count: how many candidates to return.
        untie: the result has two tables.
        method: how it will be grown; some shapes have no exact growth (a tied table under LayerNorm).

    Raises:
        SizeError: the target is smaller than the source, or out of reach.
    """
    source = Sizes.from_config(family, config)
    now = count_parameters(family, config)["total"]
    if parameters < now:
        raise SizeError(
            f"{parameters:,} parameters is smaller than the source's {now:,}",
            "up only grows; dslm down shrinks",
        )
    if untie:
        source = source.replace(tied=False)
    found: dict[Sizes, Candidate] = {}
    for hidden_size in _widths(source, family):
        if not _is_growable(family, config, source, hidden_size, method):
            continue
        for sizes in _shapes(family, config, source, hidden_size, parameters):
            found[sizes] = _candidate(family, config, source, sizes, parameters)
    found.pop(source, None)
    near = [c for c in found.values() if abs(c.off) <= _FARTHEST]
    if not near:
        raise SizeError(
            f"no shape of {family.name} near {parameters:,} parameters keeps its depth and is at most "
            f"{_WIDEST} times as wide",
            "choose another number, or give the sizes by name",
        )
    return sorted(near, key=lambda c: (c.score, c.parameters))[:count]


def _is_growable(family: Family, config: Config, source: Sizes, hidden_size: int, method: str) -> bool:
    """Whether an exact growth of the stream to this width exists; the reasons stand in `dslm.grow.maps`."""
    if hidden_size == source.hidden_size:
        return True
    if method == "net2net":
        return False
    layout = family.layout(config)
    tied = source.tied and "hidden" in layout[family.embedding].spec.dimensions
    if tied and f"{family.final_norm}.weight" not in layout:
        return False
    whole = hidden_size % source.hidden_size == 0 and method == "hypercloning"
    return family.norm == "rms" or whole or (family.holds(family.norm_on_read, config) and not tied)


def _widths(source: Sizes, family: Family) -> list[int]:
    """Widths of the stream to try: the source's, and multiples of a step up to eight times it."""
    step = source.head_dim if family.head_dim == "derived" else 64
    if source.hidden_size < 8 * step and family.head_dim != "derived":
        step = max(1, source.hidden_size // 8)
    first = source.hidden_size // step + 1
    return [source.hidden_size, *range(first * step, source.hidden_size * _WIDEST + 1, step)]


def _shapes(
    family: Family, config: Config, source: Sizes, hidden_size: int, parameters: int
) -> Iterable[Sizes]:
    """Shapes with this stream whose FFN brings the count close to the target, at several roundings."""
    try:
        base = (
            source if hidden_size == source.hidden_size else with_hidden(family, config, source, hidden_size)
        )
    except SizeError:
        return
    smallest = base.replace(intermediate_size=1)
    first = _count(family, config, smallest)
    per_unit = _count(family, config, base.replace(intermediate_size=2)) - first
    exact = 1 + (parameters - first) / per_unit
    fine = 16 if source.intermediate_size % 16 == 0 else 1
    for step in (*FRIENDLY, fine):
        size = round(exact / step) * step
        if source.intermediate_size <= size <= source.intermediate_size * _WIDEST:
            yield base.replace(intermediate_size=size)
    if exact >= source.intermediate_size / 2:
        yield base


def _candidate(family: Family, config: Config, source: Sizes, sizes: Sizes, parameters: int) -> Candidate:
    total = _count(family, config, sizes)
    off = total / parameters - 1
    friendly = next(
        (n for n in FRIENDLY if sizes.hidden_size % n == 0 and sizes.intermediate_size % n == 0), 1
    )
    stream = sizes.hidden_size / source.hidden_size
    stretch = abs(log2(sizes.intermediate_size / source.intermediate_size / stream))
    stretch += abs(log2(sizes.num_attention_heads / source.num_attention_heads / stream))
    penalty = {256: 0.0, 128: 0.002, 64: 0.004, 1: 0.02}[friendly]
    return Candidate(sizes, total, off, friendly, score=abs(off) + 0.03 * stretch + penalty)


def _count(family: Family, config: Config, sizes: Sizes) -> int:
    return count_parameters(family, sizes.into_config(family, config))["total"]
