"""First-order importance: against automatic differentiation of the whole stock model, for every kind of block."""

from __future__ import annotations

import pytest
import torch

import pico
import shrinking
from dslm.checkpoint.reader import open_folder
from dslm.errors import VerificationError
from dslm.load import load_model
from dslm.shrink import importance as module
from dslm.shrink.importance import beginnings, importance
from dslm.shrink.rebuild import rebuild
from dslm.shrink.recipe import Recipe
from dslm.shrink.tap import reads_heads
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored


def by_autograd(source, ids_BT):
    """The same from one backward pass through the whole model, with every activation in memory."""
    walk, model = Walk(Stored(source)), load_model(source, dtype="float32", device="cpu").eval()
    modules, reads = dict(model.named_modules()), {}
    for where, part in walk.model.named_modules():
        for layer in range(len(walk.blocks)):
            name = walk.linears(layer).get(part)
            if name and reads_heads(walk, name):
                keep = lambda _, args, name=name: reads.update({name: args[0]})  # noqa: E731
                modules[where].register_forward_pre_hook(keep)
    logits = model(input_ids=ids_BT, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, list(reads.values()))
    found = {}
    for (name, z), g in zip(reads.items(), gradients, strict=True):
        product = (z.detach() * g).double().flatten(0, -2)
        change = product.view(len(product), source.sizes.num_attention_heads, -1).sum(dim=-1)
        found[name] = change.square().sum(dim=0)
    return found


def assert_same(found, expected, *, rtol):
    """For every block, and something in each."""
    assert found.keys() == expected.keys()
    for name, felt_H in expected.items():
        assert felt_H.max() > 0
        torch.testing.assert_close(found[name], felt_H, rtol=rtol, atol=1e-6 * float(felt_H.max()))


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_it_is_what_automatic_differentiation_of_the_whole_model_gives(family, variant, tmp_path):
    source = shrinking.make_source(tmp_path / "source", family, variant)
    ids_BT = shrinking.windows().fit[:5]
    found = importance(Walk(Stored(source)), ids_BT, tmp_path)
    expected = by_autograd(source, ids_BT)
    assert len(expected) == source.sizes.num_hidden_layers
    assert_same(found, expected, rtol=2e-4)


def test_pieces_add_up(tmp_path, monkeypatch):
    """Two windows at a time, the last alone; the logits of seven positions, the last ones fewer."""
    source = shrinking.make_source(tmp_path / "source", "gpt_neox", "parallel")
    ids_BT = shrinking.windows().fit[:5]
    whole = importance(Walk(Stored(source)), ids_BT, tmp_path)
    pieces, through, run = [], module._through_block, Walk.logits
    monkeypatch.setattr(module, "PIECE", 2 * ids_BT.shape[1])
    monkeypatch.setattr(module, "positions_at_once", lambda walk: 7)
    monkeypatch.setattr(
        module, "_through_block", lambda *given: pieces.append(("block", len(given[2]))) or through(*given)
    )
    monkeypatch.setattr(Walk, "logits", lambda *given: pieces.append(("head", len(given[1]))) or run(*given))
    found = importance(Walk(Stored(source)), ids_BT, tmp_path)
    assert (
        pieces == [("head", count) for count in (7, 7, 5)] * 5 + [("block", count) for count in (2, 2, 1)] * 3
    )
    assert_same(found, whole, rtol=1e-4)


def test_no_windows_feel_nothing(tmp_path):
    """As on a process of a distributed run that has none; what comes after is not disturbed."""
    source = shrinking.make_source(tmp_path / "source", "llama", "gqa-tied")
    walk, ids_BT = Walk(Stored(source)), shrinking.windows().fit[:5]
    none = importance(walk, ids_BT[:0], tmp_path)
    found = importance(walk, ids_BT, tmp_path)
    assert len(none) == 3
    assert none.keys() == found.keys()
    for name, felt_H in found.items():
        assert (none[name].shape, none[name].dtype) == (felt_H.shape, felt_H.dtype)
        assert (none[name] == 0).all()
        assert (felt_H > 0).all()


@pytest.fixture
def unheard(tmp_path):
    """A model in which the first two of four heads of each block write much into a channel that nothing reads."""
    model, generator = pico.make_model("llama", "mha"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(
                    parameter.shape[1] ** -0.5 * torch.randn(parameter.shape, generator=generator)
                )
        model.model.embed_tokens.weight[:, 0] = 0.0
        for block in model.model.layers:
            for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                reader.weight[:, 0] = 0.0
            block.mlp.gate_proj.weight[:, 0] = block.mlp.up_proj.weight[:, 0] = 0.0
            block.mlp.down_proj.weight[0] = 0.0
            block.self_attn.o_proj.weight[:, :16] = 0.0
            block.self_attn.o_proj.weight[0] = 0.0
            block.self_attn.o_proj.weight[0, :16] = 0.85
        model.model.norm.weight[0] = 0.0
    return open_folder(pico.save(model, tmp_path / "unheard"))


def test_heads_that_the_loss_does_not_feel_go_first_however_much_they_write(unheard, tmp_path):
    target = unheard.sizes.replace(num_attention_heads=2, num_key_value_heads=2)

    def kept(recipe):
        found = rebuild(
            Stored(unheard), target, (0, 1, 2), None, shrinking.windows(), tmp_path, recipe=recipe
        )
        return [found.base.folds["heads", layer].keep_T.tolist() for layer in range(3)]

    assert kept(Recipe().closed()) == [[2, 3]] * 3
    assert kept(Recipe(by_loss=False).closed()) != [[2, 3]] * 3
    assert kept(Recipe(solve=False)) == kept(Recipe(by_loss=False).closed())


def test_heads_that_are_constant_go_first_by_norms_where_a_bias_makes_up_for_them(tmp_path):
    model = pico.make_model("llama", "biases")
    groups = model.config.num_key_value_heads
    width = model.config.head_dim
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight[:width] = 0.0
            block.self_attn.v_proj.bias[:width] = 9.0
    source = open_folder(pico.save(model, tmp_path / "constant"))
    heads = source.sizes.num_attention_heads // groups
    target = source.sizes.replace(num_attention_heads=heads * (groups - 1), num_key_value_heads=groups - 1)
    recipe = Recipe(by_loss=False).closed()
    found = rebuild(Stored(source), target, (0, 1, 2), None, shrinking.windows(), tmp_path, recipe=recipe)
    kept = [found.base.folds["kv_heads", layer].keep_T.tolist() for layer in range(3)]
    assert kept == [list(range(1, groups))] * 3


def test_gradients_that_are_not_finite_name_the_matrix(tmp_path, monkeypatch):
    source = shrinking.make_source(tmp_path / "source", "llama", "mha")
    monkeypatch.setattr(
        module, "_through_head", lambda walk, end_BTD, ids_BT: torch.full_like(end_BTD, torch.inf)
    )
    with pytest.raises(VerificationError, match=r"gradient of the loss at model.layers.*NaN or infinite"):
        importance(Walk(Stored(source)), shrinking.windows().fit, tmp_path)


@pytest.mark.parametrize(
    ("windows", "read"),
    [
        ((4, 1024), (4, 1024)),
        ((16, 1024), (16, 1024)),
        ((17, 1024), (17, 963)),
        ((64, 1024), (64, 256)),
        ((160, 1024), (64, 256)),
        ((16, 2048), (16, 1024)),
        ((200, 100), (163, 100)),
        ((1, 80000), (1, 16384)),
        ((0, 1024), (0, 1024)),
    ],
)
def test_as_much_of_each_window_is_read(windows, read):
    ids_BT = torch.arange(windows[0] * windows[1]).view(windows)
    assert torch.equal(beginnings(ids_BT), ids_BT[: read[0], : read[1]])
    assert beginnings(ids_BT).shape == read


def test_only_beginnings_are_read(tmp_path, monkeypatch):
    source = shrinking.make_source(tmp_path / "source", "llama", "mha")
    ids_BT = shrinking.windows().fit
    some = importance(Walk(Stored(source)), ids_BT[:5, :10], tmp_path)
    whole = importance(Walk(Stored(source)), ids_BT, tmp_path)
    for name, value in {"_TOKENS": 50, "_SHORTEST": 10}.items():
        monkeypatch.setattr(module, name, value)
    found = importance(Walk(Stored(source)), ids_BT, tmp_path)
    assert found.keys() == some.keys() == whole.keys()
    assert len(found) == 3
    for name, felt_H in found.items():
        assert torch.equal(felt_H, some[name])
        assert not torch.equal(felt_H, whole[name])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
