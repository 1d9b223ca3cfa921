"""``dslm down`` and ``dslm plan`` on the command line: every option, and what they print."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import asking
import pico
from asking import one_line
from dslm.checkpoint.reader import open_folder
from dslm.plan import Plan, plan_shrink
from dslm.sizes import count_parameters

original, source, call, asked = asking.original, asking.source, asking.call, asking.asked  # fixtures

# ---------------------------------------------------------------- what is asked for

TARGETS = [
    # options -> what changes
    (["-upd", "2"], {"intermediate_size": 24}),
    (["--up-proj-divisor", "4/3"], {"intermediate_size": 36}),
    (["-edd", "2"], {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}),
    (
        ["--embed-dim-divisor", "2", "-upd", "1.5"],
        {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    (["-upd", "2", "--num-hidden-layers", "2"], {"intermediate_size": 24, "num_hidden_layers": 2}),
    (["--hidden-size", "24"], {"hidden_size": 24}),
    (["--intermediate-size", "47"], {"intermediate_size": 47}),
    (["--num-hidden-layers", "1"], {"num_hidden_layers": 1}),
    (
        ["--num-attention-heads", "2", "--num-key-value-heads", "1"],
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    (["--num-attention-heads", "2"], {"num_attention_heads": 2}),
    (["-upd", "2", "--untie"], {"intermediate_size": 24, "tied": False}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "changes"), TARGETS, ids=lambda v: " ".join(v))
def test_sizes_are_asked_for_in_many_ways(call, asked, source, arguments, changes):
    code, _, err = call(*arguments, "-o", "out")
    assert (code, err) == (0, "")
    assert asked["plan"].target == open_folder(source).sizes.replace(**changes)
    assert asked["plan"].methods == dict.fromkeys(changes.keys() - {"tied"}, "reconstruct")


def test_options_reach_the_library(call, asked):
    code, _, _ = call(
        "-upd",
        "2",
        "-o",
        "out",
        "--method",
        "slice",
        "--calibration",
        "owner/data",
        "--calibration",
        "self",
        "--samples",
        8,
        "--sequence-length",
        48,
        "--refine",
        7,
        "--check",
        "check.txt",
        "--seed",
        5,
        "--device",
        "cpu",
        "--overwrite",
    )
    assert code == 0
    plan = asked["plan"]
    assert plan.methods == {"intermediate_size": "slice"}
    assert plan.calibration == {"texts": ["owner/data", "self"], "samples": 8, "length": 48, "refine": 7}
    assert (plan.seed, plan.model) == (5, "tiny")
    assert (asked["out"], asked["check"], asked["device"]) == (Path("out"), Path("check.txt"), "cpu")
    assert asked["overwrite"] is True


def test_no_steps_at_all_is_not_the_usual_number(call, asked):
    assert call("-upd", "2", "-o", "out", "--refine", 0)[0] == 0
    assert asked["plan"].calibration["refine"] == 0


def test_what_is_not_asked_for_is_usual(call, asked):
    assert call("-upd", "2")[0] == 0
    assert asked["plan"].calibration == {"texts": ["self"], "samples": 64, "length": 512, "refine": None}
    assert (asked["plan"].seed, asked["check"], asked["device"]) == (0, None, "auto")
    assert asked["overwrite"] is False
    assert re.fullmatch(r"tiny-\d+\.\dk", str(asked["out"]))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [(["--keep-ratio", "0.8"], 0.8), (["--keep-ratio", "1/2"], 0.5), (["--params", "20k"], None)],
)
def test_one_number_is_enough(call, asked, source, arguments, wanted):
    assert call(*arguments, "-o", "out")[0] == 0
    now = count_parameters(open_folder(source).family, open_folder(source).config)["total"]
    after = asked["made"].parameters[1]
    assert after == pytest.approx(20_000 if wanted is None else wanted * now, rel=0.01)


def test_like_takes_layers_too(call, asked, source, tmp_path):
    shape = {"num_hidden_layers": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(**pico.read_config(source) | shape)
    pico.save(AutoModelForCausalLM.from_config(config), tmp_path / "other")
    assert call("--like", "other", "-o", "out")[0] == 0
    assert asked["plan"].target == open_folder(source).sizes.replace(**shape)


def test_a_plan_file_is_done_as_it_says(call, asked, source, tmp_path):
    checkpoint = open_folder(source)
    plan = plan_shrink(
        "elsewhere",
        checkpoint.family,
        checkpoint.config,
        checkpoint.sizes.replace(num_hidden_layers=2),
        method="slice",
        texts=["text.txt"],
        samples=8,
        seed=4,
    )
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    assert call("--plan", "plan.yaml", "-o", "out", "--check", "check.txt", "--device", "cpu")[0] == 0
    assert asked["plan"].as_dict() == plan.as_dict() | {"model": "tiny"}


# ---------------------------------------------------------------- what is printed


def test_the_report_says_what_was_done_and_what_it_cost(call, asked):
    code, out, err = call("-upd", "2", "-o", "out", "--check", "check.txt")
    assert (code, err) == (0, "")
    assert re.search(r"before +after +kept", out)
    assert re.search(r"intermediate_size +48 +24 +50\.0%", out)
    assert re.search(r"parameters +26,336 +[\d,]+ +\d\d\.\d%", out)
    assert re.search(r"held-out calibration text +20\.000 +25\.000 +x 1\.250", out)
    assert re.search(r"check text +30\.000 +45\.000 +x 1\.500", out)
    assert "calibrated on 448 tokens of the file text.txt" in out
    assert "removed without loss: nothing" in out
    assert "reconstruct, seed 0" in out
    assert "written to out in 1.5 s" in out


def test_every_block_has_a_row_with_the_layer_that_it_comes_from(call, asked):
    layers = [n for n in range(60) if n % 3]
    errors = tuple(0.001 * (1 + layer) for layer in layers)
    asked["result"] = lambda made: replace(made, layers=tuple(layers), errors=errors)
    lines = call("-upd", "2", "-o", "out")[1].splitlines()
    header = next(i for i, line in enumerate(lines) if re.match(r"block +from layer +relative", line))
    rows = [line.split() for line in lines[header + 1 : header + 41]]
    assert rows == [[str(i), str(n), f"{0.001 * (1 + n):.3g}"] for i, n in enumerate(layers)]


def test_where_nothing_was_approximated_it_says_so(call, asked):
    asked["result"] = lambda made: replace(
        made,
        removed={"intermediate_size": 1234, "num_hidden_layers": 1},
        losses={},
        errors=(),
        tokens=0,
        origin="",
    )
    out = call("-upd", "2", "-o", "out")[1]
    assert "removed without loss: 1,234 of intermediate_size, 1 of num_hidden_layers" in out
    assert "nothing was approximated" in out
    assert "perplexity" not in out
    assert "calibrated on" not in out
    assert "from layer" not in out


def test_a_check_text_is_reported_where_nothing_was_approximated_too(call, asked):
    measured = {"check": (math.log(30), math.log(30))}
    asked["result"] = lambda made: replace(made, losses=measured, errors=(), tokens=0, origin="")
    out = call("-upd", "2", "-o", "out", "--check", "check.txt")[1]
    assert "nothing was approximated" in out
    assert re.search(r"check text +30\.000 +30\.000 +x 1\.000", out)


def test_json_has_all_of_it(call, asked):
    code, out, err = call("-upd", "2", "-o", "out", "--json")
    found = json.loads(out)
    assert (code, err, found["schema"]) == (0, "", 1)
    assert found["changes"] == {"intermediate_size": [48, 24]}
    assert found["parameters"] == dict(zip(("before", "after"), asked["made"].parameters, strict=True))
    assert found["methods"] == {"intermediate_size": "reconstruct"}
    assert found["calibration"] == {"texts": ["self"], "samples": 64, "length": 512, "refine": None}
    assert found["texts"]["check"]["perplexity"] == pytest.approx({"before": 30, "after": 45})
    assert found["texts"]["held-out"]["loss"] == pytest.approx(
        {"before": math.log(20), "after": math.log(25)}
    )
    assert found["block_errors"] == [0.01, 0.4, 0.02]
    assert (found["layers"], found["removed_without_loss"], found["tokens"]) == ([0, 1, 2], {}, 448)
    assert (found["origin"], found["seconds"], found["output"]) == ("the file text.txt", 1.5, "out")


def test_a_loss_beyond_all_numbers_is_null_in_json(call, asked):
    asked["result"] = lambda made: replace(made, losses={"held-out": (1.0, 1e6)})
    found = json.loads(call("-upd", "2", "-o", "out", "--json")[1])
    assert found["texts"]["held-out"]["perplexity"]["after"] is None
    assert "inf" in call("-upd", "2", "-o", "out")[1]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_dry_run_writes_nothing(call, asked, tmp_path, arguments):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call("-upd", "2", "--dry-run", *arguments)
    assert code == 0
    assert "plan" not in asked
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads(out)["output"] is None if arguments else "nothing written (--dry-run)" in out


# ---------------------------------------------------------------- dslm plan


def test_plan_lists_smaller_shapes_and_writes_a_plan_that_down_does(call, asked, source):
    code, out, err = call("--params", "20k", "--yaml", "plan.yaml", command="plan")
    assert (code, err) == (0, "")
    assert re.search(r"layers +hidden +FFN +heads +kv heads +parameters", out)
    plan = Plan.from_yaml(Path("plan.yaml"))
    assert plan.shrinks
    assert set(plan.methods.values()) == {"reconstruct"}
    assert "split" not in yaml.safe_load(Path("plan.yaml").read_text())
    listed = json.loads(call("--params", "20k", "--json", command="plan")[1])["candidates"]
    assert {key: listed[0][key] for key in plan.target.as_dict()} == plan.target.as_dict()
    assert call("--plan", "plan.yaml", "-o", "out")[0] == 0
    assert asked["plan"].target == plan.target


def test_plan_above_the_source_grows_as_before(call):
    code, out, _ = call("--params", "60k", "--yaml", "plan.yaml", command="plan")
    assert code == 0
    assert "layers" not in out
    assert not Plan.from_yaml(Path("plan.yaml")).shrinks


@pytest.mark.parametrize(
    ("params", "method", "named"),
    [("20k", "padding", "padding does not shrink"), ("60k", "slice", "slice does not grow")],
)
def test_plan_refuses_a_method_of_the_other_direction(call, params, method, named):
    code, _, err = call("--params", params, "--method", method, command="plan")
    assert code == 1
    assert named in one_line(err)
