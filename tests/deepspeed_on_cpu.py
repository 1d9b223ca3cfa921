"""``dslm`` under DeepSpeed on CPUs, which accelerate and the Trainer turn on for GPUs only."""

from __future__ import annotations

import os
import sys

os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

import dslm.train.arrange
from dslm.cli.main import run


def _with_cpus(self, *arguments, **options):
    return "gloo", DistributedType.MULTI_CPU


def _as_on_gpus(**options):
    return TrainingArguments(**options | {"use_cpu": False, "bf16": False})


if __name__ == "__main__":
    PartialState._prepare_backend = _with_cpus
    dslm.train.arrange.TrainingArguments = _as_on_gpus
    sys.exit(run(sys.argv[1:]))
