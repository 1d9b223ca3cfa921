"""What a shrink may change, and why not the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from dslm.errors import RecipeError, SizeError
from dslm.families import Family
from dslm.families.family import Config
from dslm.places import expanded
from dslm.sizes import WORDS, Sizes, check_legal, is_legal

SHRUNK = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHRINK_METHODS = ("reconstruct", "slice")

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?")
_TEXT_FILES = (
    *(".jsonl", ".json", ".ndjson", ".json-lines", ".txt", ".text"),
    *(".md", ".csv", ".tsv", ".parquet", ".gz", ".zst"),
)
SELF = "self"
WRITTEN = "text that the model wrote itself"
"""What a calibration text that a model writes itself is asked for as, and what it is called."""
_CALIBRATION: Mapping[str, type | tuple[type, ...]] = {
    "texts": list,
    "samples": int,
    "length": int,
    "refine": (int, type(None)),
}
FIXED: Mapping[str, tuple[str, str]] = {
    "head_dim": (
        "every rotary frequency depends on it",
        "shrink num_attention_heads and num_key_value_heads instead",
    ),
    "vocab_size": ("the tokenizer needs every row of the table", f"down shrinks {', '.join(SHRUNK)}"),
}
"""Sizes that stay: why, and what to do instead."""
_SHAPE = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_TIED_STREAM = (
    "the table is both written and read, and there is no gain before the output to make up for the change"
)
_OTHERWISE = "give the output its own table with --untie, or shrink the other sizes"


def check_shrink(source: Sizes, target: Sizes, family: Family, config: Config) -> None:
    """Refuse a target that a shrink cannot reach.

    Args:
        source: the sizes there are.
        target: the sizes to reach.
        family: the family's table.
        config: the source's config.

    Raises:
        SizeError: a dimension would grow or is none that shrinks, or the sizes are illegal.
    """
    for word in WORDS:
        before, after = getattr(source, word), getattr(target, word)
        if word in FIXED and after != before:
            why, hint = FIXED[word]
            raise SizeError(f"{word} cannot change from {before} to {after}: {why}", hint)
        if after > before:
            raise SizeError(
                f"{word} {after} is larger than the source's {before}", "down only shrinks; dslm up grows"
            )
    if target.tied and not source.tied:
        raise SizeError("two separate tables cannot become a tied one", "leave tie_word_embeddings as it is")
    if target.hidden_size != source.hidden_size and not stream_can_shrink(family, config, target.tied):
        raise SizeError(f"hidden_size cannot shrink: {_TIED_STREAM}", _OTHERWISE)
    try:
        check_legal(family, config, target)
    except SizeError as error:
        if min(getattr(target, word) for word in WORDS) > 0:  # what it offers may be the source, or larger
            error.hint = _legal_instead(source, target, family, config)
        raise


def _legal_instead(source: Sizes, target: Sizes, family: Family, config: Config) -> str:
    """The nearest legal sizes below the source's, as text: another value of one that was asked for, if that is enough.

    Else the width and both head counts together; where these can be had with what was asked for, no others.
    """
    asked = [word for word in _SHAPE if getattr(target, word) != getattr(source, word)]
    for word in asked:
        value = getattr(target, word)
        sides = range(value - 1, 0, -1), range(value + 1, getattr(source, word) + 1)
        tried = (
            (n for n in side if _reached(source, target.replace(**{word: n}), family, config))
            for side in sides
        )
        found = [str(n) for side in tried if (n := next(side, None)) is not None]
        if found:
            return f"nearest legal {word}: {' or '.join(found)}"

    def distance(sizes: Sizes) -> tuple[float, float]:
        off = {word: abs(log(getattr(sizes, word) / getattr(target, word))) for word in _SHAPE}
        return sum(off[word] for word in asked), sum(off.values())

    near: dict[tuple[int, ...], Sizes] = {}
    for sizes in sorted(_shapes_below(source, target, family, config), key=distance):
        near.setdefault(tuple(getattr(sizes, word) for word in asked), sizes)
    if near:
        first, *others = near.values()
        shown = [first, *others[:1]] if distance(first)[0] else [first]
        return f"nearest legal: {' or '.join(_in_words(sizes, source, target, family) for sizes in shown)}"
    if not stream_can_shrink(family, config, target.tied):
        return f"hidden_size, which goes with it, cannot shrink: {_TIED_STREAM}; {_OTHERWISE}"
    return "shrink intermediate_size or num_hidden_layers"


def _shapes_below(source: Sizes, target: Sizes, family: Family, config: Config) -> list[Sizes]:
    """The target with other head counts, and with the width that they have together."""
    found = []
    for heads, kv_heads in head_pairs(source):
        for width in {target.hidden_size, min(heads * source.head_dim, source.hidden_size)}:
            sizes = target.replace(hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads)
            if _reached(source, sizes, family, config):
                found.append(sizes)
    return found


def _reached(source: Sizes, sizes: Sizes, family: Family, config: Config) -> bool:
    """Whether sizes, none above the source's, are those of a smaller model that a shrink can make."""
    if sizes == source or not is_legal(family, config, sizes):
        return False
    if sizes.hidden_size != source.hidden_size and not stream_can_shrink(family, config, sizes.tied):
        return False
    groups = (one.num_attention_heads // one.num_key_value_heads for one in (sizes, source))
    before, after = (
        {name for name, _ in family.present(c)} for c in (config, sizes.into_config(family, config))
    )
    return next(groups) <= next(groups) and before ^ after <= {family.head}


def _in_words(sizes: Sizes, source: Sizes, target: Sizes, family: Family) -> str:
    """The head counts, with the width if it is not the source's; the second only if it has to be asked for."""
    width = "" if sizes.hidden_size == source.hidden_size else f"hidden_size {sizes.hidden_size} with "
    follows = "kv_heads" not in family.size_keys and target.num_attention_heads == target.num_key_value_heads
    unasked = sizes.num_key_value_heads != target.num_key_value_heads and not follows
    kv_heads = f" and num_key_value_heads {sizes.num_key_value_heads}" if unasked else ""
    return f"{width}num_attention_heads {sizes.num_attention_heads}{kv_heads}"


def stream_can_shrink(family: Family, config: Config, tied: bool) -> bool:
    """Whether the residual stream can become narrower.

    A tied table is read with the amplitude it is written with, which only the gain of the last norm makes up for.
    """
    layout = family.layout(config)
    on_stream = "hidden" in layout[family.embedding].spec.dimensions
    return not (tied and on_stream) or f"{family.final_norm}.weight" in layout


def check_groups(source: Sizes, target: Sizes, family: Family, config: Config) -> None:
    """Refuse more query heads for each key-value head than there are.

    Only the exact stage can make such groups, where key-value heads are copies; so this is asked after it.

    Args:
        source: the sizes that the exact stage left.
        target: the sizes to reach.
        family: the family's table.
        config: the config that the exact stage left.

    Raises:
        SizeError: query heads would have to change their key-value head.
    """
    before = source.num_attention_heads // source.num_key_value_heads
    after = target.num_attention_heads // target.num_key_value_heads
    if after <= before:
        return
    pairs = " or ".join(f"{h} with {k}" for h, k in _nearest_pairs(source, target, family, config))
    raise SizeError(
        f"num_attention_heads {target.num_attention_heads} with num_key_value_heads {target.num_key_value_heads} "
        f"are {after} query heads for each key-value head, and the source has {before}: a query head cannot change "
        "its key-value head",
        f"nearest legal pairs: {pairs or 'none with the other sizes as they are'}",
    )


def _nearest_pairs(
    source: Sizes, target: Sizes, family: Family, config: Config, count: int = 2
) -> list[tuple[int, int]]:
    """Legal counts of query and key-value heads, nearest to what was asked for first, whole groups before others."""
    group = source.num_attention_heads // source.num_key_value_heads
    weight = 0.5 if target.num_attention_heads == source.num_attention_heads else 1.0

    def distance(pair: tuple[int, int]) -> tuple[bool, float]:
        heads, kv_heads = pair
        off = weight * abs(log(heads / target.num_attention_heads))
        return heads != kv_heads * group, off + abs(log(kv_heads / target.num_key_value_heads))

    legal = [
        pair
        for pair in head_pairs(source)[1:]  # the first is the source's own
        if is_legal(family, config, target.replace(num_attention_heads=pair[0], num_key_value_heads=pair[1]))
    ]
    return sorted(legal, key=distance)[:count]


def head_pairs(source: Sizes) -> list[tuple[int, int]]:
    """Counts of query and key-value heads that a shrink can reach: fewer groups, fewer query heads in each."""
    group = source.num_attention_heads // source.num_key_value_heads
    return [(kv * g, kv) for kv in range(source.num_key_value_heads, 0, -1) for g in range(group, 0, -1)]


def check_methods(methods: Mapping[str, str], words: list[str]) -> None:
    """Refuse methods that do not exist or differ from each other.

    Raises:
        RecipeError: a dimension that changes has no method of shrinking, or not the same as the others.
    """
    for word in words:
        if methods.get(word) not in SHRINK_METHODS:
            raise RecipeError(
                f"unknown method {methods.get(word)!r} for {word}", f"known are {', '.join(SHRINK_METHODS)}"
            )
    if len({methods[word] for word in words}) > 1:
        raise RecipeError("the dimensions have different methods", "a shrink has one method for all of them")


def check_texts(texts: Sequence[str], samples: int) -> None:
    """Refuse calibration texts of which so many windows cannot be taken.

    Raises:
        RecipeError: no text is named, or one twice, or there are too few samples for each to give some.
    """
    if not texts:
        raise RecipeError("no calibration text is named", f"name some; {SELF}: the model writes it")
    if not all(text.strip() for text in texts):
        raise RecipeError("the name of a calibration text is empty", f"name a file, a data set, or {SELF}")
    named = [text if text == SELF or names_data_set(text) else expanded(text).resolve() for text in texts]
    if twice := [text for text, name in zip(texts, named, strict=True) if named.count(name) > 1]:
        raise RecipeError(f"the calibration text {twice[-1]} is named twice", "name it once")
    if samples < 2 * len(texts):
        each = "" if len(texts) == 1 else " of each text"
        raise RecipeError(
            f"samples is {samples}",
            f"at least {2 * len(texts)}: one window{each} to fit on and one to check",
        )


def check_calibration(calibration: Mapping[str, Any]) -> None:
    """Refuse a calibration that cannot be.

    Raises:
        RecipeError: there are too few samples for the texts, or they are too short; steps are negative.
    """
    check_texts(calibration["texts"], calibration["samples"])
    if calibration["refine"] is not None and calibration["refine"] < 0:
        raise RecipeError(f"refine is {calibration['refine']} steps", "give 0 or more")
    if calibration["length"] < 2:
        raise RecipeError(f"windows of {calibration['length']} tokens are too short", "512 is usual")


def names_data_set(text: str) -> bool:
    """Whether a text is a data set on the hub, ``owner/name`` or ``owner/name:configuration``, and not like a file."""
    path = expanded(text)
    return bool(_HUB_ID.fullmatch(text)) and path.suffix.lower() not in _TEXT_FILES and not path.exists()


def wrong_calibration(calibration: object) -> str:
    """What is wrong with the calibration of a plan file, in words; empty when nothing is."""
    if calibration is None:
        return ""
    if not isinstance(calibration, Mapping) or calibration.keys() != _CALIBRATION.keys():
        return f"calibration must have {', '.join(_CALIBRATION)}"
    for key, kind in _CALIBRATION.items():
        value = calibration[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{key} of calibration is {value!r}"
    texts = calibration["texts"]
    return "" if all(isinstance(text, str) for text in texts) else f"texts of calibration is {texts!r}"
