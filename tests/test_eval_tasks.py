"""``dslm eval --tasks``: lm-eval on local files, against a computation by hand."""

import json

import numpy as np
import pytest
import torch

import calling
import evaluating
import pico
from dslm.checkpoint.reader import open_folder
from dslm.verify.harness import load_tasks
from dslm.verify.perplexity import evaluate_text
from dslm.verify.tasks import evaluate_tasks
from evaluating import EXAMPLES, GROUP, OTHER, ids_of

pytest.importorskip("lm_eval")
model, call = calling.model, calling.call  # fixtures
cache, other, tasks = evaluating.cache, evaluating.other, evaluating.tasks  # fixtures


def right(seed, examples):
    """Whether each example is answered rightly, by likelihood and by likelihood per character."""
    network = pico.make_model("llama", "gqa-tied", seed=seed)
    found = []
    for example in examples:
        begin = ids_of(example["question"])
        likelihoods = []
        for choice in example["choices"]:
            ids = torch.tensor([[*begin, *ids_of(choice)]])
            with torch.no_grad():
                logs = network(ids).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(len(begin), ids.shape[1])))
        lengths = [len(choice) for choice in example["choices"]]
        per_character = np.array(likelihoods) / lengths
        found.append(
            [np.argmax(likelihoods) == example["answer"], np.argmax(per_character) == example["answer"]]
        )
    return np.array(found, dtype=float)


def by_name(report):
    return {(score.task, score.metric): score for score in report.scores}


def test_accuracies_are_those_by_hand(model, other, tasks):
    suite = load_tasks([f"{tasks}/first.yaml"])
    report = evaluate_tasks(open_folder(model), suite, against=open_folder(other), device="cpu")
    mine, theirs = right(0, EXAMPLES[:4]), right(OTHER, EXAMPLES[:4])
    assert (mine != theirs).any(axis=0).all()  # or nothing would be tested
    scores = by_name(report)
    assert list(scores) == [("first", "acc"), ("first", "acc_norm")]
    for column, score in enumerate(scores.values()):
        a, b = mine[:, column], theirs[:, column]
        assert (score.examples, score.shots, score.higher_is_better) == (4, 0, True)
        assert score.model.value == pytest.approx(a.mean())
        assert score.model.error == pytest.approx(a.std(ddof=1) / 2)
        assert score.against.value == pytest.approx(b.mean())
        assert score.difference.value == pytest.approx(a.mean() - b.mean())
        assert score.difference.error == pytest.approx((a - b).std(ddof=1) / 2)
        assert score.paired


@pytest.mark.parametrize("weigh", [True, False])
def test_a_local_group_is_paired_too(model, other, tasks, tmp_path, weigh):
    for file in tasks.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "group.yaml").write_text(GROUP.format(weigh=weigh))
    # The index of lm-eval's own tasks is not needed here, and takes seconds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", without_defaults())
        suite = load_tasks([str(tmp_path / "group.yaml")])
    report = evaluate_tasks(open_folder(model), suite, against=open_folder(other), device="cpu")
    assert [score.task for score in report.scores] == ["both", "first", "first", "second", "second"]
    scores = by_name(report)
    group, *parts = (scores[task, "acc_norm"] for task in ("both", "first", "second"))
    assert all(part.difference.value and part.difference.error for part in parts)
    shares = [4 / 6, 2 / 6] if weigh else [0.5, 0.5]
    assert group.paired
    assert group.examples == 6
    for figure in ("model", "against", "difference"):
        expected = sum(s * getattr(part, figure).value for s, part in zip(shares, parts, strict=True))
        assert getattr(group, figure).value == pytest.approx(expected)
    error = np.hypot(*(s * part.difference.error for s, part in zip(shares, parts, strict=True)))
    assert group.difference.error == pytest.approx(error)


def without_defaults():
    from lm_eval.tasks import TaskManager

    return lambda include_path, include_defaults: TaskManager(
        include_path=include_path, include_defaults=False
    )


def test_a_folder_is_all_its_tasks(call, model, tasks):
    code, out, err = call("eval", model, "--tasks", f"{tasks}/", "--limit", 2)
    assert (code, err) == (0, "")
    rows = [line.split("  ")[0] or line.split()[0].rstrip(",") for line in out.splitlines()[1:9]]
    assert rows == [
        "first (2)",
        "acc",
        "acc_norm",
        "rolling (2)",
        "bits_per_byte",
        "second (2)",
        "acc",
        "acc_norm",
    ]
    assert "  bits_per_byte, lower is better" in out
    assert "the first 2 examples of each task (in brackets how many); float32 on cpu" in out
    assert "perplexity" not in out.splitlines()[0]


def test_text_and_tasks_together_and_json(call, model, other, tasks, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(3, 90)))
    arguments = ["--against", other, "--tasks", f"{tasks}/first.yaml", "--text", tmp_path / "text.txt"]
    code, out, err = call("eval", model, *arguments, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["text"]["model"]["tokens"] == 87
    assert (facts["tasks"]["model"], facts["tasks"]["against"], facts["tasks"]["limit"]) == (
        "tiny",
        "other",
        None,
    )
    score = facts["tasks"]["scores"][0]
    assert (score["task"], score["metric"], score["paired"]) == ("first", "acc", True)
    assert score["model"]["value"] == right(0, EXAMPLES[:4])[:, 0].mean()
    code, out, err = call("eval", model, *arguments)
    assert (code, err) == (0, "")
    assert "nats per token" in out
    assert "\n  acc_norm " in out
    assert "of a difference, over differences on the same examples" in out
    assert "*" not in out


def test_bits_per_byte_of_lm_eval_is_ours(model, tasks, tmp_path):
    """The two read a document in the same way, where it fits one window."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": e["question"]}) + "\n" for e in EXAMPLES[:4]))
    ours = evaluate_text(open_folder(model), rows, device="cpu").model.bits_per_byte
    report = evaluate_tasks(open_folder(model), load_tasks([f"{tasks}/rolling.yaml"]), device="cpu")
    assert by_name(report)["rolling", "bits_per_byte"].model.value == pytest.approx(ours.value, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, None])
def test_batches_change_nothing(model, tasks, batch):
    report = evaluate_tasks(
        open_folder(model), load_tasks([f"{tasks}/first.yaml"]), batch_size=batch, device="cpu"
    )
    assert [s.model.value for s in report.scores] == list(right(0, EXAMPLES[:4]).mean(axis=0))


def test_few_shot_examples_are_the_same_for_both_models(model, tasks):
    suite = load_tasks([f"{tasks}/first.yaml"], num_fewshot=2)
    report = evaluate_tasks(open_folder(model), suite, against=open_folder(model), device="cpu")
    prompts = [instance.args[0] for instance in suite.loaded["tasks"]["first"].instances]
    assert all(prompt.count("w") > 6 for prompt in prompts)
    for score in report.scores:
        assert score.shots == 2
        assert (score.difference.value, score.difference.error) == (0.0, 0.0)
