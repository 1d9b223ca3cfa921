"""Settings that every test shares: no network, quiet libraries, few threads."""

from __future__ import annotations

import os
from contextlib import suppress

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

from dslm.checkpoint.user_cache import cache_folder

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("dslm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("dslm")
pytest.register_assert_rewrite("asking", "calling", "refusing")  # what they assert tells as much as in a test


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What a shrink keeps for the next one is these tests' own; models that were converted before are used."""
    own = tmp_path_factory.mktemp("cache")
    with suppress(OSError, RuntimeError):  # no home, or none to write in
        converted = cache_folder() / "gguf"
        converted.mkdir(parents=True, exist_ok=True)
        (own / "gguf").symlink_to(converted, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSLM_CACHE", str(own))
        yield
