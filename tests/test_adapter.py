"""Adapters beside a model: gen, chat and eval use both, and what does not belong together is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings

import peft
import pytest
import torch

import calling
import pico
from growing import load
from tokenizing import add_tokenizer

call, model = calling.call, calling.model  # fixtures


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """Adapters with random numbers for the model."""
    return saved_adapter(load(model, torch.float32), tmp_path_factory.mktemp("adapter") / "lora")


def saved_adapter(base, folder):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about transformers
        peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(model, adapter, tmp_path_factory):
    """The two as one plain model, made by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about transformers
        whole = peft.PeftModel.from_pretrained(load(model, torch.float32), adapter).merge_and_unload()
    folder = pico.save(whole, tmp_path_factory.mktemp("merged") / "merged")
    add_tokenizer(folder)
    return folder


def test_eval_measures_the_adapted_model(call, model, adapter, merged, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i * i % 90}" for i in range(300)))
    found = {}
    for name, command in (
        ("plain", [model]),
        ("adapted", [model, "--adapter", adapter]),
        ("merged", [merged]),
    ):
        code, out, _ = call("eval", *command, "--text", text, "--sequence-length", "32", "--json")
        assert code == 0
        found[name] = json.loads(out)["text"]["model"]["perplexity"]["value"]
    assert found["adapted"] == pytest.approx(found["merged"], rel=1e-4)
    assert abs(found["adapted"] / found["plain"] - 1) > 0.01


def test_gen_writes_what_the_merged_model_writes(call, model, adapter, merged):
    written = []
    for command in ([model, "--adapter", adapter], [merged], [model]):
        options = ["-p", "w5 w6 w7", "--temperature", "0", "-n", "12", "--json"]
        code, out, _ = call("gen", *command, *options)
        assert code == 0
        written.append(json.loads(out)["text"])
    assert written[0] == written[1] != written[2]


def test_chat_compares_the_model_with_and_without(call, model, adapter, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w5 w6\n")))
    options = ["--temperature", "0", "-n", "8", "--seed", "0", "--json"]
    code, out, _ = call("chat", model, "--adapter", adapter, "--against", model, *options)
    talks = json.loads(out)["conversations"]
    assert code == 0
    assert [talk["model"] for talk in talks] == ["tiny+lora", "tiny"]
    assert talks[0]["messages"][-1]["content"] != talks[1]["messages"][-1]["content"]


def test_an_adapter_is_no_model_and_a_model_no_adapter(call, model, adapter):
    code, _, err = call("gen", adapter)
    assert code == 1
    assert "is an adapter" in calling.one_line(err)
    assert "--adapter" in err
    code, _, err = call("gen", model, "--adapter", model)
    assert code == 1
    assert "no adapter" in calling.one_line(err)


def test_an_adapter_of_other_shapes_is_refused(call, model, tmp_path):
    other = saved_adapter(pico.make_model("llama", "mha"), tmp_path / "other")
    code, _, err = call("gen", model, "--adapter", other, "-q")
    assert code == 1
    assert "cannot be put on tiny" in calling.one_line(err)


def test_an_adapter_that_changes_no_layer_is_refused(call, model, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about transformers
        peft.get_peft_model(load(model, torch.float32), config).save_pretrained(tmp_path / "prompt")
    code, _, err = call("eval", model, "--adapter", tmp_path / "prompt", "-q")
    assert code == 1
    assert "prompt changes no layer of a model" in calling.one_line(err)


def test_an_adapter_that_was_trained_on_another_model_is_refused_by_its_record(
    call, model, adapter, tmp_path
):
    folder = shutil.copytree(adapter, tmp_path / "lora")
    (folder / "dslm.json").write_text(json.dumps({"trained": [{"base_headers_sha256": "0" * 64}]}))
    code, _, err = call("eval", model, "--adapter", folder)
    assert code == 1
    assert "trained on another model than tiny" in calling.one_line(err)
