"""The command line: how fast it starts, that every failure is one line, and what it says of a model."""

import json
import os
import subprocess
import sys

import pytest

import calling
import pico
from calling import one_line
from dslm.checkpoint.reader import open_folder
from dslm.cli import main as cli_main
from dslm.cli.common import print_json
from dslm.cli.desc import describe_checkpoint
from dslm.cli.main import COMMANDS
from dslm.errors import DslmError
from dslm.report.tables import short_bytes, short_count
from dslm.sizes import count_parameters

bare, call = calling.bare, calling.call  # fixtures


def in_subprocess(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


# --- starting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["desc", "MODEL"], ["desc", "MODEL", "--json"], ["gen", "--help"], ["diff", "--help"]],
)
def test_starting_imports_neither_torch_nor_transformers(bare, arguments):
    arguments = [str(bare) if a == "MODEL" else a for a in arguments]
    done = in_subprocess(
        "import sys\n"
        "from dslm.cli.main import run\n"
        f"code = run({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("asked", "spins"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_wait_for_each_other_for_a_moment_only_unless_asked(asked, spins):
    unset = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = (
        "import os, sys\n"
        "from dslm.cli.main import main\n"
        "sys.argv = ['dslm', '--version']\n"
        "try:\n    main()\nfinally:\n    print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=unset | asked, check=True
    )
    assert done.stdout.splitlines()[-1] == spins


def test_help_lists_every_command_and_imports_none():
    homes = {home for home, _ in COMMANDS.values()}
    done = in_subprocess(
        f"import sys\nfrom dslm.cli.main import run\nrun(['--help'])\nassert not {homes} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    for name, (_, text) in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(call, name):
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    assert "--json" in out
    assert "--quiet" in out


def test_version_and_bare_call(call):
    assert call("--version")[1].startswith("dslm ")
    code, out, _ = call()
    assert code == 0
    assert "Commands" in out


def test_the_commands_are_where_the_table_says():
    assert cli_main.cli.list_commands(None) == list(COMMANDS)


# --- failing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nope"], "no command 'nope'"),
        (["dsec", "x"], "did you mean 'desc'?"),
        (["desc"], "MODEL is missing"),
        (["desc", "x", "-i", "y"], "MODEL is given twice"),
        (["desc", "x", "--nope"], "No such option"),
        (["gen", "x", "--temperature", "-1"], "--temperature"),
        (["gen", "x", "--top-p", "0"], "--top-p"),
        (["gen", "x", "--top-p", "1.1"], "--top-p"),
        (["gen", "x", "--top-k", "-1"], "--top-k"),
        (["gen", "x", "-n", "0"], "--n-predict"),
        (["gen", "x", "--device", "tpu"], "--device"),
        (["diff", "x"], "B"),
        (["diff", "x", "y", "--min-agreement", "99"], "--min-agreement"),
        (["diff", "x", "y", "--require-alive", "--no-liveness"], "--no-liveness"),
        (["diff", "x", "y", "--text", "gone.txt"], "there is no such file"),
        (["gen", "x", "-p", "w3 \udcff"], "'w3 ?' is not UTF-8 text"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(call, arguments, expected):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert expected in one_line(err)


def test_the_home_folder_is_known_behind_an_option(call, bare, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call("up", bare, "--output=~/wide", "-upm", 2, "-q")
    assert code == 0, err
    assert (tmp_path / "wide" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    assert call("up", bare, "-o", "~nobody-here", "-upm", 2, "-q")[0] == 0
    assert (tmp_path / "~nobody-here").is_dir()
    *_, err = call("diff", bare, bare, "--text", "~5 apples", "--no-liveness")
    assert "home directory" not in err


def test_a_known_failure_is_one_line_and_1(call, tmp_path):
    code, out, err = call("desc", tmp_path / "gone")
    assert (code, out) == (1, "")
    assert one_line(err).startswith("dslm: error: ")
    assert "gone does not exist" in err


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (DslmError("it broke\nin two", "mend it"), 1, "dslm: error: it broke in two; mend it"),
        (OSError(28, "No space left on device", "/x"), 1, "dslm: error: No space left on device: /x"),
        (PermissionError(13, "Permission denied", "/x"), 1, "dslm: error: Permission denied: /x"),
        (ValueError("odd"), 1, "dslm: error: unexpected ValueError: odd; set DSLM_DEBUG=1"),
        (MemoryError(), 1, "dslm: error: the memory is not enough; take a machine with more of it"),
        (RuntimeError("CUDA out of memory."), 1, "dslm: error: the memory is not enough; take a machine"),
        (KeyboardInterrupt(), 130, "dslm: interrupted; no unfinished output is left"),
    ],
)
def test_failures_inside_a_command(call, monkeypatch, bare, error, code, expected):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("dslm.cli.desc.open_model", fail)
    found, out, err = call("desc", bare)
    assert (found, out) == (code, "")
    assert expected in one_line(err.lstrip("\n"))


def test_a_traceback_only_with_debug(call, monkeypatch, tmp_path):
    monkeypatch.setenv("DSLM_DEBUG", "1")
    code, _, err = call("desc", tmp_path / "gone")
    assert code == 1
    assert "Traceback" in err


def test_a_reader_that_leaves_is_no_failure(bare):
    command = f"{sys.executable} -m dslm.cli.main desc {bare} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "bare"
    assert done.stderr == ""


# --- desc --------------------------------------------------------------------------------------------------


def test_desc_says_what_the_folder_holds(call, bare):
    checkpoint = open_folder(bare)
    total = sum(p.numel() for p in pico.make_model("llama", "gqa-tied").parameters())
    code, out, err = call("desc", bare)
    assert (code, err) == (0, "")
    assert f"{total:,}" in out
    assert "tied: input and output share one table" in out
    code, out, _ = call("desc", "-i", bare, "--json")
    facts = json.loads(out)
    assert facts["schema"] == 1
    assert facts["parameters"] == count_parameters(checkpoint.family, checkpoint.config)
    assert facts["parameters"]["total"] == total
    assert facts["bytes"] == total * 4
    assert facts["files"] == 1
    assert facts["context_length"] == pico.POSITIONS
    assert facts["kv_cache_bytes_per_token"] == 2 * 3 * 2 * 8 * 4
    assert facts["sliding_window"] is None


@pytest.mark.parametrize(
    ("family", "variant", "layers"),
    [
        ("mistral", "window", 3),
        ("mistral", "no-window", None),
        ("qwen2", "windows", 2),
        ("qwen2", "mha", None),
        ("gemma3_text", "windows", 2),
        ("gemma3_text", "all-sliding", 3),
        ("phi3", "window", 3),
        ("llama", "mha", None),
    ],
)
def test_desc_counts_sliding_windows(tmp_path, family, variant, layers):
    model = pico.make_model(family, variant)
    facts = describe_checkpoint(open_folder(pico.save(model, tmp_path / "m")))
    found = facts["sliding_window"]
    assert (found and found["layers"]) == layers


def test_numbers_for_people():
    assert [short_bytes(n) for n in (0, 999, 1000, 23_040, 269e6, 1.08e9, 2.15e12)] == [
        "0 B", "999 B", "1 kB", "23 kB", "269 MB", "1.08 GB", "2.15 TB",
    ]  # fmt: skip
    assert [short_count(n) for n in (999, 1500, 134_515_008, 1.71e9)] == ["999", "1.5k", "134.5M", "1.71B"]


def test_json_is_always_json(capsys):
    print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": "é"}})
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "a": None, "b": [None, 1.5], "c": {"d": "é"}}
