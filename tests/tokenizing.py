"""A tokenizer for a tiny model in a test: each word ``w17`` is a token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import pico

BOS, EOS = 1, 2


def add_tokenizer(folder: Path, *, words: int = pico.VOCAB, bos: bool = False, eos: bool = True) -> None:
    """Put a tokenizer into a model's folder; it may begin every text, and may have an end token."""
    vocab = {"<pad>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    ends = {"eos_token": "</s>"} if eos else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", **ends
    ).save_pretrained(folder)
