"""There and back: what `dslm up`, or somebody else, made of a model is undone by a shrink without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import SizeError
from dslm.families.axes import Role
from dslm.plan import plan_shrink
from dslm.shrink import down
from dslm.shrink.weights import Stored
from growing import doubled, grow, load
from pico import make_model, save, tokens
from shrinking import FLOAT32, distance, reduced


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "gqa-tied"),
        ("qwen2", "gqa-tied"),
        ("qwen3", "gqa-tied"),
        ("olmo2", "biases"),
        ("phi", "mha"),
        ("gemma2", "windows-softcaps"),
        ("gpt_neox", "parallel"),
    ],
)
def test_down_undoes_a_growth_of_everything_and_reads_no_text(family, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(down, "calibration", None)
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    larger = doubled(source.sizes).replace(intermediate_size=77, num_hidden_layers=5)
    grown = open_folder(grow(source, tmp_path / "grown", larger))
    done = shrinking.down(grown, tmp_path / "back", source.sizes)
    assert open_folder(tmp_path / "back").sizes == source.sizes
    assert set(done.removed) == {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    }
    assert (done.losses, done.errors, done.tokens, done.origin) == ({}, (), 0, "")
    assert distance(tmp_path / "source", tmp_path / "back") < FLOAT32


def test_a_check_text_is_measured_without_a_calibration_text_too(tmp_path, monkeypatch):
    """Both models as their files hold them: what rounding costs is in the figure."""
    ids = tokens(3)
    monkeypatch.setattr(down, "check_windows", lambda *arguments, **options: ids)
    save(make_model("gemma2", "biases", dtype=torch.bfloat16), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    grown = open_folder(grow(source, tmp_path / "grown", doubled(source.sizes)))
    plan = plan_shrink("tiny", grown.family, grown.config, source.sizes)
    done = down.shrink_checkpoint(grown, plan, tmp_path / "back", check=Path("a.txt"), device="cpu")
    before, after = (
        shrinking.loss_of(load(tmp_path / name, torch.float32), ids) for name in ("grown", "back")
    )
    assert abs(before - after) > 1e-4
    assert done.losses == {"check": pytest.approx((before, after), abs=1e-5)}
    assert done.tokens == 0


def test_what_was_before_is_the_source_where_some_goes_without_loss_and_some_does_not(tmp_path, monkeypatch):
    ids = tokens(3)
    monkeypatch.setattr(down, "check_windows", lambda *arguments, **options: ids)
    source = open_folder(save(make_model("llama", "mha", dtype=torch.bfloat16), tmp_path / "source"))
    units = source.sizes.intermediate_size
    grown = grow(source, tmp_path / "grown", source.sizes.replace(intermediate_size=2 * units), split="even")
    model, generator = load(grown, torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # copies are alike within what bfloat16 tells apart
            parameter.mul_(1 + 0.0015 * torch.randn(parameter.shape, generator=generator))
    noisy = open_folder(save(model.bfloat16(), tmp_path / "noisy"))
    plan = plan_shrink(
        "tiny",
        noisy.family,
        noisy.config,
        noisy.sizes.replace(intermediate_size=units - 4),
        samples=24,
        length=24,
    )
    done = down.shrink_checkpoint(noisy, plan, tmp_path / "out", check=Path("a.txt"), device="cpu")
    assert done.removed["intermediate_size"] > units / 2
    before, after = (
        shrinking.loss_of(load(tmp_path / name, torch.float32), ids) for name in ("noisy", "out")
    )
    assert done.losses["check"] == pytest.approx((before, after), abs=1e-5)


def test_down_undoes_a_growth_that_changed_the_size_of_groups(tmp_path):
    save(make_model("llama", "gqa-tied"), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    grown = open_folder(grow(source, tmp_path / "grown", source.sizes.replace(num_key_value_heads=4)))
    shrinking.down(grown, tmp_path / "back", source.sizes)
    assert distance(tmp_path / "source", tmp_path / "back") < FLOAT32
    with pytest.raises(SizeError, match=r"4 query heads for each key-value head.* 2 with 1"):
        shrinking.down(grown, tmp_path / "out", source.sizes.replace(num_key_value_heads=1))
    assert not (tmp_path / "out").exists()


def at_the_ends(source, name, weight):
    """An outer tensor, so that a clone of twice the width writes, and says, what the source does.

    What is looked up is multiplied by the root of the width in some families. A tied table is read at its copies too,
    which only the norm before it can make up for.
    """
    family, offset = source.family, source.family.gain_offset
    looked_up = 0.5**0.5 if family.embedding_multiplier == "sqrt(hidden)" else 1.0
    if name == family.embedding:
        return looked_up * weight
    if source.sizes.tied and family.is_final_norm(name):
        return (weight + offset) / (2 * looked_up) - offset
    return weight


def cloned(source, folder, kind):
    """Twice the model in width, FFN and heads, the way others do it."""
    family, config = source.family, source.config
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(doubled(source.sizes).into_config(family, config)), encoding="utf-8"
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, line in family.layout(config).items():
        weight = at_the_ends(source, name, Stored(source).read(name))
        fixed = {"vocab"}, {"head_dim"}  # the norm of a head stays
        wide = [i for i, axis in enumerate(line.spec.axes) if set(axis.dimensions) not in fixed]
        reads = [position for position in wide if line.spec.axes[position].role is Role.READ]
        if kind == "block diagonal" and len(wide) == 2:
            weight = torch.block_diag(weight, weight)
        else:
            noise = 0.1 * torch.randn(weight.shape, generator=generator) if kind == "noisy" else 0.0
            for position in set(wide) - set(reads):
                weight = torch.cat([weight, weight], position)
                noise = torch.cat([noise, noise], position) if kind == "noisy" else 0.0
            for position in reads:
                weight = torch.cat([weight / 2 + noise, weight / 2 - noise], position)
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["even", "noisy", "block diagonal"])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "mha"),
        ("llama", "gqa-tied"),
        ("qwen2", "mha"),
        ("qwen2", "gqa-tied"),
        ("qwen3", "mha"),
        ("qwen3", "gqa-tied"),
        ("phi", "mha"),
        ("phi", "tied"),
        ("gpt_neox", "parallel"),
        ("gpt_neox", "tied-full-rotary"),
        ("olmo2", "biases"),
        ("olmo2", "gqa-tied"),
        ("gemma2", "biases"),
        ("gemma2", "wide-heads-untied"),
        ("gemma2", "windows-softcaps"),
        ("gemma3_text", "windows"),
    ],
)
def test_clones_made_by_others_are_undone(family, variant, kind, tmp_path):
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    clone = cloned(source, tmp_path / "clone", kind)
    assert distance(tmp_path / "source", clone) < FLOAT32
    out, sizes, _ = reduced(clone, source.sizes, tmp_path)
    assert sizes == source.sizes
    assert distance(tmp_path / "source", out) < FLOAT32
