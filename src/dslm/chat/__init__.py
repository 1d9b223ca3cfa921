"""Talking with a model: what was said, and how it is answered.

chatter = Chatter(load(checkpoint))
answer = chatter.answer(talk := Conversation(), "Hello, who are you?")
talk = talk.with_exchange("Hello, who are you?", answer.text)
"""

from dslm.chat.chatter import Answer, Chatter
from dslm.chat.conversation import Conversation, Exchange, load_conversations, payload, save_conversations

__all__ = [
    "Answer",
    "Chatter",
    "Conversation",
    "Exchange",
    "load_conversations",
    "payload",
    "save_conversations",
]
