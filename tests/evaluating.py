"""Evaluating in a test: texts of known words, a second model, and tasks of lm-eval in local files."""

import json

import pytest

import pico
from tokenizing import add_tokenizer

LENGTH = 16
OTHER = 14  # a seed whose model answers differently, in every way that is counted
EXAMPLES = [
    {"question": "w5 w6 w7", "choices": ["w8", "w9", "w10"], "answer": 0},
    {"question": "w20 w21", "choices": ["w30 w31 w32", "w40", "w41 w42"], "answer": 1},
    {"question": "w33", "choices": ["w12 w13", "w14", "w15 w16"], "answer": 2},
    {"question": "w50 w51 w52 w53", "choices": ["w60", "w61 w62", "w63"], "answer": 1},
    {"question": "w70 w3", "choices": ["w4 w4", "w80", "w81 w82"], "answer": 0},
    {"question": "w71 w72 w73", "choices": ["w83", "w84 w85", "w86 w87"], "answer": 2},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""
GROUP = """\
group: both
task: [first, second]
aggregate_metric_list:
  - metric: acc_norm
    weight_by_size: {weigh}
"""


def words(count, seed=0):
    """A text of so many tokens."""
    return " ".join(f"w{i}" for i in pico.tokens(seed, rows=1, length=count)[0].tolist())


def ids_of(text):
    """The tokens of such a text."""
    return [int(word[1:]) for word in text.split()]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model with the tokenizer of `calling.model`."""
    network = pico.make_model("llama", "gqa-tied", seed=OTHER)
    folder = pico.save(network, tmp_path_factory.mktemp("other") / "other")
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model whose tokenizer knows fewer words."""
    folder = pico.save(pico.make_model("llama", "mha"), tmp_path_factory.mktemp("foreign") / "foreign")
    add_tokenizer(folder, words=50)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Data sets are kept in the test's own folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks of different sizes, and one that predicts texts."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, examples in (("first", EXAMPLES[:4]), ("second", EXAMPLES[4:])):
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(example) + "\n" for example in examples))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (folder / "rolling.yaml").write_text(ROLLING.format(data=folder / "first.json"))
    (folder / "_template.yaml").write_text("output_type: multiple_choice\n")
    return folder
