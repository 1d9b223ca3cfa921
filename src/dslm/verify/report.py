"""Everything that is measured about a pair of models, what it means in words, and the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from dslm.checkpoint.reader import Checkpoint, torch_dtype
from dslm.errors import VerificationError
from dslm.progress import Progress
from dslm.sizes import count_parameters
from dslm.verify.exactness import Comparison, compare_models, storage_floor
from dslm.verify.liveness import Liveness, certify
from dslm.verify.text import token_windows

FLOOR_FACTOR = 10
"""A difference up to this many times the rounding floor counts as rounding."""

STORAGE_FACTOR = 4
"""A KL up to this many times that of one more rounding of the weights counts as such: twice the difference. Growing by
1.5 in bfloat16, small random models of every family had 1.5 times at most."""

_LEAST_FLOOR = 1e-6
_CLOSE_KL = 0.01


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about model B next to model A.

    Attributes:
        a: name of the reference.
        b: name of the model that is judged.
        sizes_a: sizes of A.
        sizes_b: sizes of B.
        parameters_a: parameters of A.
        parameters_b: parameters of B.
        text: what they were compared on, in words.
        dtype: of the computation.
        comparison: B against A.
        floor: A against A with its sums in another order.
        storage: A with every weight rounded once more to its dtype, against A; only where B is further than the floor.
        liveness: the certificate of B, where it was asked for.
    """

    a: str
    b: str
    sizes_a: Mapping[str, int | bool]
    sizes_b: Mapping[str, int | bool]
    parameters_a: int
    parameters_b: int
    text: str
    dtype: str
    comparison: Comparison
    floor: Comparison
    storage: Comparison | None
    liveness: Liveness | None

    @property
    def verdict(self) -> str:
        """How B relates to A.

        ``identical``, ``same`` (up to the order of sums), ``rounded`` (up to one more rounding of the weights to
        their dtype), ``close`` (KL below 0.01 nats per token) or ``different``.
        """
        found = self.comparison.relative_difference
        if found == 0:
            return "identical"
        if is_rounding(self.comparison, self.floor):
            return "same"
        if self.storage is not None and _is_stored_anew(self.comparison, self.storage):
            return "rounded"
        return "close" if self.comparison.kl < _CLOSE_KL else "different"

    def measured(self) -> dict[str, Any]:
        """The figures that belong on a model card."""
        found = self.comparison
        figures: dict[str, Any] = {
            "verdict": self.verdict,
            "largest logit difference": found.max_difference,
            "relative to the largest logit": found.relative_difference,
            "rounding floor, relative": self.floor.relative_difference,
            "KL in nats per token": found.kl,
            "top-1 agreement": found.agreement,
            "perplexity before": found.perplexity_a,
            "perplexity after": found.perplexity_b,
            "tokens": found.tokens,
            "text": self.text,
            "computed in": self.dtype,
        }
        if self.liveness is not None:
            figures |= {"alive": self.liveness.alive, "unlocked": self.liveness.unlocked}
        return figures

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "a": self.a,
            "b": self.b,
            "sizes": {"a": dict(self.sizes_a), "b": dict(self.sizes_b)},
            "parameters": {"a": self.parameters_a, "b": self.parameters_b},
            "text": self.text,
            "dtype": self.dtype,
            "comparison": self.comparison.as_dict(),
            "floor": self.floor.as_dict(),
            "storage_floor": self.storage.as_dict() if self.storage else None,
            "verdict": self.verdict,
            "liveness": self.liveness.as_dict() if self.liveness else None,
        }


def is_rounding(found: Comparison, floor: Comparison) -> bool:
    """Whether a difference is no more than a few times what rounding does."""
    return found.relative_difference <= FLOOR_FACTOR * max(floor.relative_difference, _LEAST_FLOOR)


def _is_stored_anew(found: Comparison, storage: Comparison) -> bool:
    """Whether a difference is no more than one more rounding of the weights explains.

    Where they are coarse even a few times the largest difference may be a real one, so the mean decides too.
    """
    return is_rounding(found, storage) and found.kl <= STORAGE_FACTOR * storage.kl


def compare_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    text: str | None = None,
    *,
    liveness: bool = True,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Report:
    """Measure model B against model A.

    Args:
        a: the reference, such as the source of a resize.
        b: the model to judge.
        text: what to compare on; a built-in passage if None, or random tokens where no model has a tokenizer.
        liveness: also certify B (`certify`), if its logits are finite.
        dtype: of the comparison's computation; the certificate always computes in float32.
        progress: called with a label, the steps done, and all steps.

    Raises:
        VerificationError: the models do not share vocabulary and tokenizer, or A's logits are not finite.
        CheckpointError: a model cannot be loaded.
    """
    windows, described = token_windows([a, b], text)
    comparison, floor = compare_models(a, b, windows, dtype=dtype, progress=progress)
    if not isfinite(floor.kl):
        hint = "check its weights" if dtype == "float32" else "compare with --dtype float32"
        raise VerificationError(f"{a.name} gives logits that are not finite in {dtype}", hint)
    stored = min((torch_dtype(model.dtype) for model in (a, b)), key=lambda kind: kind.itemsize)
    storage = None if is_rounding(comparison, floor) else storage_floor(a, stored, windows, dtype=dtype)
    # Of a model whose logits are no numbers there is nothing to say.
    certified = liveness and isfinite(comparison.kl)
    certificate = certify(b, windows[0], source=a, progress=progress) if certified else None
    return Report(
        a=a.name,
        b=b.name,
        sizes_a=a.sizes.as_dict(),
        sizes_b=b.sizes.as_dict(),
        parameters_a=count_parameters(a.family, a.config)["total"],
        parameters_b=count_parameters(b.family, b.config)["total"],
        text=described,
        dtype=dtype,
        comparison=comparison,
        floor=floor,
        storage=storage,
        liveness=certificate,
    )


def gate(
    report: Report,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    require_alive: bool = False,
) -> None:
    """Fail unless a report meets the limits that are given.

    Args:
        report: what was measured.
        max_kl: largest mean KL(A || B), in nats per token.
        min_agreement: least share of equal top-1 predictions, 0 to 1.
        require_alive: nothing in B may be dead or locked, beyond what A already had.

    Raises:
        VerificationError: a limit is not met; the message names every one.
    """
    found, failures = report.comparison, []
    if max_kl is not None and not found.kl <= max_kl:
        failures.append(f"KL is {found.kl:.3g} nats per token, and at most {max_kl:g} was asked for")
    if min_agreement is not None and not found.agreement >= min_agreement:
        failures.append(
            f"top-1 agreement is {found.agreement:.4f}, and at least {min_agreement:g} was asked for"
        )
    if require_alive:
        if report.liveness is None:
            failures.append(
                "liveness was not measured"
                + ("" if isfinite(found.kl) else f": the logits are not finite in {report.dtype}")
            )
        else:
            passed = {"dead": report.liveness.alive, "locked": report.liveness.unlocked}
            failures += [_listed(report.liveness, kind) for kind, good in passed.items() if not good]
    if failures:
        raise VerificationError(f"{report.b} failed against {report.a}: {'; '.join(failures)}")


def verdict_words(report: Report) -> str:
    """What the comparison means, in one sentence."""
    ratio = report.comparison.relative_difference / max(report.floor.relative_difference, _LEAST_FLOOR)
    return {
        "identical": "B is the same function as A, bit for bit.",
        "same": "B is the same function as A, up to rounding.",
        "rounded": "B is the same function as A, up to one more rounding of the weights to their dtype.",
        "close": f"B is close to A but not the same function: {ratio:,.0f} times what rounding does.",
        "different": f"B is not the same function as A: {ratio:,.0f} times what rounding does.",
    }[report.verdict]


_MEANING = {"dead": "can never learn", "locked": "can never differ from the unit they copy"}


def liveness_words(liveness: Liveness) -> list[str]:
    """What the certificate means, a sentence for each kind of finding."""
    passed = {"dead": liveness.alive, "locked": liveness.unlocked}
    lines = [
        _listed(liveness, kind) + (", as in A" if passed[kind] else "")
        for kind in _MEANING
        if any(getattr(space, kind) for space in liveness.spaces)
    ]
    return lines or ["alive and unlocked: every part can learn, and no two copies are tied for ever"]


def _listed(liveness: Liveness, kind: str) -> str:
    counts = [(getattr(space, kind), space) for space in liveness.spaces]
    listed = ", ".join(f"{count:,} of {space.units:,} {space.name}" for count, space in counts if count)
    return f"{kind}: {listed} {_MEANING[kind]}"
