"""Attention that was seen once is not computed again, and no number changes by that."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import pico
import shrinking
from dslm.shrink import rebuild
from dslm.shrink.memo import Memo
from dslm.shrink.recipe import Recipe
from dslm.shrink.walk import Walk, mean_loss
from dslm.shrink.weights import Stored

QUERIES = ("q_proj.weight", "qkv_proj.weight", "query_key_value.weight")


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_attention_runs_once_for_each_window(family, variant, tmp_path, monkeypatch):
    source = shrinking.make_source(tmp_path / "source", family, variant)
    target = source.sizes.replace(intermediate_size=source.sizes.intermediate_size // 2)
    layers = tuple(range(target.num_hidden_layers))
    windows = shrinking.windows(fit=12, held_out=4, check=2)
    runs = []

    def run(walk: Walk, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        readers = [m for m, name in walk.linears(layer).items() if name.endswith(QUERIES)]
        handles = [m.register_forward_hook(lambda _, args, out: runs.append(len(args[0]))) for m in readers]
        try:
            return whole(walk, layer, hidden)
        finally:
            for handle in handles:
                handle.remove()

    def rebuilt(name: str) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir()
        recipe = Recipe(by_loss=False).closed()  # asking what matters takes passes of its own
        found = rebuild.rebuild(Stored(source), target, layers, None, windows, tmp_path / name, recipe=recipe)
        return {key: found.read(key) for key in found.files}

    whole = Walk.run
    monkeypatch.setattr(Walk, "run", run)
    with_memo = rebuilt("with")
    # a look at one window; the teacher over all; the student's writer over those for solving, its end over the rest
    once = 1 + 18 + 16 + 2
    assert sum(runs) == once * len(layers)
    runs.clear()
    monkeypatch.setattr(Memo, "of", lambda *_: nullcontext())
    without = rebuilt("without")
    assert sum(runs) > 2 * once * len(layers)
    assert with_memo.keys() == without.keys()
    for name, tensor in with_memo.items():
        assert torch.equal(tensor, without[name]), name


@pytest.mark.parametrize(("family", "variant"), [("llama", "gqa-tied"), ("olmo2", "mha"), ("phi", "mha")])
def test_the_loss_that_is_reported_is_that_of_the_model(family, variant, tmp_path):
    """Fewer layers, heads and units, and blocks that took steps: what was remembered is not taken for what is."""
    source = shrinking.make_source(tmp_path / "source", family, variant)
    heads, groups = source.sizes.num_attention_heads, source.sizes.num_key_value_heads
    target = source.sizes.replace(
        num_hidden_layers=2,
        num_attention_heads=heads // 2,
        num_key_value_heads=groups // 2,
        intermediate_size=source.sizes.intermediate_size // 2,
    )
    windows = shrinking.windows(fit=64)
    found = rebuild.rebuild(Stored(source), target, (0, 2), None, windows, tmp_path)
    walk = Walk(found)
    stream = walk.embed(windows.held_out)
    for layer in range(2):
        with walk.block(layer):
            stream = walk.run(layer, stream)
    with walk.head():
        loss = mean_loss(walk, stream, windows.held_out)
    assert found.losses["held-out"][1] == pytest.approx(loss, rel=1e-6)
