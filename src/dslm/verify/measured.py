"""A figure and its standard error, and how errors of means and differences are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum, hypot, sqrt


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure.

    Attributes:
        value: the figure.
        error: its standard error; None where one sample, or a figure that is no mean, gives none.
    """

    value: float
    error: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Both by name."""
        return asdict(self)

    def times(self, factor: float) -> Measured:
        """In another unit, or by a slope: both times ``factor``."""
        return Measured(self.value * factor, None if self.error is None else abs(factor) * self.error)


def ratio(parts: Sequence[float], sizes: Sequence[float]) -> Measured:
    """A total divided by a size, from samples that have parts of both, such as nats per token from windows.

    With ``r = sum(parts) / sum(sizes)`` of ``k`` samples the variance is ``k / (k - 1) sum (part - r size)^2 /
    sum(sizes)^2``; for samples of one size that is the variance of a mean.

    Args:
        parts: what each sample adds to the total.
        sizes: the sizes of the samples, positive.

    Source:
        Cochran, Sampling Techniques (1977), section 2.11.
    """
    size = fsum(sizes)
    value = fsum(parts) / size
    count = len(parts)
    if count < 2:
        return Measured(value)
    squares = fsum((part - value * own) ** 2 for part, own in zip(parts, sizes, strict=True))
    return Measured(value, sqrt(count / (count - 1) * squares) / size)


def apart(a: Measured, b: Measured) -> Measured:
    """``a - b`` where the errors are taken as independent: too wide where both are of the same samples."""
    both = None if a.error is None or b.error is None else hypot(a.error, b.error)
    return Measured(a.value - b.value, both)
