"""``dslm down`` on the command line: every option, every refusal, and what it prints."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import dslm.shrink.down as down_module
import pico
from dslm.checkpoint.reader import open_folder
from dslm.cli.main import run
from dslm.plan import Plan, plan_growth, plan_shrink
from dslm.shrink.down import Shrunk
from dslm.sizes import count_parameters

FITTED = ["--samples", "16", "--sequence-length", "32"]


def add_tokenizer(folder: Path) -> None:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, pico.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, pico.VOCAB)}" for _ in range(count))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = pico.save(pico.make_model("llama", "gqa-tied"), tmp_path_factory.mktemp("down") / "tiny")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def source(original, tmp_path) -> Path:
    """A model of the test's own, and two texts beside it; the test works in their folder."""
    folder = tmp_path / "tiny"
    shutil.copytree(original, folder)
    (tmp_path / "text.txt").write_text(words(1000))
    (tmp_path / "check.txt").write_text(words(500, seed=1))
    return folder


@pytest.fixture
def call(source, monkeypatch, capsys):
    """Run ``dslm down`` or another command on the model: exit code, stdout, stderr."""
    monkeypatch.chdir(source.parent)

    def call(*arguments, command: str = "down"):
        capsys.readouterr()
        code = run([command, str(source), *(str(a) for a in arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def asked(monkeypatch):
    """What ``shrink`` was asked for, which then pretends to have done it."""
    seen: dict = {}

    def shrink(source, plan, out, **options):
        seen.update(options, plan=plan, out=out)
        counts = [count_parameters(source.family, s.into_config(source.family, source.config))["total"]
                  for s in (plan.source, plan.target)]  # fmt: skip
        seen["made"] = Shrunk(
            folder=out, parameters=tuple(counts), nbytes=4 * counts[1], removed={}, layers=(0, 1, 2),
            losses={"held-out": (math.log(20), math.log(25)), "check": (math.log(30), math.log(45))},
            errors=(0.01, 0.4, 0.02), tokens=448, origin="the file text.txt", seconds=1.5,
        )  # fmt: skip
        return seen["made"] if "result" not in seen else seen["result"](seen["made"])

    monkeypatch.setattr(down_module, "shrink_checkpoint", shrink)
    return seen


def one_line(err: str) -> str:
    assert err.count("\n") == 1, err
    assert err.startswith("dslm: error: ")
    assert "Traceback" not in err
    assert "unexpected" not in err
    return err


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
        "--samples",
        8,
        "--sequence-length",
        48,
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
    assert plan.calibration == {"text": "owner/data", "samples": 8, "length": 48, "refine": 0}
    assert (plan.seed, plan.model) == (5, "tiny")
    assert (asked["out"], asked["check"], asked["device"]) == (Path("out"), Path("check.txt"), "cpu")
    assert asked["overwrite"] is True


def test_what_is_not_asked_for_is_usual(call, asked):
    assert call("-upd", "2")[0] == 0
    assert asked["plan"].calibration == {"text": None, "samples": 64, "length": 512, "refine": 0}
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
        text="text.txt",
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
    assert "fitted on 448 tokens of the file text.txt" in out
    assert "removed without loss: nothing" in out
    assert "largest relative squared error of the stream: block 1 0.4, block 2 0.02, block 0 0.01" in out
    assert "reconstruct, seed 0" in out
    assert "written to out in 1.5 s" in out


def test_where_nothing_was_approximated_it_says_so(call, asked):
    from dataclasses import replace

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
    assert "fitted on" not in out


def test_json_has_all_of_it(call, asked):
    code, out, err = call("-upd", "2", "-o", "out", "--json")
    found = json.loads(out)
    assert (code, err, found["schema"]) == (0, "", 1)
    assert found["changes"] == {"intermediate_size": [48, 24]}
    assert found["parameters"] == dict(zip(("before", "after"), asked["made"].parameters, strict=True))
    assert found["methods"] == {"intermediate_size": "reconstruct"}
    assert found["calibration"] == {"text": None, "samples": 64, "length": 512, "refine": 0}
    assert found["texts"]["check"]["perplexity"] == pytest.approx({"before": 30, "after": 45})
    assert found["texts"]["held-out"]["loss"] == pytest.approx(
        {"before": math.log(20), "after": math.log(25)}
    )
    assert found["block_errors"] == [0.01, 0.4, 0.02]
    assert (found["layers"], found["removed_without_loss"], found["tokens"]) == ([0, 1, 2], {}, 448)
    assert (found["origin"], found["seconds"], found["output"]) == ("the file text.txt", 1.5, "out")


def test_a_loss_beyond_all_numbers_is_null_in_json(call, asked):
    from dataclasses import replace

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


# ---------------------------------------------------------------- refusals

BAD = [
    # arguments, exit code, what the line must say
    ([], 1, "nothing to shrink"),
    (["-edd", "1", "-upd", "1"], 1, "nothing to shrink"),
    (["--untie"], 1, "nothing to shrink"),
    (["-edd", "0"], 1, "divisor 0 is not positive"),
    (["-edd", "-2"], 1, "divisor -2 is not positive"),
    (["-upd", "0.5"], 1, "divisor 0.5.*dslm up"),
    (["-upd", "two"], 1, "divisor 'two' is not a number"),
    (["-upd", "1/0"], 1, "divisor '1/0' is not a number"),
    (["-upd", ""], 1, "divisor '' is not a number"),
    (["-edd", "1e400"], 1, "1e400|divisor"),
    (["-upd", "5"], 1, "intermediate_size 48 divided by 5.*nearest: 9 .* or 10"),
    (["--hidden-size", "33"], 1, "hidden_size 33 is larger.*32.*dslm up"),
    (["--hidden-size", "30"], 1, "hidden_size.*nearest legal hidden_size: 28 or 32"),
    (["--hidden-size", "0"], 1, "hidden_size 0"),
    (["--hidden-size", "-8"], 1, "hidden_size -8"),
    (["--hidden-size", "many"], 2, "many"),
    (["--intermediate-size", "49"], 1, "intermediate_size 49 is larger.*48.*dslm up"),
    (["--num-hidden-layers", "4"], 1, "num_hidden_layers 4 is larger.*dslm up"),
    (["--num-hidden-layers", "0"], 1, "num_hidden_layers 0"),
    (["--num-attention-heads", "3"], 1, "not a multiple.*nearest legal num_attention_heads"),
    (["--num-key-value-heads", "1"], 1, "4 query heads for each.*nearest legal pairs: 2 with 1"),
    (["--head-dim", "4"], 2, "--head-dim"),
    (["--params", "1"], 1, "too few: a table of 96 x"),
    (["--params", "1M"], 1, "1,000,000 parameters is not smaller than the source's 26,336.*dslm up"),
    (["--params", "26336"], 1, "not smaller.*dslm up"),
    (["--params", "0"], 1, "'0' is not a positive number"),
    (["--params", "big"], 1, "'big' is not a number of parameters"),
    (["--keep-ratio", "1"], 1, "share 1 is not below 1.*dslm up"),
    (["--keep-ratio", "1.5"], 1, "share 1.5 is not below 1.*dslm up"),
    (["--keep-ratio", "0"], 1, "share 0 is not positive"),
    (["--keep-ratio", "-0.1"], 1, "share -0.1 is not positive"),
    (["--keep-ratio", "80%"], 1, "share '80%' is not a number"),
    (["--keep-ratio", "nan"], 1, "share 'nan' is not a number"),
    (["--keep-ratio", "0.00001"], 1, "too few"),
    (["--keep-ratio", "0.5", "--params", "1k"], 1, "--params and --keep-ratio were given"),
    (["--params", "10k", "-edd", "2"], 1, "--params and divisors"),
    (["--like", "x", "--hidden-size", "16"], 1, "--like and sizes by name"),
    (["-upd", "2", "--intermediate-size", "24"], 1, "intermediate_size was given by name and by divisor"),
    (["--like", "absent-model"], 1, "absent-model"),
    (["--plan", "absent.yaml"], 1, "absent.yaml"),
    (["--plan", "text.txt"], 1, "text.txt is not a plan"),
    (["-upd", "2", "--method", "magic"], 2, "magic"),
    (["-upd", "2", "--samples", "1"], 1, "samples is 1"),
    (["-upd", "2", "--samples", "-3"], 1, "samples is -3"),
    (["-upd", "2", "--samples", "some"], 2, "some"),
    (["-upd", "2", "--sequence-length", "0"], 1, "windows of 0 tokens"),
    (["-upd", "2", "--seed", "-1"], 1, "seed -1"),
    (["-upd", "2", "--seed", "x"], 2, "x"),
    (["-upd", "2", "--device", "tpu"], 2, "tpu"),
    (["--snr-db", "10"], 2, "--snr-db"),
    (["--frobnicate"], 2, "--frobnicate"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "named"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_what_cannot_be_done_is_one_line(call, asked, tmp_path, arguments, code, named):
    before = sorted(tmp_path.rglob("*"))
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert re.search(named, one_line(err)), err
    assert sorted(tmp_path.rglob("*")) == before
    assert "plan" not in asked


TEXTS = [
    # name and content of a calibration text, options, what the line must say
    ("short.txt", b"w5 w6 w7", [], "short.txt has 3 tokens, and 2 windows of 32 need 64"),
    ("empty.txt", b"", [], "empty.txt is empty"),
    ("blank.txt", b" \n\n", [], "blank.txt is empty"),
    ("binary.txt", b"\xff\xfe\x00\x01", [], "binary.txt is not UTF-8 text"),
    ("zero.txt", b"w5 \x00 w6", [], "zero.txt is a binary file"),
    ("key.jsonl", b'{"content": "w5 w6"}\n', [], "line 1 of key.jsonl has 'content'.*under 'text'"),
    ("list.jsonl", b"[1]\n", [], "line 1 of list.jsonl is not a JSON object"),
    ("broken.jsonl", b'{"text": \n', [], "line 1 of broken.jsonl is not JSON"),
    (None, b"", ["--calibration", "absent.txt"], "there is no file absent.txt"),
    (None, b"", ["--calibration", "owner/data"], "owner/data is no file here, and HF_HUB_OFFLINE"),
    (None, b"", ["--calibration", "text.txt", "--check", "absent.txt"], "there is no file absent.txt"),
    (None, b"", ["--calibration", "text.txt", "--sequence-length", "8"], "windows of 8 tokens are too short"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "named"), TEXTS)
def test_a_text_that_cannot_be_used_is_one_line_and_leaves_nothing(
    call, tmp_path, monkeypatch, name, content, options, named
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if name:
        (tmp_path / name).write_bytes(content)
        options = ["--calibration", name]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("-upd", "2", "-o", "out", *FITTED, *options, "-q")
    assert (code, out) == (1, "")
    assert re.search(named, one_line(err)), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ("tiny", "touch the source"),
        (".", "touch the source|folder you are in"),
        ("text.txt", "is a file"),
        ("full", "not empty"),
    ],
)
def test_an_output_place_that_is_not_usable_is_refused_first(call, tmp_path, out, named):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call("-upd", "2", "-o", out, *FITTED, "--calibration", "text.txt")
    assert code == 1
    assert re.search(named, one_line(err)), err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_for_the_other_direction_names_the_command(call, source, tmp_path):
    checkpoint = open_folder(source)
    sizes = checkpoint.sizes
    plans = {
        "grow.yaml": plan_growth(
            "m", checkpoint.family, checkpoint.config, sizes.replace(intermediate_size=96)
        ),
        "shrink.yaml": plan_shrink(
            "m", checkpoint.family, checkpoint.config, sizes.replace(intermediate_size=24)
        ),
    }
    for name, plan in plans.items():
        (tmp_path / name).write_text(plan.to_yaml())
    code, _, err = call("--plan", "grow.yaml", "-o", "out")
    assert (code, "grow.yaml is a plan to grow; give it to dslm up" in one_line(err)) == (1, True)
    code, _, err = call("--plan", "shrink.yaml", "-o", "out", command="up")
    assert (code, "shrink.yaml is a plan to shrink; give it to dslm down" in one_line(err)) == (1, True)


@pytest.mark.parametrize(
    "option",
    [["-upd", "2"], ["--params", "10k"], ["--keep-ratio", "0.5"], ["--seed", "1"], ["--samples", "4"], ["--untie"],
     ["--calibration", "text.txt"], ["--method", "slice"], ["--num-hidden-layers", "2"]],
    ids=str,
)  # fmt: skip
def test_a_plan_is_not_silently_mixed_with_options(call, asked, source, tmp_path, option):
    checkpoint = open_folder(source)
    plan = plan_shrink(
        "m", checkpoint.family, checkpoint.config, checkpoint.sizes.replace(intermediate_size=24)
    )
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    code, _, err = call("--plan", "plan.yaml", *option)
    assert code == 2
    assert "--plan" in one_line(err)
    assert "plan" not in asked


def test_a_quantised_source_is_refused(call, source):
    config = pico.read_config(source) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))
    code, _, err = call("-upd", "2", "-o", "out")
    assert code == 1
    assert "quantised" in one_line(err)


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


# ---------------------------------------------------------------- for real

CALIBRATED = [*FITTED, "--calibration", "text.txt", "--check", "check.txt", "--device", "cpu", "-q"]


@pytest.mark.parametrize("method", ["reconstruct", "slice"])
def test_a_model_is_shrunk_and_stock_transformers_loads_it(call, tmp_path, method):
    arguments = [
        "--intermediate-size",
        32,
        "--num-hidden-layers",
        2,
        "-o",
        "out",
        "--method",
        method,
        *CALIBRATED,
    ]
    code, out, err = call(*arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found["texts"]) == {"held-out", "check"}
    assert len(found["layers"]) == len(found["block_errors"]) == 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == found["parameters"]["after"]
    assert not torch.isnan(model(pico.tokens()).logits).any()
    check = torch.tensor([[int(w[1:]) for w in words(500, seed=1).split()][: 15 * 32]]).view(15, 32)
    loss = sum(float(model(row[None], labels=row[None]).loss.detach()) for row in check) / len(check)
    assert found["texts"]["check"]["loss"]["after"] == pytest.approx(loss, rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--num-hidden-layers 2 --method {method} --calibration text.txt" in card
    first = load_file(tmp_path / "out" / "model.safetensors")
    assert call(*arguments, "--overwrite")[0] == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_grown_model_shrinks_back_without_loss_and_without_calibration(call, source, tmp_path):
    assert call("-edm", 2, "-upm", 2, "-o", "big", command="up")[0] == 0
    code = run(["down", "big", "--like", str(source), "-o", "back", "--json", "-q"])
    assert code == 0
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(pico.tokens()).logits
            for name in ("tiny", "back")
        )
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
