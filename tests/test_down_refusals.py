"""``dslm down`` on the command line: everything it refuses, in one line and before anything is written."""

from __future__ import annotations

import json
import re

import pytest
import torch

import asking
import dslm.shrink.approximate
import dslm.shrink.calibrate
import pico
from asking import FITTED, one_line
from calling import caller
from dslm.checkpoint.reader import open_folder
from dslm.plan import plan_growth, plan_shrink

original, source, call, asked = asking.original, asking.source, asking.call, asking.asked  # fixtures

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
    (["--hidden-size", "30"], 1, r"hidden_size.*nearest legal hidden_size: 28$"),
    (["--hidden-size", "0"], 1, "hidden_size 0"),
    (["--hidden-size", "-8"], 1, "hidden_size -8"),
    (["--hidden-size", "many"], 2, "many"),
    (["--intermediate-size", "49"], 1, "intermediate_size 49 is larger.*48.*dslm up"),
    (["--num-hidden-layers", "4"], 1, "num_hidden_layers 4 is larger.*dslm up"),
    (["--num-hidden-layers", "0"], 1, "num_hidden_layers 0"),
    (["--num-attention-heads", "3"], 1, r"not a multiple.*nearest legal num_attention_heads: 2$"),
    (["--head-dim", "4"], 2, "head_dim cannot shrink: every rotary frequency.*shrink num_attention_heads"),
    (["--vocab-size", "90"], 2, "vocab_size cannot shrink: the tokenizer needs every row"),
    (["--params", "1"], 1, "too few: a table of 96 x"),
    (["--params", "1M"], 1, "1,000,000 parameters is not smaller than the source's 26,336.*dslm up"),
    (["--params", "26336"], 1, "not smaller.*dslm up"),
    (["--params", "0"], 1, "'0' is not a positive number"),
    (["--untie"], 1, "nothing to shrink: --untie takes nothing away"),
    (["--num-hidden-layers", "2", "--calibration", ""], 1, "the name of a calibration text is empty"),
    (
        ["--num-hidden-layers", "2", "--heal-tokens", "many"],
        1,
        "'many' is not a number of tokens; give one such as 100k",
    ),
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


NO_GAIN = (
    "cannot shrink: the table is both written and read, and there is no gain before the output to make up for the "
    "change; give the output its own table with --untie, or shrink the other sizes"
)
SIXTEEN = ["--hidden-size", "16", "--num-attention-heads", "2"]
STUCK = [
    # family, variant, what is asked for, what the line offers, and that as options
    ("gpt_neox", "parallel", ["--num-attention-heads", "2"],
     "which must stay 8: 32 / 2 is not; nearest legal: hidden_size 16 with num_attention_heads 2", SIXTEEN),
    ("gpt_neox", "parallel", ["--num-attention-heads", "2", "--num-key-value-heads", "2"],
     "which must stay 8: 32 / 2 is not; nearest legal: hidden_size 16 with num_attention_heads 2", SIXTEEN),
    ("opt", "pre-norm", ["--num-attention-heads", "2", "--num-key-value-heads", "2"],
     "which must stay 8: 32 / 2 is not; nearest legal: hidden_size 16 with num_attention_heads 2", SIXTEEN),
    ("gpt_neox", "parallel", ["--hidden-size", "20"],
     "nearest legal: hidden_size 24 with num_attention_heads 3 or hidden_size 16 with num_attention_heads 2", SIXTEEN),
    ("gpt_neox", "parallel", ["--num-key-value-heads", "2"],
     "which must stay 8: 32 / 2 is not; nearest legal: hidden_size 16 with num_attention_heads 2", SIXTEEN),
    ("gpt_neox", "parallel", ["--num-attention-heads", "2", "--num-key-value-heads", "4"],
     "gpt_neox has as many key-value heads as query heads; nearest legal: "
     "hidden_size 16 with num_attention_heads 2 and num_key_value_heads 2",
     ["--hidden-size", "24", "--num-key-value-heads", "3"]),
    ("phi3", "longrope", ["--hidden-size", "24"],
     "nearest legal: hidden_size 16 with num_attention_heads 2 or "
     "hidden_size 8 with num_attention_heads 1 and num_key_value_heads 1",
     ["--hidden-size", "16", "--num-attention-heads", "2"]),
    ("llama", "mha", ["--num-attention-heads", "2"], "nearest legal: num_attention_heads 2 and num_key_value_heads 2",
     ["--num-attention-heads", "2", "--num-key-value-heads", "2"]),
    ("opt", "post-norm", ["--num-attention-heads", "2", "--num-key-value-heads", "2"],
     f"hidden_size, which goes with it, {NO_GAIN}", [*SIXTEEN, "--untie"]),
    ("opt", "post-norm", ["--hidden-size", "20"], f"error: hidden_size {NO_GAIN}", ["--intermediate-size", "20"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "variant", "asked", "offer", "taken"), STUCK)
def test_what_is_offered_instead_is_smaller_and_can_be_had(
    family, variant, asked, offer, taken, tmp_path, capsys
):
    source = pico.save(pico.make_model(family, variant), tmp_path / "source")
    call = caller(capsys)
    code, out, err = call("down", source, *asked, "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert one_line(err).rstrip().endswith(offer)
    assert call("down", source, *taken, "--dry-run")[0] == 0


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
    ("options", "named"),
    [
        (["--check", "absent.txt"], "there is no file absent.txt"),
        (["--search", "2", "--check", "absent.txt"], "there is no file absent.txt"),
        (["--calibration", "self", "--calibration", "absent.txt"], "there is no file absent.txt"),
        (["--search", "2", "--heal-tokens", "1k"], "there is no text to heal on"),
        (["--search", "2", "--seed", "-1"], "seed -1 is negative"),
    ],
)
def test_what_cannot_be_is_seen_before_the_model_writes(call, monkeypatch, options, named):
    monkeypatch.setattr(dslm.shrink.calibrate, "_self_written", None)
    code, _, err = call("--params", "21k", "-o", "out", *FITTED, "-q", *options)
    assert code == 1
    assert named in one_line(err)


@pytest.mark.parametrize(
    ("error", "options", "hint"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            [],
            ", or let dslm down --refine 0 take no steps",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ["--refine", "0"], ""),
        (MemoryError(), ["--method", "slice"], ""),
    ],
)
def test_too_little_memory_says_what_to_lower(call, tmp_path, monkeypatch, error, options, hint):
    def full(*args, **named):
        raise error

    monkeypatch.setattr(dslm.shrink.approximate, "rebuild", full)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("-upd", "2", "-o", "out", *FITTED, "--calibration", "text.txt", "-q", *options)
    assert (code, out) == (1, "")
    told = one_line(err)
    assert re.search(r"the memory is not enough to shrink block by block on \d+ windows of \d+ tokens", told)
    assert told.rstrip().endswith(f"lower --samples or --sequence-length{hint}")
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
