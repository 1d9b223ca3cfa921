"""Checkpoints of random numbers in any shape, for measuring what depends on sizes only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dslm.checkpoint.writer import Planned, Writer
from dslm.families import load_family

PIECE = 1 << 24


def write_checkpoint(folder: Path, config: Mapping[str, object]) -> None:
    """Write a bf16 checkpoint of a config in the usual 5 GB shards, gains near one."""
    layout = load_family(str(config["model_type"])).layout(config)
    tensors = [Planned(line.name, "BF16", line.shape) for line in layout.values()]
    values = (0.02 * torch.randn(PIECE, generator=torch.Generator().manual_seed(0))).bfloat16()
    with Writer(folder, tensors) as writer:
        for path, shard in writer.order:
            writer.start_shard(path, shard)
            for tensor in shard:
                count = tensor.nbytes // 2
                pieces = (values[: min(PIECE, count - i)] for i in range(0, count, PIECE))
                writer.write(tensor, (1 + piece for piece in pieces) if len(tensor.shape) == 1 else pieces)
        writer.add_text("config.json", json.dumps(config))
        writer.seal()
        writer.publish()


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes: 256 tokens and an end, number 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")
    fast.save_pretrained(folder)
