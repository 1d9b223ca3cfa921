"""What the stock transformers class would save for a config: the reference for names, shapes and dtypes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from dslm.errors import CheckpointError, DslmError, SizeError


@contextmanager
def refused_config(kind: type[DslmError], hint: str) -> Iterator[None]:
    """Tell what config and model classes raise at a config's values as an error of ours.

    Raises:
        DslmError: of that kind.
    """
    from huggingface_hub.errors import StrictDataclassError

    known = (ValueError, TypeError, KeyError, AttributeError, AssertionError, StrictDataclassError)
    try:
        yield
    except known as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise kind(f"transformers refuses the config: {reason[0].strip()}", hint) from error


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of every tensor, from the model class on the meta device: no memory, no weights.

    Raises:
        SizeError: the config class refuses the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    values = {key: value for key, value in config.items() if key != "model_type"}
    with refused_config(SizeError, "choose other sizes, or mend the source"):
        parsed = AutoConfig.for_model(config["model_type"], **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def stored_parameters(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """The parameters of a loaded model by the names that their tensors have on disk.

    Args:
        model: a transformers model.
        names: on disk.

    Raises:
        CheckpointError: one is not a parameter of the model, but made of several or a part of one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Values pass through by identity where loading only renamed them, which holds for every family we know.
    held = {id(parameter) for parameter in model.parameters()}
    on_disk = revert_weight_conversion(model, dict(model.named_parameters()))
    found = {}
    for name in names:
        found[name] = on_disk.get(name)
        if id(found[name]) not in held:
            raise CheckpointError(f"transformers does not hold {name!r} as one parameter")
    return found


def check_against_oracle(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint is exactly what the stock class expects.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape. That is a bug in a family table.
        SizeError: the config class refuses the config.
    """
    expected = expected_shapes(config)
    for name in sorted(set(expected) | set(shapes)):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{name!r} is {shapes.get(name)} here and {expected.get(name)} in transformers",
                "nothing was written; please report this",
            )


@contextmanager
def checking_beside(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Future[None]]:
    """`check_against_oracle` beside other work, because importing transformers costs as much as a small resize.

    Where transformers is imported already the check takes milliseconds and comes first. Elsewhere a forked process
    does it: it shares the imported torch, and its import of transformers runs on a core of its own, which torch
    leaves to it meanwhile. (A thread would fight for the interpreter lock.)

    Yields:
        The verdict: its ``result()`` raises what the check raised. Ask for it before what was checked is used.
    """
    if "transformers" in sys.modules or not sys.platform.startswith("linux"):
        check_against_oracle(config, shapes)
        passed: Future[None] = Future()
        passed.set_result(None)
        yield passed
        return
    import torch

    threads = torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, mp_context=context, initializer=ignore_interrupts) as helper:
        verdict: Future[None] = helper.submit(check_against_oracle, config, shapes)
        torch.set_num_threads(max(1, threads - 1))
        try:
            yield verdict
        finally:
            torch.set_num_threads(threads)
