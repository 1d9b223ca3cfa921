"""Finding and loading tasks of lm-eval, and keeping its logs and bars to itself."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dslm.errors import MissingExtraError, RecipeError
from dslm.load import first_line
from dslm.places import expanded
from dslm.progress import Progress

_DECLARES = re.compile(r"^(task|group)[ \t]*:", re.MULTILINE)
_NOISY = ("lm_eval", "datasets", "evaluate", "huggingface_hub")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks that are ready to run.

    Attributes:
        names: as they were asked for.
        loaded: what lm-eval's task manager made of them: its tasks and groups by name.
    """

    names: tuple[str, ...]
    loaded: dict[str, dict[str, Any]]


def load_tasks(
    names: Sequence[str], *, num_fewshot: int | None = None, progress: Progress | None = None
) -> Suite:
    """Find tasks and read their data: from the hub or the cache of ``datasets``, or from where a local file says.

    Args:
        names: names of lm-eval's tasks, groups or tags; paths of task files (``tasks/mine.yaml``); or paths of
            folders (``./tasks``) whose task files are all meant.
        num_fewshot: solved examples in each prompt; None for each task's own number. A task that sets it to 0
            keeps it, as in lm-eval.
        progress: called with a label, what is read and what there is in all.

    Raises:
        MissingExtraError: lm-eval, or a package that a task needs, is not installed.
        RecipeError: there is no such task or file, it is not a task, or its data cannot be read.
    """
    specs = [spec for name in dict.fromkeys(names) for spec in _specs(name)]
    if not specs:
        raise RecipeError("no task is named", "give names of lm-eval's tasks, or paths of task files")
    tasks = _lm_eval("lm_eval.tasks")
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet(progress):
        manager = _manager(tasks, specs)
        for spec in specs:
            for kind, found in _load(manager, spec).items():
                loaded[kind].update(found)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(
                f"task {name} runs code that the model writes", "run it with lm-eval itself, in a sandbox"
            )
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return Suite(tuple(names), loaded)


def _lm_eval(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lm-eval's, about its own dependencies
            importlib.import_module("lm_eval.models.huggingface")
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            "tasks are run by lm-eval, which is not installed", "pip install 'dslm[eval]'"
        ) from error


def _specs(name: str) -> list[str]:
    """What lm-eval is to be asked for: a name, or paths."""
    if not _is_path(name):
        return [name]
    path = expanded(name)
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        found = [str(file) for file in files if _DECLARES.search(_content(file))]
        if not found:
            raise RecipeError(
                f"the folder {path} holds no task", "a task is a .yaml file with the key 'task' or 'group'"
            )
        return found
    if not path.is_file():
        raise RecipeError(f"there is no file {path}", "give a task's name or the path of its .yaml file")
    return [str(path)]


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.endswith((".yaml", ".yml"))


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _manager(tasks: Any, specs: Sequence[str]) -> Any:
    """Lm-eval's task manager, which knows every name.

    Its index of its own tasks takes seconds, and is left out where only files are named that need no other task.
    """
    paths = [Path(spec) for spec in specs if _is_path(spec)]
    groups = [path for path in paths if "group" in _DECLARES.findall(_content(path))]
    manager = tasks.TaskManager(
        include_path=sorted({path.resolve().parent for path in groups}),
        include_defaults=bool(groups) or len(paths) < len(specs),
    )
    for spec in specs:
        if not _is_path(spec) and spec not in manager.task_index:
            raise RecipeError(f"lm-eval has no task {spec!r}", _instead(manager, spec))
    return manager


def _instead(manager: Any, spec: str) -> str:
    """What somebody who names this may mean."""
    if Path(spec).is_dir():
        return f"the folder is named ./{spec}"
    if near := get_close_matches(spec, manager.all_tasks, n=3):
        return f"did you mean {' or '.join(near)}?"
    return "'lm-eval ls tasks' lists its tasks; a local one is named by its path"


def _load(manager: Any, spec: str) -> dict[str, dict[str, Any]]:
    """The tasks and groups of one name or path."""
    from huggingface_hub import constants

    try:
        loaded: dict[str, dict[str, Any]] = manager.load([_registered(manager, spec)])
    except ImportError as error:
        raise MissingExtraError(
            f"task {spec} needs a package that is not installed: {first_line(error)}",
            "install it and try again",
        ) from error
    except failures() as error:
        if _is_path(spec):
            hint = "check it; paths in it are taken from the working directory"
        elif constants.HF_HUB_OFFLINE:
            hint = "HF_HUB_OFFLINE is set: its data must be in the cache of datasets, or a local file"
        else:
            hint = "its data come from the hub: check the network, or name a local file"
        raise RecipeError(
            f"task {spec} cannot be loaded: {type(error).__name__}: {first_line(error)}", hint
        ) from error
    return loaded


def _registered(manager: Any, spec: str) -> str:
    """The name of a local group, which lm-eval cannot load by its path; anything else as it is."""
    path = Path(spec).resolve()
    entries = manager.task_index.items()
    return next((name for name, entry in entries if _is_path(spec) and entry.yaml_path == path), spec)


def failures() -> tuple[type[Exception], ...]:
    """What lm-eval, ``datasets`` and the code of tasks raise when something is missing or does not fit."""
    from huggingface_hub.errors import HTTPError
    from jinja2 import TemplateError
    from yaml import YAMLError

    datasets: Any = importlib.import_module("datasets")
    own = (HTTPError, TemplateError, YAMLError, datasets.exceptions.DatasetsError)
    usual = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)
    return (*own, *usual, AssertionError)


@contextmanager
def quiet(progress: Progress | None = None, prefix: str = "") -> Iterator[None]:
    """Keep what lm-eval prints, logs and warns off the terminal, and hand its bars to a callback.

    Args:
        progress: called with a label, what is done and what there is in all.
        prefix: of the labels.
    """
    stdout = sys.stdout

    def told(label: str, done: int, total: int) -> None:
        if progress is not None:
            with redirect_stdout(stdout):  # what a callback prints, and keeps to restore, is not lm-eval's
                progress(prefix + label, done, total)

    with ExitStack() as stack:
        # For the errors of some metrics it would start a process for every core, and print.
        stack.enter_context(_environment("DISABLE_MULTIPROC", "1"))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(_bars(told))
        if not _log.isEnabledFor(logging.DEBUG):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for name in _NOISY:
                stack.enter_context(_only_errors(logging.getLogger(name)))
        yield


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """Let every tqdm bar draw nothing and tell the callback: lm-eval has no switch for all of its bars."""
    from tqdm import tqdm

    kept: dict[str, Callable[..., Any]] = {
        name: getattr(tqdm, name) for name in ("__init__", "__iter__", "update")
    }

    def begin(bar: Any, *args: Any, **options: Any) -> None:
        kept["__init__"](bar, *args, **(options | {"disable": True}))
        bar.label = (options.get("desc") or "preparing examples").lower()

    def every(bar: Any) -> Iterator[Any]:
        for item in bar.iterable:
            yield item
            bar.update()

    def update(bar: Any, count: int = 1) -> None:
        bar.n += count
        progress(bar.label, bar.n, bar.total or 0)

    for name, stub in (("__init__", begin), ("__iter__", every), ("update", update)):
        setattr(tqdm, name, stub)
    try:
        yield
    finally:
        for name, own in kept.items():
            setattr(tqdm, name, own)
