"""The error tree: one class per kind of failure a user can meet, each with a hint.

Library code raises these for anything the user can cause or mend. The command line prints
``message`` and ``hint`` on one line and exits with 1; a traceback appears only with ``DSLM_DEBUG=1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DslmError(Exception):
    """Base of every error that dslm raises on purpose.

    Args:
        message: what happened, where, and what was expected.
        hint: what to do about it; empty when the message already says so.

    Attributes:
        told: another process of a distributed run has it too, and says so.
    """

    told = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UnsupportedFamilyError(DslmError):
    """The model's family, a tensor or a config key is not in the family tables."""


class SizeError(DslmError):
    """A requested size is impossible, or does not fit the command."""


class CheckpointError(DslmError):
    """A checkpoint is missing, damaged, unreadable or cannot be written."""


class RecipeError(DslmError):
    """The methods or options asked for do not fit together."""


class VerificationError(DslmError):
    """A resized model failed a check that was asked for."""


class MissingExtraError(DslmError):
    """An optional dependency is needed; the hint is the exact install line."""


class OutOfMemoryError(DslmError):
    """The memory of the machine, or of its GPU, was not enough."""


def tells_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is not enough, which torch tells in several ways."""
    words = str(error).lower()
    told = isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate" in words)
    return told or isinstance(error, MemoryError)


@contextmanager
def enough_memory(message: str, hint: str) -> Iterator[None]:
    """Turn a lack of memory into a line that says what to lower.

    Args:
        message: for what it was not enough.
        hint: what needs less.

    Raises:
        OutOfMemoryError: the memory was not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not tells_of_memory(error):
            raise
        raise OutOfMemoryError(f"the memory is not enough {message}", hint) from error
