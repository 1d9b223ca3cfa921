"""Text from a model: one prompt, continued."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dslm.errors import DslmError
from dslm.sampler import Loaded, Sampling, load, write

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint

log = logging.getLogger(__name__)

DEFAULT_PROMPT = "The capital of France is"


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote.

    Attributes:
        prompt: what it was given.
        text: what it wrote after the prompt.
        tokens: how many tokens it wrote.
        seconds: wall time of writing them, loading not included.
        seed: what the sampler started from; the same seed gives the same text on the same machine.
        device: where it ran.
        dtype: of the numbers it computed with.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float
    seed: int
    device: str
    dtype: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def generate(
    checkpoint: Checkpoint,
    prompt: str = DEFAULT_PROMPT,
    *,
    tokens: int = 100,
    sampling: Sampling | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        checkpoint: the model, opened with its weights.
        prompt: the text to continue.
        tokens: write at most this many tokens.
        sampling: how to draw them; the defaults of `Sampling` if None.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: ``auto`` (that of the checkpoint), ``float32``, ``bfloat16`` or ``float16``.
        on_text: called with each piece of text, the prompt's first, as soon as it is final.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        DslmError: no such device, or the prompt is empty or longer than the model's context.
    """
    sampling = sampling or Sampling()
    loaded = load(checkpoint, device=device, dtype=dtype)
    ids = loaded.text_ids(prompt)
    written = write(loaded, ids, _fit(loaded, ids, tokens), sampling, on_text=on_text, echo=True)
    return Generation(
        prompt=prompt,
        text=written.text,
        tokens=written.tokens,
        seconds=written.seconds,
        seed=sampling.seed,
        device=loaded.device,
        dtype=loaded.dtype,
    )


def _fit(loaded: Loaded, ids: list[int], tokens: int) -> int:
    """How many tokens may be written before the model's context is full."""
    context = loaded.context
    if context is None or len(ids) + tokens <= context:
        return tokens
    if len(ids) >= context:
        raise DslmError(
            f"the prompt has {len(ids)} tokens, the model's context {context}", "shorten the prompt"
        )
    log.warning("the context of %d tokens is full after %d new tokens", context, context - len(ids))
    return context - len(ids)
