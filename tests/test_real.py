"""The built-in real model, end to end through the command line."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dslm.cli.main import cli

pytestmark = pytest.mark.real
MODEL = "demo:smollm2-135m"
PARAMETERS = 134_515_008


def run(*arguments: object) -> dict:
    """Run a command with --json and return its object."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json", "-q"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "doubled"
    run("up", MODEL, "-o", out, "-edm", "2", "-upm", "2")
    return out


def test_desc_counts_the_real_model():
    facts = run("desc", MODEL)
    assert facts["parameters"]["total"] == PARAMETERS
    assert facts["bytes"] == 2 * PARAMETERS
    assert facts["sizes"]["tied"] is True
    assert facts["kv_cache_bytes_per_token"] == 2 * 30 * 3 * 64 * 2


def test_doubling_is_the_same_function_up_to_rounding(doubled):
    report = run("diff", MODEL, doubled, "--no-liveness", "--max-kl", "1e-9", "--min-agreement", "1")
    assert report["verdict"] == "same"
    assert report["comparison"]["max_difference"] < 10 * report["floor"]["max_difference"]
    assert report["comparison"]["max_difference"] < 2e-3


def test_doubling_stays_small_tied_and_in_bf16(doubled):
    facts = run("desc", doubled)
    assert facts["dtype"] == "bfloat16"
    assert facts["sizes"]["tied"] is True
    assert facts["bytes"] == 2 * facts["parameters"]["total"]
    assert facts["files"] == 1


def test_one_and_a_half_times_is_the_same_up_to_one_rounding_of_the_weights(tmp_path):
    run("up", MODEL, "-o", tmp_path / "out", "-edm", "1.5", "-upm", "1.5")
    report = run("diff", MODEL, tmp_path / "out", "--no-liveness", "--max-kl", "1e-3")
    assert report["verdict"] == "rounded"
    assert report["comparison"]["kl"] < 3 * report["storage_floor"]["kl"]


@pytest.mark.parametrize(
    "how",
    [("--method", "net2net", "--intermediate-size", "2000"), ("--method", "padding", "--params", "200M")],
)
def test_grown_models_say_what_the_source_says(how, tmp_path):
    run("up", MODEL, "-o", tmp_path / "out", *how, "--dtype", "float32")
    said = [
        run("gen", model, "--temperature", "0", "-n", "12", "--dtype", "float32")
        for model in (MODEL, tmp_path / "out")
    ]
    assert said[0]["text"] == said[1]["text"]
    assert "Paris" in said[0]["text"]
