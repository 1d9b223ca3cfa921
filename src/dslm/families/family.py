"""The reader of the family tables: what a model of one family is made of, from its config alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from dslm.errors import UnsupportedFamilyError
from dslm.families.axes import TensorSpec, parse_line

Config = Mapping[str, Any]
PARTS = ("embedding", "attention", "ffn", "norm", "head")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of one model.

    Attributes:
        name: as it stands on disk.
        spec: its axes.
        shape: in elements.
        part: one of `PARTS`.
        layer: index of its block, or None outside the blocks.
    """

    name: str
    spec: TensorSpec
    shape: tuple[int, ...]
    part: str
    layer: int | None

    def in_layer(self, layer: int) -> str:
        """Name of the same tensor of another block; outside the blocks, its own."""
        return self.name if self.layer is None else self.name.replace(f".{self.layer}.", f".{layer}.", 1)


@dataclass(frozen=True, slots=True)
class Family:
    """One family table.

    Attributes:
        name: the ``model_type`` of its configs.
        title: the models it covers, for people.
        architecture: the transformers class that is the reference for every name and shape.
        source: URL of the paper that describes it.
        norm: ``rms`` or ``layer``.
        norm_on_read: condition under which every reader of the residual stream sits behind a norm.
        stream_kept: condition under which a block that adds nothing leaves the residual stream as it is.
        gain_offset: what the model adds to a stored norm gain (1 for Gemma).
        embedding_multiplier: ``none``, or ``sqrt(hidden)`` where the model scales what it looks up.
        head_dim: ``declared`` (a config field), ``accepted`` (obeyed though undeclared), ``derived``
            (always ``hidden_size / num_attention_heads``).
        blocks: where the norms of a block sit: ``pre``, ``post``, ``sandwich`` or ``parallel``.
        embedding: name of the input table.
        head: name of the output table where it is not tied.
        final_norm: name of the last norm without ``.weight``; empty where it has no parameters.
        branch_norms: name templates of the norms between a writer and the stream.
        rules: size rules of the config class, such as ``hidden % heads == 0``.
        ignored: patterns of tensors some old files carry and no model reads.
        size_keys: dimension -> config key.
        defaults: value of a config key that is absent.
        known_keys: config keys that may appear.
        per_layer: config keys that hold one entry per block.
        only: config keys that are supported with these values alone (null always is).
        tensors: name template -> alternatives, of which at most one condition holds.
        parts: name template -> part.
    """

    name: str
    title: str
    architecture: str
    source: str
    norm: str
    norm_on_read: str
    stream_kept: str
    gain_offset: int
    embedding_multiplier: str
    head_dim: str
    blocks: str
    embedding: str
    head: str
    final_norm: str
    branch_norms: tuple[str, ...]
    rules: tuple[str, ...]
    ignored: tuple[str, ...]
    size_keys: Mapping[str, str]
    defaults: Config
    known_keys: frozenset[str]
    per_layer: tuple[str, ...]
    only: Mapping[str, list[Any]]
    tensors: Mapping[str, tuple[TensorSpec, ...]]
    parts: Mapping[str, str]

    @property
    def rotates(self) -> bool:
        """Whether the residual stream may be carried in any orthonormal basis: RMSNorms, all in front of readers."""
        return self.norm == "rms" and self.blocks == "pre"

    def keeps_stream(self, config: Config) -> bool:
        """Whether a block that adds nothing to the stream leaves it as it is: no norm runs over the stream itself."""
        return self.holds(self.stream_kept, config)

    def writers_add(self, config: Config) -> bool:
        """Whether a block's output is its input plus what its writers give: no norm stands between, or behind them."""
        return not self.branch_norms and self.keeps_stream(config)

    def is_final_norm(self, name: str) -> bool:
        """Whether a tensor on disk belongs to the norm before the head."""
        return bool(self.final_norm) and name.startswith(f"{self.final_norm}.")

    def is_branch_norm(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to a norm between a writer and the stream."""
        if tensor.layer is None:
            return False
        return any(
            tensor.name.startswith(norm.replace("{layer}", str(tensor.layer)) + ".")
            for norm in self.branch_norms
        )

    def resolve(self, config: Config) -> dict[str, Any]:
        """``config`` with absent keys at the family's defaults and empty sizes derived as the model derives them.

        ``rope_type`` is brought up from wherever the config's version keeps it.
        """
        resolved = {**self.defaults, **config}
        keys = self.size_keys
        hidden, heads = resolved[keys["hidden"]], resolved[keys["heads"]]
        if "kv_heads" in keys and resolved.get(keys["kv_heads"]) is None:
            resolved[keys["kv_heads"]] = heads
        if "head_dim" in keys and resolved.get(keys["head_dim"]) is None:
            resolved[keys["head_dim"]] = hidden // heads if _is_size(hidden) and _is_size(heads) else None
        if "embedding" in keys and resolved.get(keys["embedding"]) is None:
            resolved[keys["embedding"]] = hidden
        rope = resolved.get("rope_parameters") or resolved.get("rope_scaling")
        rope = rope if isinstance(rope, dict) else {}
        return resolved | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}

    def dimensions(self, config: Config) -> dict[str, int]:
        """Size of every axis word for a model with this config.

        Raises:
            UnsupportedFamilyError: a size in the config is not a positive integer.
        """
        resolved = self.resolve(config)
        found = {}
        for dimension, key in self.size_keys.items():
            value = resolved[key]
            if not _is_size(value):
                raise UnsupportedFamilyError(
                    f"config key {key!r} is {value!r}", "it must be a positive whole number"
                )
            found[dimension] = value
        found.setdefault("kv_heads", found["heads"])
        found.setdefault("head_dim", found["hidden"] // found["heads"])
        return found

    def holds(self, condition: str, config: Config) -> bool:
        """Whether a condition of the table holds for ``config`` (an empty one always does)."""
        resolved = self.resolve(config)
        return all(
            _clause_holds(clause.strip(), resolved) for clause in condition.split(" and ") if clause.strip()
        )

    def layout(self, config: Config) -> dict[str, Tensor]:
        """Every tensor a model with this config has on disk, in a fixed order: name -> `Tensor`."""
        sizes = self.dimensions(config)
        layers = sizes["layers"]
        found: dict[str, Tensor] = {}
        present = self.present(config)
        in_blocks = {t: s for t, s in present if "{layer}" in t}
        outside = {t: s for t, s in present if "{layer}" not in t}
        after = {t for t in outside if self.parts[t] in ("norm", "head")}
        for template in (t for t in outside if t not in after):
            found[template] = self._tensor(template, outside[template], None, sizes)
        for layer in range(layers):
            for template, spec in in_blocks.items():
                tensor = self._tensor(template, spec, layer, sizes)
                found[tensor.name] = tensor
        for template in (t for t in outside if t in after):
            found[template] = self._tensor(template, outside[template], None, sizes)
        return found

    def present(self, config: Config) -> list[tuple[str, TensorSpec]]:
        """Name templates of the tensors that a model with this config has, each with its axes."""
        return [
            (template, spec)
            for template, alternatives in self.tensors.items()
            for spec in alternatives
            if self.holds(spec.condition, config)
        ]

    def _tensor(self, template: str, spec: TensorSpec, layer: int | None, sizes: Mapping[str, int]) -> Tensor:
        name = template if layer is None else template.replace("{layer}", str(layer))
        return Tensor(name=name, spec=spec, shape=spec.shape(sizes), part=self.parts[template], layer=layer)

    def is_tied(self, config: Config) -> bool:
        """Whether input and output table are one tensor."""
        return bool(self.resolve(config)["tie_word_embeddings"])

    def is_ignored(self, tensor_name: str) -> bool:
        """Whether a tensor on disk is a left-over that no model of the family reads."""
        return any(fnmatchcase(tensor_name, pattern) for pattern in self.ignored)

    def check_config(self, config: Config) -> None:
        """Refuse a config that the table does not fully describe.

        Raises:
            UnsupportedFamilyError: an unknown key, an unsupported value, or a per-layer list of the wrong length.
        """
        if config.get("quantization_config") is not None:
            raise UnsupportedFamilyError(
                "the checkpoint is quantised (its config has quantization_config)",
                "resize the unquantised original and quantise the result",
            )
        architectures = config.get("architectures")
        listed = architectures if isinstance(architectures, list) else [architectures]
        if architectures and self.architecture not in listed:
            raise UnsupportedFamilyError(
                f"architectures names {listed[0]!r} and not {self.architecture!r}",
                "only causal language models are resized",
            )
        unknown = sorted(k for k, v in config.items() if k not in self.known_keys and v is not None)
        if unknown:
            raise UnsupportedFamilyError(
                f"the {self.name} table does not know config key {', '.join(map(repr, unknown))}",
                "a key that may change the function is never guessed; add it to the family's table if it is harmless",
            )
        for key, allowed in self.only.items():
            value = config.get(key)
            if value is not None and value not in allowed:
                raise UnsupportedFamilyError(
                    f"config key {key!r} is {value!r}", f"supported: {', '.join(map(repr, allowed))}"
                )
        layers = self.dimensions(config)["layers"]
        for key in self.per_layer:
            value = config.get(key)
            if isinstance(value, list) and len(value) != layers:
                raise UnsupportedFamilyError(
                    f"config key {key!r} has {len(value)} entries for {layers} layers",
                    "one per layer is expected",
                )


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


_COMPARISON = re.compile(r"(\w+) (==|!=) (\w+)")


def _clause_holds(clause: str, resolved: Config) -> bool:
    match = _COMPARISON.fullmatch(clause)
    if match:
        left, operator, right = match.groups()
        return (resolved[left] == resolved.get(right, right)) is (operator == "==")
    if clause.startswith("not "):
        return not resolved[clause.removeprefix("not ")]
    return bool(resolved[clause])


def family_names() -> list[str]:
    """Names of all families, sorted: the ``model_type`` values that can be resized."""
    folder = resources.files("dslm.families")
    stems = [f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")]
    return sorted(stem for stem in stems if stem != "common")


@cache
def load_family(name: str) -> Family:
    """Read one family table.

    Raises:
        UnsupportedFamilyError: there is no such table; the message lists those there are.
    """
    if name not in family_names():
        raise UnsupportedFamilyError(
            f"model family {name!r} is not supported", f"supported: {', '.join(family_names())}"
        )
    table, common = _read(name), _read("common")
    keys = table["config"]
    listed = [*common["inert"], *common["kept"], *keys.get("inert", ()), *keys.get("kept", ())]
    per_layer = tuple(keys.get("per_layer", ()))
    known = {
        *listed,
        *per_layer,
        *keys.get("only", ()),
        *table["sizes"].values(),
        *table["defaults"],
        "quantization_config",
    }
    lines = {
        template: (part, (line,) if isinstance(line, str) else tuple(line))
        for part, group in table["tensors"].items()
        for template, line in group.items()
    }
    return Family(
        name=name,
        title=table["title"],
        architecture=table["architecture"],
        source=table["source"],
        norm=table["norm"],
        norm_on_read=table.get("norm_on_read", ""),
        stream_kept=table.get("stream_kept", ""),
        gain_offset=table.get("gain_offset", 0),
        embedding_multiplier=table.get("embedding_multiplier", "none"),
        head_dim=table["head_dim"],
        blocks=table["blocks"],
        embedding=table["embedding"],
        head=table["head"],
        final_norm=table.get("final_norm", ""),
        branch_norms=tuple(table.get("branch_norms", ())),
        rules=tuple(table.get("rules", ())),
        ignored=tuple(table["ignored"]),
        size_keys=table["sizes"],
        defaults=table["defaults"],
        known_keys=frozenset(known),
        per_layer=per_layer,
        only=keys.get("only", {}),
        tensors={
            template: tuple(map(parse_line, alternatives)) for template, (_, alternatives) in lines.items()
        },
        parts={template: part for template, (part, _) in lines.items()},
    )


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files("dslm.families") / f"{name}.toml").read_text(encoding="utf-8"))


def family_of(config: Config) -> Family:
    """The family of a config, checked key by key.

    Raises:
        UnsupportedFamilyError: the family, or something in the config, is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedFamilyError("config.json has no model_type", "is this a transformers checkpoint?")
    family = load_family(model_type)
    family.check_config(config)
    return family
