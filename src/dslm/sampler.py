"""A model in memory that goes on after tokens, with transformers' own sampler."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dslm.errors import DslmError
from dslm.load import check_token_ids, load_model, load_tokenizer

if TYPE_CHECKING:
    import torch

    from dslm.checkpoint.reader import Checkpoint


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


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and its tokenizer in memory.

    Attributes:
        checkpoint: what was loaded.
        model: a ``PreTrainedModel`` in evaluation mode.
        tokenizer: a transformers tokenizer.
        own: the generation config that came with the model; its end and padding tokens are obeyed.
    """

    checkpoint: Checkpoint
    model: Any
    tokenizer: Any
    own: Any

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text in the model's own settings."""
        eos = self.own.eos_token_id
        if eos is None:
            return []
        return eos if isinstance(eos, list) else [eos]

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """Of the numbers it computes with."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context(self) -> int | None:
        """How many tokens the model can see at once; None if its config does not say."""
        return self.checkpoint.context

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text, with the start token where the tokenizer gives one.

        Raises:
            DslmError: there are none, or the tokenizer belongs to another model.
        """
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise DslmError("the prompt is empty and the model has no start token", "give some text with -p")
        return self.known(ids)

    def known(self, ids: list[int]) -> list[int]:
        """The same tokens, if the model knows all of them.

        Raises:
            CheckpointError: the tokenizer belongs to another model.
        """
        check_token_ids(self.checkpoint.name, self.checkpoint.sizes.vocab_size, ids)
        return ids


@dataclass(frozen=True, slots=True)
class Written:
    """How a model went on.

    Attributes:
        ids: the tokens it was given and those it wrote.
        tokens: how many of them it wrote.
        text: what it wrote, special tokens left out.
        seconds: wall time of writing.
        cache: transformers' KV cache of all tokens but the last, for whoever goes on from here.
    """

    ids: list[int]
    tokens: int
    text: str
    seconds: float
    cache: Any


def load(checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model and its tokenizer.

    Args:
        checkpoint: the model, opened with its weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: ``auto`` (that of the checkpoint), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        DslmError: there is no such device.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, dtype=dtype, device=device)
    return Loaded(checkpoint, model, tokenizer, model.generation_config)


def write(
    loaded: Loaded,
    ids: list[int],
    count: int,
    sampling: Sampling,
    *,
    stops: Collection[int] = (),
    on_text: Callable[[str], None] | None = None,
    echo: bool = False,
    stop: Callable[[], bool] | None = None,
    cache: Any = None,
) -> Written:
    """Go on after tokens.

    Args:
        loaded: the model.
        ids: the tokens to continue.
        count: write at most this many more; the caller sees to it that the context holds them.
        sampling: how to draw them.
        stops: tokens that end the text, beside those of the model's own settings; they are no part of it, special
            or not.
        on_text: called with each piece of text as soon as it is final.
        echo: whether ``on_text`` is given the text of ``ids`` first.
        stop: asked after every token; True ends the text there.
        cache: transformers' KV cache of the first tokens of ``ids``; it is filled further.
    """
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    # Set and not passed: what is passed is completed with the model's own settings, its sampling too.
    model.generation_config = _generation_config(loaded, count, sampling, stops)
    # Decoded together and cut: decoded alone, many tokenizers would drop the space at the start.
    head = tokenizer.decode(ids, skip_special_tokens=True)
    torch.manual_seed(sampling.seed % 2**64)  # the generator takes no more bits
    inputs = torch.tensor([ids], device=model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=_streamer(tokenizer, on_text, 0 if echo else len(head), stops) if on_text else None,
            stopping_criteria=_criteria(stop) if stop else None,
            past_key_values=cache,
            return_dict_in_generate=True,
        )
    seconds = time.perf_counter() - begin
    whole: list[int] = output.sequences[0].tolist()
    said = whole[:-1] if len(whole) > len(ids) and whole[-1] in stops else whole
    text = tokenizer.decode(said, skip_special_tokens=True)[len(head) :]
    return Written(whole, len(whole) - len(ids), text, seconds, output.past_key_values)


def _generation_config(loaded: Loaded, tokens: int, sampling: Sampling, stops: Collection[int]) -> Any:
    """The stop and padding tokens of the model's own settings, everything else as asked for."""
    from transformers import GenerationConfig

    eos = list(dict.fromkeys([*loaded.end_tokens, *stops]))
    pad = loaded.own.pad_token_id
    if pad is None and eos:
        pad = eos[0]
    drawing: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    return GenerationConfig(
        max_new_tokens=tokens,
        bos_token_id=loaded.own.bos_token_id,
        eos_token_id=eos or None,
        pad_token_id=pad,
        **drawing,
    )


def _streamer(tokenizer: Any, on_text: Callable[[str], None], skipped: int, stops: Collection[int]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Hands final text to a callback instead of printing it, without its first ``skipped`` characters."""

        left = skipped

        def put(self, value: torch.Tensor) -> None:
            """Take the prompt's tokens, then one at a time."""
            if value.numel() > 1 or int(value) not in stops:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Pass one piece of text on."""
            self.left, text = max(0, self.left - len(text)), text[self.left :]
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_special_tokens=True)


def _criteria(stop: Callable[[], bool]) -> Any:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stop(StoppingCriteria):  # type: ignore[misc]
        """Ends the text between two tokens, where an exception would come in the middle of one."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
            """Ask; one answer for each text of the batch."""
            return torch.full(input_ids.shape[:1], stop(), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Stop()])
