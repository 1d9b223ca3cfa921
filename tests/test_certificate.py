"""What the certificate says of our growth, and of the growth of others, remade here without our code."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from dslm.checkpoint.reader import open_folder
from dslm.cli.main import cli
from dslm.errors import VerificationError
from dslm.grow import axis_map, hypercloning
from dslm.verify import Report, compare_checkpoints
from growing import draw_target, grow, grow_or_nearest
from pico import PICO, make_model, save

FAMILIES = [(family, next(iter(variants))) for family, variants in PICO.items()]


@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=[family for family, _ in FAMILIES])
@pytest.mark.parametrize("method", ["hypercloning", "padding"])
def test_our_growth_is_the_same_function_alive_and_unlocked(family, variant, method, tmp_path):
    save(make_model(family, variant), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    dimension = "coupled" if source.family.head_dim == "derived" else "all"
    target = draw_target(source.family, source.config, dimension, random.Random(family))
    report = compare_checkpoints(
        source, open_folder(grow_or_nearest(source, tmp_path / "out", target, method))
    )
    assert report.verdict in ("identical", "same")
    assert report.liveness is not None
    assert report.liveness.alive, report.liveness.examples
    assert report.liveness.unlocked, report.liveness.examples


def test_many_new_heads_on_kept_keys_stay_unlocked_under_a_norm_over_all_heads(tmp_path):
    save(make_model("olmo2", "gqa-tied"), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(num_attention_heads=12)
    report = compare_checkpoints(
        source, open_folder(grow(source, tmp_path / "out", target, method="padding"))
    )
    assert report.verdict in ("identical", "same")
    assert report.liveness is not None
    assert report.liveness.unlocked, report.liveness.examples


def test_a_growth_that_narrows_the_dtype_is_judged_by_that_dtype(tmp_path):
    save(make_model("llama", "gqa-tied"), tmp_path / "source")
    source = open_folder(tmp_path / "source")
    target = source.sizes.replace(intermediate_size=96)
    narrow = open_folder(grow(source, tmp_path / "out", target, dtype="BF16"))
    assert compare_checkpoints(source, narrow, liveness=False).verdict == "rounded"


@pytest.mark.parametrize(("roundings", "verdict"), [(1, "rounded"), (3, "close")])
def test_a_few_roundings_are_told_from_a_change(roundings, verdict, tmp_path):
    source = open_folder(save(make_model("llama", "gqa-tied", dtype=torch.bfloat16), tmp_path / "source"))
    model, generator = make_model("llama", "gqa-tied", dtype=torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = source.read_rows(name, 0, len(parameter)).float()
            step = 2.0**-9 / 3**0.5  # of a number halfway to the next power of two, evenly spread
            noise = torch.randn(stored.shape, generator=generator)
            parameter.copy_(stored * (1 + roundings * step * noise))
    other = open_folder(save(model, tmp_path / "other"))
    report = compare_checkpoints(source, other, liveness=False)
    assert report.storage is not None
    assert report.comparison.relative_difference < 10 * report.storage.relative_difference
    assert report.verdict == verdict


def foreign(tmp_path: Path, sizes: dict[str, int], widen) -> Report:
    """Grow the tiny Llama by another rule: ``widen(name, weight, shape)`` gives each tensor."""
    small = make_model("llama", "mha")
    save(small, tmp_path / "source")
    config = AutoConfig.for_model("llama", **{**PICO["llama"]["mha"], **sizes})
    large = AutoModelForCausalLM.from_config(config)
    state = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parameter.copy_(widen(name, state[name], parameter.shape))
    save(large, tmp_path / "grown")
    return compare_checkpoints(open_folder(tmp_path / "source"), open_folder(tmp_path / "grown"))


def tiled(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Plain repetition along every axis, cut to the shape."""
    index = [torch.arange(size) % weight.shape[axis] for axis, size in enumerate(shape)]
    return weight[torch.meshgrid(*index, indexing="ij")]


def test_the_papers_even_clone_is_exact_and_locked_everywhere(tmp_path):
    def widen(name, weight, shape):
        reads = name != "model.embed_tokens.weight" and weight.dim() == 2
        return tiled(weight, shape) / (shape[1] // weight.shape[1] if reads else 1)

    doubled = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8}
    report = foreign(tmp_path, doubled, widen)
    assert report.verdict in ("identical", "same")
    assert report.liveness is not None
    assert report.liveness.alive
    assert not report.liveness.unlocked
    assert all(2 * space.locked >= space.units for space in report.liveness.spaces)


def test_unweighted_fractional_copies_are_another_function(tmp_path):
    """Net2Net's and bert2BERT's rule on a stream under RMSNorm: copies by count, no amplitudes."""

    def widen(name, weight, shape):
        found = tiled(weight, shape)
        if weight.dim() == 2 and name != "model.embed_tokens.weight" and shape[1] > weight.shape[1]:
            source = torch.arange(shape[1]) % weight.shape[1]
            found = found / torch.bincount(source)[source]
        return found

    report = foreign(tmp_path, {"hidden_size": 48, "head_dim": 8}, widen)
    assert report.verdict == "different"
    assert report.comparison.relative_difference > 0.05


def test_query_heads_tiled_over_kept_keys_are_another_function(tmp_path):
    def widen(name, weight, shape):
        return tiled(weight, shape) / (shape[1] // weight.shape[1] if name.endswith("o_proj.weight") else 1)

    report = foreign(tmp_path, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, widen)
    assert report.verdict == "different"
    assert report.comparison.relative_difference > 0.05


def test_padding_that_zeroes_both_sides_is_exact_and_dead(tmp_path):
    def widen(name, weight, shape):
        found = torch.zeros(shape)
        found[tuple(slice(0, size) for size in weight.shape)] = weight
        return found

    report = foreign(tmp_path, {"intermediate_size": 60}, widen)
    assert report.verdict in ("identical", "same")
    assert report.liveness is not None
    assert not report.liveness.alive
    ffn = next(space for space in report.liveness.spaces if space.name == "FFN units")
    assert ffn.dead == 12 * PICO["llama"]["mha"]["num_hidden_layers"]


@pytest.mark.parametrize("split", ["even", "uneven"])
def test_up_verifies_before_anything_appears(split, tmp_path):
    """Even copies are locked, which is what was asked for; another function is never written."""
    save(make_model("llama", "gqa-tied"), tmp_path / "source")
    command = ["up", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "-upm", "2", "--split", split]
    result = CliRunner().invoke(cli, [*command, "--verify", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["measured"]
    assert measured["verdict"] in ("identical", "same")
    assert measured["alive"] is True
    assert measured["unlocked"] is (split == "uneven")
    assert json.loads((tmp_path / "out" / "dslm.json").read_text())["measured"] == measured


def test_up_does_not_keep_what_fails_verification(tmp_path, monkeypatch):
    monkeypatch.setattr(hypercloning, "weighted_copies", axis_map.copies)
    save(make_model("llama", "gqa-tied"), tmp_path / "source")
    command = [
        "up",
        str(tmp_path / "source"),
        "-o",
        str(tmp_path / "out"),
        "--hidden-size",
        "48",
        "--verify",
        "-q",
    ]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, VerificationError)
    assert "is not the function" in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
