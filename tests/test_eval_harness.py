"""Tasks of lm-eval that are missing, broken or cannot be run, and that nothing of lm-eval's noise gets through."""

import logging
import os
import sys

import pytest
import torch

import calling
import evaluating
import pico
from calling import one_line
from dslm.checkpoint.reader import open_folder
from dslm.errors import MissingExtraError, RecipeError, VerificationError
from dslm.verify import harness
from dslm.verify.harness import load_tasks, quiet
from dslm.verify.tasks import evaluate_tasks
from evaluating import TASK
from tokenizing import add_tokenizer

pytest.importorskip("lm_eval")
model, call = calling.model, calling.call  # fixtures
cache, tasks = evaluating.cache, evaluating.tasks  # fixtures


@pytest.fixture(scope="module")
def named():
    """A task manager of lm-eval's own names, built once."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("arc_easi", "lm-eval has no task 'arc_easi'; did you mean arc_easy"),
        ("qqqqzzzz", "lm-eval has no task 'qqqqzzzz'; 'lm-eval ls tasks' lists"),
        ("tests", "lm-eval has no task 'tests'; the folder is named ./tests"),
        ("arc_easy", "task arc_easy cannot be loaded: .*; HF_HUB_OFFLINE is set"),
    ],
)
def test_a_name_that_cannot_be_loaded(named, monkeypatch, tmp_path, name, said):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: named)
    with pytest.raises(RecipeError, match=said) as caught:
        load_tasks([name])
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "keys.yaml": ("greeting: hello\n", "cannot be loaded: ValueError: Unknown config shape"),
    "broken.yaml": ("task: [\n", "cannot be loaded: "),
    "list.yaml": ("- task\n", "cannot be loaded: ValueError: Expected YAML dict"),
    "data.yaml": (
        TASK.format(name="data", data="gone.json"),
        "paths in it are taken from the working directory",
    ),
    "unsafe.yaml": ("unsafe_code: true\n" + TASK, "task unsafe runs code that the model writes"),
    "package.yaml": (TASK + "process_docs: !function helper.docs\n", "needs a package that is not installed"),
    "gone.yaml": (None, "there is no file"),
    "gone/": (None, "there is no file"),
    "empty/": ("", "holds no task; a task is a .yaml file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_task_file_is_refused(call, model, tasks, tmp_path, name):
    content, said = BAD_FILES[name]
    (tmp_path / "helper.py").write_text("import no_such_package\n")
    if content == "":
        (tmp_path / name).mkdir()
    elif content is not None:
        if "{data}" in content:
            content = content.format(name=name.partition(".")[0], data=tasks / "first.json")
        (tmp_path / name).write_text(content)
    code, out, err = call("eval", model, "--tasks", f"{tmp_path}/{name}")
    assert (code, out) == (1, "")
    assert said in one_line(err)
    assert "unexpected" not in err


def test_no_task_is_refused(call, model):
    code, _, err = call("eval", model, "--tasks", " , ")
    assert code == 1
    assert "no task is named" in one_line(err)


def test_lm_eval_that_is_missing_is_named(call, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError) as caught:
        load_tasks(["arc_easy"])
    assert caught.value.hint == "pip install 'dslm[eval]'"
    code, out, err = call("eval", model, "--tasks", "arc_easy")
    assert (code, out) == (1, "")
    assert "which is not installed; pip install 'dslm[eval]'" in one_line(err)


def test_answers_that_are_no_numbers_are_refused(tmp_path, tasks):
    network = pico.make_model("llama", "mha")
    with torch.no_grad():
        network.lm_head.weight.fill_(float("nan"))
    folder = pico.save(network, tmp_path / "broken")
    add_tokenizer(folder)
    with pytest.raises(VerificationError, match="broken gives logits that are NaN, in task first"):
        evaluate_tasks(open_folder(folder), load_tasks([f"{tasks}/first.yaml"]), device="cpu")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory"), "batches of 3 examples do not fit into memory; take a smaller"),
        (AssertionError("too long"), "lm-eval cannot run these tasks on tiny: AssertionError: too long"),
    ],
)
def test_a_failing_run_is_one_line(model, tasks, monkeypatch, error, said):
    def fail(**options):
        raise error

    suite = load_tasks([f"{tasks}/first.yaml"])
    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    with pytest.raises(Exception, match=said):
        evaluate_tasks(open_folder(model), suite, batch_size=3, device="cpu")


def test_settings_of_other_libraries_are_left_as_they_were(monkeypatch):
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    levels = {name: logging.getLogger(name).level for name in harness._NOISY}
    with pytest.raises(KeyboardInterrupt), quiet():
        raise KeyboardInterrupt
    assert {name: logging.getLogger(name).level for name in harness._NOISY} == levels
    assert "DISABLE_MULTIPROC" not in os.environ


def test_bars_go_to_the_callback_and_nowhere_else(capsys):
    from tqdm import tqdm

    told = []
    with quiet(lambda *a: told.append(a), "tiny: "):
        print("noise")
        for _ in tqdm(range(2), desc="Running", disable=False):
            pass
        bar = tqdm(total=3)
        bar.update(3)
        bar.close()
    assert told == [("tiny: running", 1, 2), ("tiny: running", 2, 2), ("tiny: preparing examples", 3, 3)]
    assert capsys.readouterr() == ("", "")
    list(tqdm(range(2), desc="after"))
    assert "after: 100%" in capsys.readouterr().err


def test_a_callback_has_the_terminal_for_itself(capsys):
    """A drawn bar takes stdout when it begins, and gives it back later than lm-eval does."""
    from tqdm import tqdm

    kept = []

    def draw(label, done, total):
        kept.append(sys.stdout)
        print("drawn")

    own = sys.stdout
    with quiet(draw):
        list(tqdm(range(1)))
    assert kept == [own]
    assert sys.stdout is own
    assert capsys.readouterr().out == "drawn\n"
