"""transformers' Trainer with our groups of parameters and an evaluation that weighs every token alike."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from dslm.train.growth import BETAS, Scale, parameter_groups, rewarmed


class GroupTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for models that `dslm.train.loss.give_loss` has prepared.

    Args:
        scales: parameter name -> how its rate, epsilon and decay differ from the run's.
        arguments: what a Trainer takes.
    """

    def __init__(self, *, scales: Mapping[str, Scale], **arguments: Any) -> None:
        self._scales = scales
        super().__init__(**arguments)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the groups; called by the Trainer, with the wrapped model where there is one."""
        if getattr(self, "optimizer", None) is None:
            named = (self.model if model is None else model).named_parameters()
            rate, decay = self.args.learning_rate, self.args.weight_decay
            groups = parameter_groups(named, self._scales, rate=rate, weight_decay=decay)
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The run's curve of rates, with a warm-up of their own for new parameters; called by the Trainer."""
        if self.lr_scheduler is None:
            whole = super().create_scheduler(num_training_steps, optimizer)
            curve, groups = whole.lr_lambdas[0], whole.optimizer.param_groups
            shares = [group.get("new", 0.0) for group in groups]  # DeepSpeed may bring groups of its own
            if any(shares):
                curves = [rewarmed(curve, share, num_training_steps) for share in shares]
                self.lr_scheduler: Any = LambdaLR(whole.optimizer, curves)
        return self.lr_scheduler

    def evaluate(self, *unused: Any, **also_unused: Any) -> dict[str, float]:
        """Mean loss and perplexity over all tokens that are held out, in nats per token."""
        self.model.eval()
        nats = tokens = 0.0
        for batch in self.get_eval_dataloader():
            with torch.no_grad():
                found = self.model(**self._prepare_inputs(batch))
            pairs = torch.stack([found.row_nats.float(), found.row_tokens.float()], dim=1)
            sums = self.accelerator.gather_for_metrics(pairs).cpu().double().sum(dim=0)  # MPS has no float64
            nats, tokens = nats + float(sums[0]), tokens + float(sums[1])
        loss = nats / tokens
        metrics = {"eval_loss": loss, "eval_perplexity": exp(loss) if loss < 700 else float("inf")}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
