"""A model that answers: its chat template, or plain completion where it has none."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dslm.chat.conversation import Conversation
from dslm.errors import DslmError
from dslm.sampler import Loaded, Sampling, write

_MARK = "the answer ends here"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        text: the answer; of one that was stopped, what there is of it.
        tokens: how many tokens it wrote.
        seconds: wall time of writing them.
        ending: ``end`` (the model ended it), ``length`` (there was room for no more) or ``stopped``.
        left_out: how many of the oldest exchanges the model did not see, for its context was full.
    """

    text: str
    tokens: int
    seconds: float
    ending: Literal["end", "length", "stopped"]
    left_out: int


class Chatter:
    """A loaded model that answers messages.

    It keeps the KV cache of its last answer, so that a conversation that goes on is not read again from its
    beginning. The conversation itself is the caller's.

    Args:
        loaded: the model and its tokenizer.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._stops = _stop_tokens(loaded.tokenizer)
        self._seen: list[int] = []
        self._cache: Any = None

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template; without one it goes on with the text of the conversation."""
        return bool(self.loaded.tokenizer.chat_template)

    def check_system(self, system: str) -> None:
        """Refuse a system text that the chat template cannot take.

        Raises:
            DslmError: it fails, or leaves the text out.
        """
        if not system or not self.has_template:
            return
        plain = self._rendered(Conversation(), _MARK)
        try:
            taken = self._rendered(Conversation(system), _MARK) != plain
        except DslmError:
            taken = False
        if not taken:
            raise DslmError(
                f"the chat template of {self.loaded.checkpoint.name} takes no system text",
                "say it in the first message",
            )

    def answer(
        self,
        conversation: Conversation,
        message: str,
        *,
        tokens: int = 512,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer a message.

        Where the conversation leaves less room in the model's context than the answer may need, at most half of it,
        the model does not see the oldest exchanges.

        Args:
            conversation: what was said before; it is not changed.
            message: what the user says now.
            tokens: write at most this many tokens.
            sampling: how to draw them; the defaults of `Sampling` if None.
            on_text: called with each piece of the answer as soon as it is final.
            stop: asked after every token; True ends the answer there.

        Raises:
            DslmError: the message alone is longer than the context, or the chat template fails.
        """
        ids, left_out = self._seen_by_model(conversation, message, tokens)
        count = tokens if self.loaded.context is None else min(tokens, self.loaded.context - len(ids))
        goes_on = len(self._seen) < len(ids) and ids[: len(self._seen)] == self._seen
        cache = self._cache if goes_on else None
        self._seen, self._cache = [], None  # no half-filled cache stays if this fails
        written = write(
            self.loaded,
            ids,
            count,
            sampling or Sampling(),
            stops=self._stops,
            on_text=on_text,
            stop=stop,
            cache=cache,
        )
        self._seen, self._cache = written.ids[:-1], written.cache
        ending: Literal["end", "length", "stopped"] = "stopped"
        if written.ids[-1] in {*self.loaded.end_tokens, *self._stops}:
            ending = "end"
        elif written.tokens == count:
            ending = "length"
        return Answer(written.text, written.tokens, written.seconds, ending, left_out)

    def prompt_ids(self, conversation: Conversation, message: str) -> list[int]:
        """The tokens the model is given to answer a message.

        Raises:
            DslmError: the chat template fails.
        """
        if not self.has_template:
            return self.loaded.text_ids(_plain_text(conversation, message))
        text = self._rendered(conversation, message)
        # The template has written every special token itself, the first one too.
        ids: list[int] = self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.loaded.known(ids)

    def _seen_by_model(self, conversation: Conversation, message: str, tokens: int) -> tuple[list[int], int]:
        """The tokens the model is given, and how many of the oldest exchanges are not among them."""
        context = self.loaded.context
        if context is None:
            return self.prompt_ids(conversation, message), 0
        room = context - min(tokens, context // 2)

        def fits(left_out: int) -> bool:
            return len(self.prompt_ids(conversation.without_oldest(left_out), message)) <= room

        left_out = bisect_left(range(len(conversation.exchanges)), True, key=fits)
        ids = self.prompt_ids(conversation.without_oldest(left_out), message)
        if len(ids) >= context:
            raise DslmError(
                f"message and system text have {len(ids)} tokens, the model's context {context}",
                "shorten them",
            )
        return ids, left_out

    def _rendered(self, conversation: Conversation, message: str) -> str:
        """The chat template's text, up to where the answer begins."""
        messages = [*conversation.messages(), {"role": "user", "content": message}]
        return _render(self.loaded.tokenizer, messages, self.loaded.checkpoint.name)


def _plain_text(conversation: Conversation, message: str) -> str:
    """One running text, as a model that knows no turns reads it: each message begins a line, the answer goes on."""
    lines = [conversation.system] if conversation.system else []
    lines += [exchange.message + exchange.answer for exchange in conversation.exchanges]
    return "\n".join([*lines, message])


def _render(tokenizer: Any, messages: list[dict[str, str]], name: str, *, ask: bool = True) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, TypeError, ValueError) as error:
        raise DslmError(f"the chat template of {name} fails: {error}") from error
    return text


def _stop_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end token, and the token that its chat template writes after an answer.

    They differ where a model was tuned to chat with the tokenizer of its base model.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if not tokenizer.chat_template:
        return frozenset(ends)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        _, _, after = _render(tokenizer, messages, "", ask=False).partition(_MARK)
    except DslmError:  # it will say so when it is used
        return frozenset(ends)
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
    return frozenset(ends | {token for token in ids[:1] if token in tokenizer.added_tokens_decoder})
