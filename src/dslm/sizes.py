"""Sizes: the dimensions of one model, how they stand in its config, which are legal, and what they cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import prod
from typing import Any

from dslm.errors import SizeError
from dslm.families import Family
from dslm.families.family import PARTS, Config

_KEYS = {
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
}
FRIENDLY = (256, 128, 64)
_TRIED = 1000


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions of one model, under their Hugging Face config words, whatever its family calls them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @classmethod
    def from_config(cls, family: Family, config: Config) -> Sizes:
        """Read the sizes out of a config.

        Raises:
            UnsupportedFamilyError: a size is missing or not a positive whole number.
        """
        found = family.dimensions(config)
        return cls(
            **{word: found[dimension] for word, dimension in _KEYS.items()}, tied=family.is_tied(config)
        )

    def into_config(self, family: Family, config: Config) -> dict[str, Any]:
        """``config`` with only what these sizes change changed; every other key and the order of keys stay.

        A key that is absent or null stays so where the model derives the same value from the others.
        """
        edited = dict(config)
        before = Sizes.from_config(family, config)
        for word, dimension in _KEYS.items():
            derivable = dimension in ("kv_heads", "head_dim")
            changed = getattr(self, word) != getattr(before, word)
            if changed and not derivable and dimension in family.size_keys:
                edited[family.size_keys[dimension]] = getattr(self, word)
        if self.tied != before.tied:
            edited["tie_word_embeddings"] = self.tied
        if "embedding" in family.size_keys:
            _follow_hidden(family, config, edited)
        for dimension, word in (("kv_heads", "num_key_value_heads"), ("head_dim", "head_dim")):
            key = family.size_keys.get(dimension)
            if key is not None and family.resolve(edited)[key] != getattr(self, word):
                edited[key] = getattr(self, word)
        return edited

    def replace(self, **changes: int | bool) -> Sizes:
        """A copy with some sizes changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_named(self, family: Family, named: Mapping[str, int]) -> Sizes:
        """A copy with the sizes that were asked for by name.

        Where a family has as many key-value heads as query heads, one number says both.
        """
        heads = ("num_attention_heads", "num_key_value_heads")
        given = {word: named[word] for word in heads if word in named}
        if "kv_heads" not in family.size_keys and len(given) == 1:
            (count,) = given.values()
            named = {**named, **dict.fromkeys(heads, count)}
        return self.replace(**named)

    def as_dict(self) -> dict[str, int | bool]:
        """The sizes by name, in a fixed order."""
        return asdict(self)


WORDS = tuple(field.name for field in fields(Sizes) if field.name != "tied")


def _follow_hidden(family: Family, config: Config, edited: dict[str, Any]) -> None:
    """Keep a table that is as wide as the stream as wide as the stream."""
    key = family.size_keys["embedding"]
    before = family.dimensions(config)
    if before["embedding"] == before["hidden"] and config.get(key) is not None:
        edited[key] = edited[family.size_keys["hidden"]]


Violation = tuple[str, Callable[[], str]]
"""What is wrong with sizes, and how to find out what would be right."""


def check_legal(family: Family, config: Config, sizes: Sizes) -> None:
    """Refuse sizes that no model of the family can have.

    Args:
        family: the family's table.
        config: the config whose switches apply.
        sizes: the sizes to judge.

    Raises:
        SizeError: a rule is broken; the message names the rule and the hint the nearest legal values.
    """
    for message, hint in _violations(family, config, sizes):
        raise SizeError(message, hint())


def is_legal(family: Family, config: Config, sizes: Sizes) -> bool:
    """Whether `check_legal` accepts the sizes."""
    return next(_violations(family, config, sizes), None) is None


def _violations(family: Family, config: Config, sizes: Sizes) -> Iterator[Violation]:
    """Every rule that the sizes break; later rules may assume the earlier ones."""
    for word in WORDS:
        if getattr(sizes, word) < 1:
            yield (
                f"{word} {getattr(sizes, word)} is impossible",
                lambda: "sizes are positive whole numbers",
            )
            return
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    if "kv_heads" not in family.size_keys and heads != kv_heads:
        yield (
            f"{family.name} has as many key-value heads as query heads",
            lambda: f"ask for num_key_value_heads {heads}",
        )
    if heads % kv_heads:
        yield (
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            partial(_nearest, family, config, sizes, "num_attention_heads", kv_heads),
        )
    if family.head_dim == "derived" and sizes.hidden_size != heads * sizes.head_dim:
        yield (
            f"{family.name} derives head_dim from hidden_size / num_attention_heads, which must stay "
            f"{sizes.head_dim}: {sizes.hidden_size} / {heads} is not",
            partial(_nearest_pairs, family, sizes),
        )
    for rule in family.rules:
        yield from _rule_violations(rule, family, config, sizes)


_DIVIDES = re.compile(r"(\w+) % (\w+) == 0")
_PRODUCT = re.compile(r"(\w+) == (\w+) \* (\w+)")


def _rule_violations(rule: str, family: Family, config: Config, sizes: Sizes) -> Iterator[Violation]:
    text, _, condition = rule.partition(" if ")
    if not family.holds(condition, config):
        return
    word = {dimension: word for word, dimension in _KEYS.items()}
    value = {dimension: getattr(sizes, word) for word, dimension in _KEYS.items()}
    if match := _DIVIDES.fullmatch(text):
        left, right = match.groups()
        if value[left] % value[right]:
            yield (
                f"{family.name} needs {word[left]} to be a multiple of {word[right]}, "
                f"and {value[left]} is not a multiple of {value[right]}",
                partial(_nearest, family, config, sizes, word[left], value[right]),
            )
    elif match := _PRODUCT.fullmatch(text):
        left, first, second = match.groups()
        if value[left] != value[first] * value[second]:
            yield (
                f"this {family.name} needs {word[left]} = {word[first]} x {word[second]}, "
                f"and {value[left]} is not {value[first]} x {value[second]}",
                partial(_nearest_pairs, family, sizes),
            )
    else:
        raise AssertionError(f"rule {rule!r} of {family.name} is not in the grammar")


def _nearest(family: Family, config: Config, sizes: Sizes, word: str, step: int) -> str:
    """The nearest legal values of one size below and above, as text; multiples of ``step`` are tried."""
    first = getattr(sizes, word) // step
    sides = range(first, max(0, first - _TRIED), -1), range(first + 1, first + _TRIED)
    found = []
    for side in sides:
        legal = (n * step for n in side if is_legal(family, config, sizes.replace(**{word: n * step})))
        found.append(next(legal, None))
    values = " or ".join(str(n) for n in found if n is not None)
    if not values and word == "num_attention_heads":
        return _nearest(family, config, sizes, "num_key_value_heads", 1)
    return f"nearest legal {word}: {values or 'none with the other sizes as they are'}"


def _nearest_pairs(family: Family, sizes: Sizes) -> str:
    """The nearest legal widths of the stream with the head counts that go with them, as text."""
    group = sizes.num_key_value_heads if "kv_heads" in family.size_keys else 1
    below = max(1, sizes.hidden_size // (sizes.head_dim * group))
    pairs = [(n * group * sizes.head_dim, n * group) for n in (below, below + 1)]
    texts = [f"hidden_size {hidden} with num_attention_heads {heads}" for hidden, heads in pairs]
    return f"change both together: {' or '.join(texts)}"


def count_parameters(family: Family, config: Config) -> dict[str, int]:
    """Exact parameters by part, and ``total``; a tied table counts once."""
    counts = dict.fromkeys(PARTS, 0)
    sizes = family.dimensions(config)
    for template, spec in family.present(config):
        repeats = sizes["layers"] if "{layer}" in template else 1
        counts[family.parts[template]] += repeats * prod(spec.shape(sizes))
    return {**counts, "total": sum(counts.values())}


def kv_cache_bytes_per_token(sizes: Sizes, itemsize: int) -> int:
    """Bytes that one more token of context adds to the key-value cache, before any sliding window is full.

    Args:
        sizes: the model's sizes.
        itemsize: bytes of one cached number.
    """
    return 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * itemsize


def differing(source: Sizes, target: Sizes) -> Mapping[str, tuple[Any, Any]]:
    """What changes between two sizes: name -> (before, after)."""
    before, after = source.as_dict(), target.as_dict()
    return {word: (before[word], after[word]) for word in before if before[word] != after[word]}
