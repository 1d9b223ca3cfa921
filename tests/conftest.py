"""Settings that every test shares: no network, quiet libraries, few threads."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny models: two workers with two threads each wait for each other

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("dslm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("dslm")
pytest.register_assert_rewrite("asking", "calling", "refusing")  # what they assert tells as much as in a test
