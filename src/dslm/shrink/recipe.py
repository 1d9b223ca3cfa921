"""How blocks are rebuilt: what a benchmark can switch off."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dslm.shrink.solve import RIDGES


@dataclass(frozen=True, slots=True)
class Recipe:
    """How blocks are rebuilt: by default with everything; benchmarks switch parts off one by one.

    Attributes:
        solve: re-read by least squares; without it what stays is only cut out (the slicing baseline).
        by_loss: choose units and heads by what the loss feels, if something is solved; otherwise by norms.
        readers: refit matrices that read the stream too.
        drift: let writers aim at the teacher's stream, and not only at what its block adds.
        weigh_tokens: weight each token by one over the mean square of the stream.
        ridges: strengths that are tried.
        gap_steps: optimiser steps at most on the blocks beside dropped ones, after the closed form.
        last_steps: the same on the last block, towards what the teacher says.
        refine: optimiser steps on each block.
    """

    solve: bool = True
    by_loss: bool = True
    readers: bool = True
    drift: bool = True
    weigh_tokens: bool = True
    ridges: tuple[float, ...] = RIDGES
    gap_steps: int = 600
    last_steps: int = 600
    refine: int = 0

    @classmethod
    def with_steps(cls, steps: int | None, *, solve: bool) -> Recipe:
        """The recipe for so many optimiser steps on each block; for None where they help most."""
        if steps is None:
            return cls(solve=solve)
        return cls(solve=solve, gap_steps=steps, last_steps=steps, refine=steps)

    @property
    def asks_loss(self) -> bool:
        """Whether the loss is asked what it feels of units and heads."""
        return self.solve and self.by_loss

    @property
    def takes_steps(self) -> bool:
        """Whether some block takes optimiser steps; a plain cut takes only those that every block takes."""
        return bool(self.refine or (self.solve and (self.gap_steps or self.last_steps)))

    def closed(self) -> Recipe:
        """The same without optimiser steps."""
        return replace(self, gap_steps=0, last_steps=0, refine=0)
