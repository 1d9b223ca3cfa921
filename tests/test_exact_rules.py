"""Each rule of the exact stage matters: with it what growth added goes without loss, without it it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from dslm.checkpoint.reader import open_folder
from dslm.shrink import find_twins, fold, packing, redundancy, weights
from dslm.shrink.redundancy import exact_stage
from dslm.shrink.weights import Stored
from growing import grow, load, logits, off
from pico import tokens
from ruling import WRONG, Rule, instead
from shrinking import written
from test_rules import not_normed, with_line, without_table_fields


def without_amplitudes(fold_stream):
    def fold_only(*arguments, **options):
        found = fold_stream(*arguments, **options)
        return dataclasses.replace(found, amplitude_T=torch.ones_like(found.amplitude_T))

    return fold_only


def without_watching_the_mean(ask_writer):
    def ask(self, found):
        answer, self.centred = ask_writer(self, found), True
        return answer

    return ask


def stream(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Phi's tables, matrices and vectors that write the stream or scale it, channels first."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("embed_tokens", "self_attn.dense", "fc2", "norm")):
            yield name, parameter.T if "embed_tokens" in name else parameter


def one_copied_channel(model: PreTrainedModel) -> None:
    for _, rows in stream(model):
        rows[7] = rows[3]


def zero_channels(model: PreTrainedModel) -> None:
    for _, rows in stream(model):
        rows[5:9] = 0


def centred_zero_channels(model: PreTrainedModel) -> None:
    zero_channels(model)
    live = [*range(5), *range(9, 32)]
    for name, rows in stream(model):
        if "norm" not in name:
            rows[live] -= rows[live].mean(dim=0)


UNSCALED = instead(redundancy, "fold_stream", without_amplitudes)
UNSCALED_HEADS = instead(packing, "_balanced", lambda _: lambda heads, leaders: heads)
ONLY_KEPT = instead(fold.Fold, "balanced", lambda _: lambda kept, stored, is_gain: stored[kept.keep_T])
ALL_GAINS = instead(
    fold.Fold, "balanced", lambda whole: lambda kept, stored, is_gain: whole(kept, stored, is_gain=True)
)
NO_FACTOR = instead(weights, "table_factor", lambda _: lambda *sizes: 1.0)
MEAN_UNSEEN = instead(find_twins._Stream, "ask_writer", without_watching_the_mean)
BIAS_NOT_NORMED = with_line("model.layers.{layer}.self_attn.q_proj.bias", not_normed)
EXACT = {
    "amplitudes: weighted copies": Rule("llama", "mha", UNSCALED, {"hidden_size": 48}),
    "amplitudes: padding": Rule("llama", "mha", UNSCALED, {"hidden_size": 48}, method="padding"),
    "tied table: a gain": Rule("llama", "gqa-tied", ONLY_KEPT, {"hidden_size": 64}),
    "tied table: a shift": Rule("phi", "tied", ALL_GAINS, plant=centred_zero_channels),
    "norm over all heads, queries": Rule("olmo2", "gqa-tied", UNSCALED_HEADS, {"num_attention_heads": 6}),
    "norm over all heads, keys": Rule(
        "olmo2", "gqa-tied", UNSCALED_HEADS, {"num_attention_heads": 12, "num_key_value_heads": 3}
    ),
    "norm over all heads, bias": Rule("olmo2", "biases", BIAS_NOT_NORMED, {"num_attention_heads": 6}),
    "LayerNorm: equal copies": Rule("phi", "mha", without_table_fields(norm="rms"), plant=one_copied_channel),
    "LayerNorm: zero where the mean is": Rule("phi", "mha", MEAN_UNSEEN, plant=zero_channels),
    "Gemma's 1 + gain": Rule(
        "gemma2", "windows-softcaps", without_table_fields(gain_offset=0), {"hidden_size": 64}
    ),
    "Gemma's embedding multiplier": Rule("gemma", "mqa", NO_FACTOR, {"hidden_size": 64}),
    "Gemma's embedding multiplier, untied": Rule(
        "gemma", "mha-untied", without_table_fields(embedding_multiplier="none"), {"hidden_size": 64}
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT.keys())
def test_the_exact_stage_needs_the_rule(rule, tmp_path, monkeypatch):
    model = rule.save(tmp_path / "source", torch.float64)
    folder, floor = tmp_path / "source", open_folder(tmp_path / "source").sizes
    if rule.sizes:
        folder = grow(folder, tmp_path / "grown", floor.replace(**rule.sizes), method=rule.method)
    else:
        floor = floor.replace(hidden_size=4)

    def distance(name: str) -> float:
        found = exact_stage(Stored(open_folder(folder)), floor)
        assert found.removed or (name == "with" and not rule.sizes)
        shrunk = load(written(found.weights, tmp_path / name), torch.float64)
        return off(logits(model, tokens(6)), logits(shrunk, tokens(6)))

    assert distance("with") < 5e-6
    rule.without(monkeypatch)
    assert distance("without") > WRONG
