"""Checkpoints on the Hugging Face hub: described from kilobytes, downloaded once they are known to fit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dslm.checkpoint.headers import Entry, read_json
from dslm.checkpoint.reader import Checkpoint, describe, open_folder
from dslm.errors import CheckpointError
from dslm.families import family_of
from dslm.progress import Progress

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE_WEIGHTS = [
    "config.json", "generation_config.json", "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
]  # fmt: skip


def open_hub(model: str, *, weights: bool = True, progress: Progress | None = None) -> Checkpoint:
    """Open a hub id; without a network, what the hub's own cache holds of it.

    The config and the safetensors headers are fetched and judged first, so that a model that cannot be
    resized is refused before its weights are downloaded.

    Args:
        model: ``owner/name`` or ``owner/name@revision``.
        weights: False returns the description alone, with no file behind it.
        progress: called with bytes while weights are downloaded.

    Raises:
        CheckpointError: the model is not there, not open to this user, not in safetensors, or out of reach.
        UnsupportedFamilyError: the family, a config key or a tensor is unknown.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    repo, _, tag = model.partition("@")
    revision = tag or None
    with _explained(model):
        try:
            info = HfApi().model_info(repo, revision=revision)
        except HfHubHTTPError:
            raise
        except (
            HTTPError,
            OfflineModeIsEnabled,
        ) as error:  # no network: HTTPError is the client's own base class
            return _open_cached(model, repo, revision, error)
        _check_files(model, [sibling.rfilename for sibling in info.siblings or ()])
        described, files = _describe(repo, revision)
        return _download(described, files, revision, progress) if weights else described


def _check_files(model: str, files: list[str]) -> None:
    """Refuse, from its file list, a repository that holds nothing we read."""
    if "config.json" not in files:
        hint = (
            "it has .gguf files: download one and give its path"
            if _any(files, ".gguf")
            else "is it a language model?"
        )
        raise CheckpointError(f"{model} on the hub has no config.json", hint)
    if _SINGLE in files or _INDEX in files:
        return
    if _any(files, ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"):
        raise CheckpointError(
            f"{model} on the hub has only pickled weights, which can run code when opened",
            "look for a revision with safetensors (owner/name@refs/pr/N), or convert it with save_pretrained",
        )
    raise CheckpointError(
        f"{model} on the hub has neither {_SINGLE} nor {_INDEX}", "give a model with safetensors weights"
    )


def _any(files: list[str], *endings: str) -> bool:
    return any(file.endswith(endings) for file in files)


def _describe(repo: str, revision: str | None) -> tuple[Checkpoint, list[str]]:
    """The model's description, from its config and its headers, and the names of the files that hold it."""
    from huggingface_hub import HfApi, hf_hub_download

    with _without_bars():
        config = read_json(Path(hf_hub_download(repo, "config.json", revision=revision)))
        family = family_of(config)
        metadata = HfApi().get_safetensors_metadata(repo, revision=revision)
    entries = {
        name: Entry(name, str(tensor.dtype), tuple(tensor.shape), None, *tensor.data_offsets)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    files = sorted(metadata.files_metadata) + ([_INDEX] if metadata.sharded else [])
    return describe(repo, None, config, family, entries), files


def _download(
    described: Checkpoint, files: list[str], revision: str | None, progress: Progress | None
) -> Checkpoint:
    """Fetch weights and what belongs to them into the hub's cache; what was broken off is resumed."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        described.name,
        revision=revision,
        allow_patterns=[*_BESIDE_WEIGHTS, *files],
        tqdm_class=_bars(f"downloading {described.name}", described.nbytes, progress),
    )
    return open_folder(Path(folder), name=described.name)


def _open_cached(model: str, repo: str, revision: str | None, failure: Exception) -> Checkpoint:
    """The snapshot that an earlier download left in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(failure, OfflineModeIsEnabled):
        why, hint = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it, or give a local folder"
    else:
        why, hint = f"the hub cannot be reached ({failure})", "check the network, or give a local folder"
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=["config.json"], local_files_only=True
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is neither a folder here nor in the hub's cache, and {why}", hint
        ) from error
    try:
        return open_folder(Path(folder), name=repo)
    except CheckpointError as error:
        raise CheckpointError(
            f"{model} is not whole in the hub's cache ({error.message}), and {why}", hint
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the library's own progress bars, and leave them as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def _bars(what: str, total: int, progress: Progress | None) -> type[Any]:
    """A progress bar class for the library that draws nothing and calls ``progress`` with bytes."""
    from tqdm.auto import tqdm  # not the library's own, which is silent where its bars are switched off

    furthest = 0

    class Bars(tqdm):  # type: ignore[misc]
        """Passes on bytes: the library has a bar for what came in and one for what is written."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            shown: bool | None = super().update(n)
            if progress and self.unit == "B" and self.n > furthest:
                furthest = int(self.n)
                progress(what, min(furthest, total), total)
            return shown

    return Bars


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn each way in which the hub says no into one clear line."""
    from huggingface_hub import errors as hub

    there = "check the spelling (owner/name); for a private model set HF_TOKEN or run 'hf auth login'"
    try:
        yield
    except hub.GatedRepoError as error:
        page = f"https://huggingface.co/{model.partition('@')[0]}"
        raise CheckpointError(
            f"{model} is gated", f"accept its terms at {page}, then set HF_TOKEN or run 'hf auth login'"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the hub has no such revision", "check the part after @") from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(f"{model} is neither a folder here nor a model on the hub", there) from error
    except hub.HFValidationError as error:
        raise CheckpointError(f"{model!r} is not a valid hub id: {error}", "write owner/name") from error
    except hub.SafetensorsParsingError as error:
        raise CheckpointError(
            f"{model} on the hub has a damaged safetensors header: {error}", "tell its owner"
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise _broken(model, error) from error
    except (hub.NotASafetensorsRepoError, hub.EntryNotFoundError) as error:
        raise CheckpointError(
            f"{model} on the hub lacks a file: {error}", "try again, or give another revision"
        ) from error
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        hint = there if status in (401, 403) else "try again later"
        raise CheckpointError(f"the hub answered {status} for {model}", hint) from error
    except (hub.HTTPError, hub.OfflineModeIsEnabled) as error:
        raise _broken(model, error) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot store {model} in the hub's cache: {error}",
            "free some space, or set HF_HOME to another disk",
        ) from error


def _broken(model: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the connection to the hub broke while {model} was fetched: {error}",
        "run the same command again; what was downloaded is kept",
    )
