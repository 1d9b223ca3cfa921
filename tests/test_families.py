"""The conformance suite: what every family's table says is what the stock transformers class does."""

from __future__ import annotations

import copy
import dataclasses
import re
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import pico
from dslm.checkpoint.oracle import check_against_oracle, expected_shapes
from dslm.errors import CheckpointError, SizeError, UnsupportedFamilyError
from dslm.families import family_names, family_of, load_family
from dslm.families.axes import Role, parse_line
from dslm.families.family import PARTS
from dslm.sizes import Sizes, check_legal, count_parameters, differing, kv_cache_bytes_per_token

FAMILIES = family_names()
every_family = pytest.mark.parametrize("name", FAMILIES)
every_variant = pytest.mark.parametrize(("name", "variant"), pico.CASES, ids=pico.IDS)


def plain_config(name: str, variant: str) -> dict:
    """A config with the variant's keys alone, as an old checkpoint has it."""
    return {"model_type": name, **copy.deepcopy(pico.PICO[name][variant])}


def shapes_of(name: str, config: dict) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in load_family(name).layout(config).values()}


def test_every_family_has_tiny_models_with_and_without_its_switches():
    assert sorted(pico.PICO) == FAMILIES
    for name in FAMILIES:
        family = load_family(name)
        for template, alternatives in family.tensors.items():
            conditions = [spec.condition for spec in alternatives if spec.condition]
            for condition in conditions:
                held = {family.holds(condition, plain_config(name, v)) for v in pico.PICO[name]}
                assert held == {True, False}, f"{name}: {template} is never seen both ways of {condition!r}"


# ---------------------------------------------------------------- names, shapes, counts


@every_variant
def test_layout_is_what_transformers_saves(name, variant, tmp_path):
    model = pico.make_model(name, variant)
    pico.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    config = pico.read_config(tmp_path)
    assert shapes_of(name, config) == on_disk == expected_shapes(config)
    counts = count_parameters(load_family(name), config)
    assert counts["total"] == model.num_parameters() == sum(map(prod, on_disk.values()))
    assert counts["total"] == sum(counts[part] for part in PARTS)


@every_variant
def test_parts_are_counted_where_they_belong(name, variant):
    family, config = load_family(name), plain_config(name, variant)
    model = pico.make_model(name, variant)
    counts, sizes = count_parameters(family, config), Sizes.from_config(family, config)
    ffn = [p for n, p in model.named_parameters() if re.search(r"\.mlp\.|\.fc[12]\.", n)]
    norms = [p for n, p in model.named_parameters() if re.search(r"norm", n)]
    assert counts["ffn"] == sum(p.numel() for p in ffn)
    assert counts["norm"] == sum(p.numel() for p in norms)
    assert (counts["head"] == 0) == (sizes.tied and name != "phi"), "phi's output has a bias of its own"


@every_family
def test_the_default_model_of_the_class_is_the_default_of_the_table(name):
    assert shapes_of(name, {"model_type": name}) == expected_shapes({"model_type": name})


@every_family
def test_absent_keys_resolve_as_the_config_class_resolves_them(name):
    family = load_family(name)
    config_class = type(AutoConfig.for_model(name))
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    assert {key: declared.get(key) for key in family.defaults} == dict(family.defaults)
    resolved, parsed = family.resolve({"model_type": name}), AutoConfig.for_model(name)
    for key in family.size_keys.values():
        if key != "head_dim" or hasattr(parsed, "head_dim"):
            assert resolved[key] == getattr(parsed, key), key


@every_family
def test_a_null_size_is_derived_as_the_config_class_derives_it(name):
    family = load_family(name)
    config = plain_config(name, next(iter(pico.PICO[name])))
    for key in ("num_key_value_heads", "head_dim", "word_embed_proj_dim"):
        declared = {f.name: f for f in dataclasses.fields(type(AutoConfig.for_model(name)))}.get(key)
        if key not in family.size_keys.values() or declared is None or "None" not in str(declared.type):
            continue
        asked = config | {key: None}
        assert shapes_of(name, asked) == expected_shapes(asked), key


@every_family
def test_layout_has_every_tensor_once_and_in_the_order_of_the_model(name):
    family = load_family(name)
    for variant in pico.PICO[name]:
        layout = family.layout(plain_config(name, variant))
        layers = [t.layer for t in layout.values()]
        blocks = [layer for layer in layers if layer is not None]
        assert blocks == sorted(blocks)
        assert set(blocks) == set(range(3))
        templates = [template for template, _ in family.present(plain_config(name, variant))]
        assert len(templates) == len(set(templates)), "two alternatives of a line hold at once"
        assert family.embedding in layout
        assert (family.head in layout) == (not family.is_tied(plain_config(name, variant)))


# ---------------------------------------------------------------- random sizes


def shape_switches(name: str, variant: str) -> dict:
    """A variant's config without its per-layer lists, so that the number of layers is free."""
    config = plain_config(name, variant)
    return {key: value for key, value in config.items() if key not in load_family(name).per_layer}


@st.composite
def some_sizes(draw, name: str, *, grouped: bool):
    """Random sizes of a family; legal in its own extra rules only when ``grouped``."""
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16, 24]))
    heads = kv_heads * draw(st.integers(1, 3)) if grouped else draw(st.integers(1, 9))
    derived = name in ("opt", "gpt_neox")
    if grouped:
        kv_heads = heads if derived else kv_heads
        hidden = heads * (head_dim if derived else draw(st.sampled_from([4, 8, 12])))
    else:
        hidden = draw(st.one_of(st.integers(heads, 40), st.just(heads * head_dim)))
        kv_heads = draw(st.sampled_from([kv_heads, heads]))
    return Sizes(
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(8, 120)),
        tied=draw(st.booleans()),
    )


@every_family
@given(data=st.data())
def test_random_legal_sizes_are_what_transformers_builds_and_runs(name, data):
    family = load_family(name)
    config = shape_switches(name, data.draw(st.sampled_from(sorted(pico.PICO[name]))))
    if config.get("qk_layernorm") or config.get("rope_parameters"):
        config = {k: v for k, v in config.items() if k not in ("qk_layernorm", "rope_parameters")}
    sizes = data.draw(some_sizes(name, grouped=True))
    check_legal(family, config, sizes)
    edited = sizes.into_config(family, config)
    family.check_config(edited)
    assert Sizes.from_config(family, edited) == sizes
    expected = expected_shapes(edited)
    assert shapes_of(name, edited) == expected
    assert count_parameters(family, edited)["total"] == sum(map(prod, expected.values()))
    values = {key: value for key, value in edited.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values)).eval()
    assert model.num_parameters() == sum(map(prod, expected.values()))
    with torch.no_grad():
        assert model(torch.tensor([[3, 5, 4]])).logits.shape == (1, 3, sizes.vocab_size)


def _class_builds(config: dict) -> bool:
    try:
        expected_shapes(config)
    except SizeError:
        return False
    return True


def _breaks_our_rules(name: str, config: dict, sizes: Sizes) -> bool:
    """What no class checks when it is built, though its forward pass needs it."""
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    all_of_hidden = heads * sizes.head_dim == sizes.hidden_size
    if name in ("opt", "gpt_neox"):
        return heads != kv_heads or not all_of_hidden
    return heads % kv_heads != 0 or (bool(config.get("qk_layernorm")) and not all_of_hidden)


@every_family
@given(data=st.data())
def test_legality_is_the_config_class_and_our_rules(name, data):
    family = load_family(name)
    config = shape_switches(name, data.draw(st.sampled_from(sorted(pico.PICO[name]))))
    sizes = data.draw(some_sizes(name, grouped=data.draw(st.booleans())))
    if "rope_parameters" in config:
        sizes = sizes.replace(head_dim=Sizes.from_config(family, config).head_dim)  # its factors are per pair
    possible = not _breaks_our_rules(name, config, sizes)
    legal = possible and _class_builds(sizes.into_config(family, config))
    if legal:
        check_legal(family, config, sizes)
    else:
        with pytest.raises(SizeError) as caught:
            check_legal(family, config, sizes)
        assert caught.value.hint


ILLEGAL = [
    # family, variant, what is asked for, the word that the message must name
    ("llama", "gqa-tied", {"num_attention_heads": 8, "num_key_value_heads": 3}, "num_attention_heads"),
    ("llama", "gqa-tied", {"hidden_size": 34}, "hidden_size"),
    ("llama", "mha", {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
    ("llama", "gqa-tied", {"hidden_size": 3, "num_attention_heads": 4}, "hidden_size"),
    ("gemma2", "no-softcaps", {"hidden_size": 50}, "hidden_size"),
    ("gemma3_text", "windows", {"hidden_size": 46, "num_attention_heads": 6}, "hidden_size"),
    ("gpt_neox", "parallel", {"hidden_size": 44}, "hidden_size"),
    ("gpt_neox", "parallel", {"hidden_size": 3}, "hidden_size"),
    ("gpt_neox", "parallel", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("opt", "pre-norm", {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
    ("opt", "post-norm", {"hidden_size": 36}, "hidden_size"),
    ("phi", "qk-layernorm", {"hidden_size": 36}, "hidden_size"),
    ("phi", "gqa", {"num_attention_heads": 3}, "num_attention_heads"),
    ("phi3", "gqa-partial-rotary", {"num_attention_heads": 7}, "num_attention_heads"),
    ("mistral", "window", {"num_attention_heads": 1}, "num_attention_heads"),
    ("qwen2", "gqa-tied", {"num_attention_heads": 0}, "num_attention_heads"),
    ("qwen3", "mha", {"hidden_size": -32}, "hidden_size"),
    ("olmo2", "mha", {"intermediate_size": 0}, "intermediate_size"),
    ("smollm3", "biases", {"num_hidden_layers": 0}, "num_hidden_layers"),
]


@pytest.mark.parametrize(("name", "variant", "asked", "word"), ILLEGAL)
def test_a_refused_size_names_the_rule_and_its_nearest_values_are_legal(name, variant, asked, word):
    family, config = load_family(name), plain_config(name, variant)
    sizes = Sizes.from_config(family, config).replace(**asked)
    with pytest.raises(SizeError, match=word) as caught:
        check_legal(family, config, sizes)
    if "positive" in caught.value.hint:
        return
    suggestions = _suggestions(caught.value.hint)
    assert suggestions
    for suggestion in suggestions:
        changed = sizes.replace(**suggestion)
        if "num_key_value_heads" not in family.size_keys.values() and "num_attention_heads" in suggestion:
            changed = changed.replace(num_key_value_heads=changed.num_attention_heads)
        check_legal(family, config, changed)
        assert _class_builds(changed.into_config(family, config))


def _suggestions(hint: str) -> list[dict[str, int]]:
    """The alternatives that a hint offers: ``a 8 or 16`` and ``a 8 with b 2 or a 16 with b 4``."""
    found, word = [], ""
    for option in hint.split(": ")[-1].split(" or "):
        pairs = re.findall(r"([a-z_]+_[a-z_]+) (\d+)", option)
        word = pairs[0][0] if pairs else (re.findall(r"[a-z_]+_[a-z_]+", hint) or [word])[-1]
        numbers = re.findall(r"\d+", option)
        found.append({k: int(v) for k, v in pairs} if pairs else {word: int(numbers[0])})
    return found


# ---------------------------------------------------------------- configs


@every_variant
def test_check_config_accepts_what_the_class_writes(name, variant, tmp_path):
    config = pico.make_config(name, variant)
    family = load_family(name)
    for written in (config.to_dict(), config.to_diff_dict(), plain_config(name, variant)):
        family.check_config(written)
        assert family_of({**written, "architectures": [family.architecture]}) is family
        assert Sizes.from_config(family, written).num_attention_heads == config.num_attention_heads


@every_family
def test_the_table_knows_every_key_of_the_class(name):
    written = AutoConfig.for_model(name).to_dict()
    unknown = {k for k, v in written.items() if v is not None} - load_family(name).known_keys
    assert not unknown


REFUSED_KEYS = [
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ({"zeta_scale": 2.0}, "zeta_scale"),
    ({"num_experts": 0}, "num_experts"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 32.0}, "hidden_size"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
]


@every_family
@pytest.mark.parametrize(("keys", "named"), REFUSED_KEYS)
def test_check_config_refuses_by_name(name, keys, named):
    config = plain_config(name, next(iter(pico.PICO[name]))) | keys
    with pytest.raises(UnsupportedFamilyError, match=named):
        load_family(name).check_config(config)


@every_family
def test_check_config_refuses_values_that_the_table_excludes(name):
    family = load_family(name)
    config = plain_config(name, next(iter(pico.PICO[name])))
    for key, allowed in family.only.items():
        family.check_config(config | {key: None})
        for value in allowed:
            family.check_config(config | {key: value})
        for other in ({True, False, 2, 3} if isinstance(allowed[0], bool) else {2, 0.5}) - set(allowed):
            with pytest.raises(UnsupportedFamilyError, match=key):
                family.check_config(config | {key: other})


@pytest.mark.parametrize("length", [0, 2, 4])
@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in FAMILIES for key in load_family(name).per_layer]
)
def test_check_config_refuses_a_list_of_the_wrong_length(name, key, length):
    config = plain_config(name, next(iter(pico.PICO[name])))
    with pytest.raises(UnsupportedFamilyError, match=f"{key}.* {length} entries for 3 layers"):
        load_family(name).check_config(config | {key: ["full_attention"] * length})


def test_families_with_layer_lists_declare_them():
    for name in FAMILIES:
        written = AutoConfig.for_model(name).to_dict()
        lists = {k for k, v in written.items() if isinstance(v, list) and k not in ("eos_token_id",)}
        assert lists <= set(load_family(name).per_layer), name


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}, {"model_type": "gpt2"}])
def test_unknown_families_are_refused_with_a_hint(config):
    with pytest.raises(UnsupportedFamilyError) as caught:
        family_of(config)
    assert caught.value.hint


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(UnsupportedFamilyError, match=r"'t5'.*llama.*smollm3"):
        load_family("t5")


@every_family
def test_ignored_tensors_are_no_part_of_any_model(name):
    family = load_family(name)
    for variant in pico.PICO[name]:
        assert not [n for n in expected_shapes(plain_config(name, variant)) if family.is_ignored(n)]
    for pattern in family.ignored:
        assert family.is_ignored(pattern.replace("*", "7"))


def test_the_oracle_refuses_a_tensor_of_another_shape_or_name():
    config = plain_config("llama", "mha")
    right = shapes_of("llama", config)
    check_against_oracle(config, right)
    gain = "model.norm.weight"
    for wrong in (
        right | {gain: (31,)},
        right | {"extra": (1,)},
        {k: v for k, v in right.items() if k != gain},
    ):
        with pytest.raises(CheckpointError, match="in transformers"):
            check_against_oracle(config, wrong)


# ---------------------------------------------------------------- key-value cache


@every_variant
def test_cache_bytes_are_those_of_a_real_cache(name, variant):
    model = pico.make_model(name, variant)
    sizes = Sizes.from_config(load_family(name), plain_config(name, variant))

    def cached(length: int) -> int:
        with torch.no_grad():
            cache = model(pico.tokens(rows=1, length=length), use_cache=True).past_key_values
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert cached(4) - cached(3) == kv_cache_bytes_per_token(sizes, itemsize=4)
    assert kv_cache_bytes_per_token(sizes, itemsize=2) * 2 == kv_cache_bytes_per_token(sizes, itemsize=4)


# ---------------------------------------------------------------- sizes <-> config

INTO_CONFIG = [
    # family, config keys over the base, sizes asked for, keys that change
    ("llama", {}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("llama", {"num_key_value_heads": 2}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": None}, {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64},
     {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}),
    ("llama", {"head_dim": None}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("llama", {"head_dim": None}, {"hidden_size": 64}, {"hidden_size": 64, "head_dim": 8}),
    ("llama", {"head_dim": 8}, {"hidden_size": 64}, {"hidden_size": 64}),
    ("qwen2", {"num_key_value_heads": 2}, {"hidden_size": 48}, {"hidden_size": 48, "head_dim": 8}),
    ("qwen2", {"num_key_value_heads": 2}, {"num_attention_heads": 64}, {"num_attention_heads": 64, "head_dim": 8}),
    ("qwen2", {"num_key_value_heads": 2}, {"tied": True}, {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": True}, {"tied": False}, {"tie_word_embeddings": False}),
    ("gemma", {"head_dim": 8, "num_key_value_heads": 2}, {"tied": False}, {"tie_word_embeddings": False}),
    ("opt", {}, {"intermediate_size": 99}, {"ffn_dim": 99}),
    ("opt", {"word_embed_proj_dim": 32}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8, "word_embed_proj_dim": 64}),
    ("opt", {"word_embed_proj_dim": None}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("opt", {"word_embed_proj_dim": 16}, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
     {"hidden_size": 64, "num_attention_heads": 8}),
    ("mistral", {"num_key_value_heads": 4}, {"intermediate_size": 50, "vocab_size": 97},
     {"intermediate_size": 50, "vocab_size": 97}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "asked", "changed"), INTO_CONFIG)
def test_into_config_changes_what_it_must_and_nothing_else(name, keys, asked, changed):
    family = load_family(name)
    base = plain_config(name, next(iter(pico.PICO[name])))
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        base.pop(key, None)
    config = {
        "zz_first": None,
        "_name_or_path": "x/y",
        **base,
        **keys,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    before = copy.deepcopy(config)
    sizes = Sizes.from_config(family, config).replace(**asked)
    edited = sizes.into_config(family, config)
    assert config == before, "the source's config was edited in place"
    assert edited == {**config, **changed}
    assert list(edited)[: len(config)] == list(config), "the order of keys changed"
    assert Sizes.from_config(family, edited) == sizes
    assert {word for word, _ in differing(Sizes.from_config(family, config), sizes).items()} == set(asked)


@every_variant
def test_into_config_of_the_same_sizes_is_the_same_config(name, variant):
    family = load_family(name)
    for config in (plain_config(name, variant), pico.make_config(name, variant).to_dict()):
        edited = Sizes.from_config(family, config).into_config(family, config)
        assert edited == config
        assert list(edited) == list(config)


# ---------------------------------------------------------------- the grammar

LINES = [
    # line, shape for the sizes below, roles, normed
    ("vocab -> hidden", (96, 32), (Role.READ, Role.WRITE), (False, False)),
    ("hidden <- (heads head_dim)", (32, 24), (Role.WRITE, Role.READ), (False, False)),
    ("(heads 3 head_dim) <- hidden", (72, 32), (Role.WRITE, Role.READ), (False, False)),
    ("(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim) <- hidden", (56, 32), (Role.WRITE, Role.READ),
     (False, False)),
    ("2+positions -> hidden", (66, 32), (Role.READ, Role.WRITE), (False, False)),
    ("gain hidden", (32,), (Role.GAIN,), (False,)),
    ("shift head_dim if x and not y", (4,), (Role.SHIFT,), (False,)),
    ("bias (heads head_dim)", (24,), (Role.BIAS,), (False,)),
    ("normed (heads head_dim) <- hidden", (24, 32), (Role.WRITE, Role.READ), (True, False)),
    ("normed bias (heads head_dim) if attention_bias", (24,), (Role.BIAS,), (True,)),
]  # fmt: skip
SMALL = {"vocab": 96, "hidden": 32, "heads": 6, "kv_heads": 4, "head_dim": 4, "positions": 64}


@pytest.mark.parametrize(("line", "shape", "roles", "normed"), LINES)
def test_a_line_is_parsed(line, shape, roles, normed):
    spec = parse_line(line)
    assert spec.shape(SMALL) == shape
    assert tuple(axis.role for axis in spec.axes) == roles
    assert tuple(axis.normed for axis in spec.axes) == normed
    assert spec.condition == line.partition(" if ")[2]


BAD_LINES = [
    "", "hidden", "gain", "bias ", "normed", "hidden heads", "hidden <-", "<- hidden", "-> ", "hidden -> ",
    "hiden <- vocab", "hidden <- vocabulary", "hidden heads <- vocab", "() <- hidden", "(heads hidden",
    "heads) <- hidden", "hidden <- heads <- vocab", "vocab -> hidden -> heads", "hidden <- vocab -> heads",
    "gain hidden+", "+hidden <- vocab", "hidden++heads <- vocab", "Hidden <- vocab", "hidden <- (heads, head_dim)",
    "hidden*2 <- vocab", "gain hidden <- vocab", "gain bias hidden", "bias hidden heads",
    "((heads head_dim)) <- hidden", "-1 <- hidden", "hidden <= vocab", "gain  if x",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_outside_the_grammar_is_refused_and_repeated(line):
    with pytest.raises(UnsupportedFamilyError, match=re.escape(repr(line))) as caught:
        parse_line(line)
    assert caught.value.hint


@every_family
def test_every_line_of_every_table_reads_back_as_written(name):
    for alternatives in load_family(name).tensors.values():
        for spec in alternatives:
            body = spec.text.partition(" if ")[0].removeprefix("normed ")
            if len(spec.axes) == 1:
                written = f"{spec.axes[0].role.value} {spec.axes[0]}"
            else:
                arrow = "<-" if spec.axes[0].role is Role.WRITE else "->"
                written = f"{spec.axes[0]} {arrow} {spec.axes[1]}"
            assert written == body
            assert spec.dimensions, f"{spec.text} has no dimension"
