"""What a run says while it runs: progress, metrics, samples of text; and when it stops: a broken loss, or Ctrl-C."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from dslm.errors import VerificationError
from dslm.progress import Progress
from dslm.train.runs import last_checkpoint

log = logging.getLogger(__name__)

METRICS, PICTURE = "metrics.jsonl", "loss.png"
_SAMPLE_TOKENS = 40
_WORDS = {"loss": "loss", "eval_loss": "loss", "grad_norm": "gradient's norm"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        step: optimiser steps so far.
        steps: in all.
        tokens: trained on so far.
        loss: mean training loss since the evaluation before; None at the start.
        perplexity: on held-out text.
        sample: text that the model wrote.
    """

    step: int
    steps: int
    tokens: int
    loss: float | None
    perplexity: float
    sample: str


class Watch(TrainerCallback):  # type: ignore[misc]
    """Follows a run.

    Args:
        folder: where the metrics are written.
        alone: there is no other process.
        sample: writes some text with the model; None if it cannot.
        keep_beside: puts the tokenizer into the folder of a checkpoint, so that it is a model by itself.
        progress: called with a label, steps done and steps in all.
        on_evaluation: called with what each evaluation found.
    """

    def __init__(
        self,
        folder: Path,
        alone: bool,
        sample: Callable[[], str] | None,
        keep_beside: Callable[[Path], object],
        progress: Progress | None,
        on_evaluation: Callable[[Evaluation], None] | None,
    ) -> None:
        self.path = folder / METRICS
        self.interrupted = False
        self._alone = alone
        self._sample, self._progress, self._on_evaluation = sample, progress, on_evaluation
        self._keep_beside = keep_beside
        self._losses: list[float] = []
        self._note = ""
        self._begin, self._before, self._first = time.monotonic(), 0.0, 0

    def draw(self) -> None:
        """Put a picture of the losses so far beside the metrics, if there are any."""
        if metrics := read_metrics(self.path):
            draw_curves(metrics, self.path.with_name(PICTURE))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Ctrl-C lets a step end; pressed again it stops at once.

        Of several processes each would hear it at another step, so there it stops at once as everywhere.
        """
        if not self._alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        log.info("stopping after this step; Ctrl-C again stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what an earlier attempt wrote behind the checkpoint that this one goes on from."""
        self._begin, self._first = time.monotonic(), state.num_input_tokens_seen
        if state.is_world_process_zero:
            step = state.global_step
            kept = [line for line in read_metrics(self.path) if step > 0 and line["step"] <= step]
            self._before = kept[-1]["seconds"] if kept else 0.0
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far it is; where Ctrl-C was pressed, keep the step and stop."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if self._progress is None or not state.is_world_process_zero:
            return
        speed = (state.num_input_tokens_seen - self._first) / max(1e-9, time.monotonic() - self._begin)
        self._progress(f"training\t{self._note}{speed:,.0f} tokens/s", state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint."""
        if state.is_world_process_zero:
            self._keep_beside(self.path.with_name(f"checkpoint-{state.global_step}"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write a line of metrics.

        Raises:
            VerificationError: the loss or the gradient is not a number any more.
        """
        known = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity")
        found = {key: logs[key] for key in known if key in logs}
        if not found:
            return
        for key in ("loss", "eval_loss", "grad_norm"):
            if not math.isfinite(found.get(key, 0.0)):
                point = last_checkpoint(self.path.parent, state.global_step + 1)
                kept = f"{point} is the last checkpoint before it" if point else "no checkpoint was before it"
                other = "" if point is None or not (point / "config.json").is_file() else ", from there"
                raise VerificationError(
                    f"the {_WORDS[key]} is {found[key]} at step {state.global_step}; {kept}",
                    f"train with a lower --learning-rate{other}, or check the data and the model",
                )
        if "loss" in found:
            self._losses.append(found["loss"])
            self._note = f"loss {found['loss']:.3f}, "
        if state.is_world_process_zero:
            line = {
                "step": state.global_step,
                "tokens": state.num_input_tokens_seen,
                "seconds": self._before + time.monotonic() - self._begin,
                **found,
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Tell what was found, with a sample of text."""
        losses, self._losses = self._losses, []
        if self._on_evaluation is None or not state.is_world_process_zero:
            return
        found = Evaluation(
            step=state.global_step,
            steps=state.max_steps,
            tokens=state.num_input_tokens_seen,
            loss=sum(losses) / len(losses) if losses else None,
            perplexity=metrics["eval_perplexity"],
            sample=self._sample() if self._sample is not None else "",
        )
        self._on_evaluation(found)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics; a last one that was cut off while it was written is left out."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def sampler(model: Any, tokenizer: Any, prompt_ids: list[int]) -> Callable[[], str]:
    """A function that continues a text greedily and gives both, the prompt in front of ``" | "``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters are in its layers
    own = base.generation_config
    context: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    room = _SAMPLE_TOKENS if context is None else context - len(prompt_ids)
    greedy = GenerationConfig(
        max_new_tokens=max(1, min(_SAMPLE_TOKENS, room)),
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )

    def write() -> str:
        model.eval()
        ids = torch.tensor([prompt_ids], device=model.device)
        # Set and not passed: what is passed is completed with the model's own settings. Those go into checkpoints.
        base.generation_config = greedy
        try:
            with torch.no_grad():
                out = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            base.generation_config = own
        parts = (
            tokenizer.decode(x, skip_special_tokens=True)
            for x in (out[0][: len(prompt_ids)], out[0][len(prompt_ids) :])
        )
        return " | ".join(parts)

    return write


def draw_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Loss against tokens as a picture: training as a line, held-out text as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out text", "o-")):
        points = [(line["tokens"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
