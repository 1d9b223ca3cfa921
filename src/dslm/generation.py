"""Text from a model, with transformers' own sampler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dslm.errors import DslmError
from dslm.load import load_model, load_tokenizer

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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: draw among this many of the most likely tokens; 0 means all.
        top_p: draw among the fewest tokens with this much probability together; 1 means all.
        seed: start of the random numbers.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    seed: int = 0


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
    import torch

    sampling = sampling or Sampling()
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, dtype=dtype, device=device)
    ids = _prompt_ids(tokenizer, prompt, checkpoint)
    count = _fit(ids, tokens, checkpoint)
    model.generation_config = _generation_config(model.generation_config, count, sampling)
    torch.manual_seed(sampling.seed)
    inputs = torch.tensor([ids], device=model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=_streamer(tokenizer, on_text) if on_text else None,
        )
    seconds = time.perf_counter() - begin
    # Decoded together and cut: decoded alone, many tokenizers would drop the space at the start.
    whole = tokenizer.decode(output[0], skip_special_tokens=True)
    head = tokenizer.decode(ids, skip_special_tokens=True)
    return Generation(
        prompt=prompt,
        text=whole[len(head) :],
        tokens=output.shape[1] - len(ids),
        seconds=seconds,
        seed=sampling.seed,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _prompt_ids(tokenizer: Any, prompt: str, checkpoint: Checkpoint) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise DslmError("the prompt is empty and the model has no start token", "give some text with -p")
    vocab = checkpoint.sizes.vocab_size
    if max(ids) >= vocab:
        raise DslmError(
            f"the tokenizer of {checkpoint.name} gives token {max(ids)}, and the model has {vocab}",
            "tokenizer and model do not belong together",
        )
    return ids


def _fit(ids: list[int], tokens: int, checkpoint: Checkpoint) -> int:
    """How many tokens may be written before the model's context is full."""
    family = checkpoint.family
    key = family.size_keys.get("positions", "max_position_embeddings")
    context = family.resolve(checkpoint.config).get(key)
    if not isinstance(context, int) or len(ids) + tokens <= context:
        return tokens
    if len(ids) >= context:
        raise DslmError(
            f"the prompt has {len(ids)} tokens, the model's context {context}", "shorten the prompt"
        )
    log.warning("the context of %d tokens is full after %d new tokens", context, context - len(ids))
    return context - len(ids)


def _generation_config(own: Any, tokens: int, sampling: Sampling) -> Any:
    """The stop and padding tokens of the model's own settings, everything else as asked for."""
    from transformers import GenerationConfig

    eos = own.eos_token_id
    pad = own.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) and eos else eos
    drawing: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    return GenerationConfig(
        max_new_tokens=tokens, bos_token_id=own.bos_token_id, eos_token_id=eos, pad_token_id=pad, **drawing
    )


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Hands final text to a callback instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Pass one piece of text on."""
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_special_tokens=True)
