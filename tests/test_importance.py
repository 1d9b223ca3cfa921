"""What the loss feels: against automatic differentiation of the whole stock model, for every kind of block."""

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
from dslm.shrink.tap import reads_heads, writes_stream
from dslm.shrink.walk import Walk
from dslm.shrink.weights import Stored


def by_autograd(source, ids_BT):
    """The same from one backward pass through the whole model, with every activation in memory."""
    walk, model = Walk(Stored(source)), load_model(source, dtype="float32", device="cpu").eval()
    modules, seen = dict(model.named_modules()), {}
    for where, part in walk.model.named_modules():
        for layer in range(len(walk.blocks)):
            name = walk.linears(layer).get(part)
            if name and writes_stream(walk, name):
                kept = (lambda args, out: args[0]) if reads_heads(walk, name) else (lambda args, out: out)
                keep = lambda _, args, out, name=name, kept=kept: seen.update({name: kept(args, out)})  # noqa: E731
                modules[where].register_forward_hook(keep)
    logits = model(input_ids=ids_BT, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, list(seen.values()))
    found = {}
    for (name, z), g in zip(seen.items(), gradients, strict=True):
        if reads_heads(walk, name):
            product = (z.detach() * g).double().flatten(0, -2)
            change = product.view(len(product), source.sizes.num_attention_heads, -1).sum(dim=-1)
            found[name] = change.square().sum(dim=0)
        else:
            g_ND = g.double().flatten(0, -2)
            of_loss_DD = torch.cov(g_ND.T, correction=0) + torch.outer(g_ND.mean(dim=0), g_ND.mean(dim=0))
            of_loss_DD /= of_loss_DD.trace() / len(of_loss_DD)
            found[name] = (of_loss_DD + torch.eye(len(of_loss_DD))) / 2
    return found


def assert_same(found, expected, *, rtol):
    """For every block, and something in each."""
    assert found.keys() == expected.keys()
    for name, felt in expected.items():
        assert felt.max() > 0
        atol = 1e-6 * float(felt.max())
        torch.testing.assert_close(found[name].double(), felt.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_it_is_what_automatic_differentiation_of_the_whole_model_gives(family, variant, tmp_path):
    source = shrinking.make_source(tmp_path / "source", family, variant)
    ids_BT = shrinking.windows().fit[:5]
    found = importance(Walk(Stored(source)), ids_BT, tmp_path)
    expected = by_autograd(source, ids_BT)
    assert sum(felt.dim() == 1 for felt in expected.values()) == source.sizes.num_hidden_layers
    assert sum(felt.dim() == 2 for felt in expected.values()) == source.sizes.num_hidden_layers
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


@pytest.mark.parametrize(("family", "variant"), [("llama", "gqa-tied"), ("gemma2", "windows-softcaps")])
def test_no_windows_tell_nothing(family, variant, tmp_path):
    """As on a process of a distributed run that has none; what comes after is not disturbed."""
    source = shrinking.make_source(tmp_path / "source", family, variant)
    walk, ids_BT = Walk(Stored(source)), shrinking.windows().fit[:5]
    none = importance(walk, ids_BT[:0], tmp_path)
    found = importance(walk, ids_BT, tmp_path)
    assert len(none) == 6
    assert none.keys() == found.keys()
    for name, felt in found.items():
        assert (none[name].shape, none[name].dtype) == (felt.shape, felt.dtype)
        if reads_heads(walk, name):
            assert (none[name] == 0).all()
            assert (felt > 0).all()
        else:
            assert torch.equal(none[name], torch.eye(len(felt)))
            assert not torch.allclose(felt, none[name], atol=0.01)


def unheard(folder, *, heads=0.0, units=0.0):
    """A model in which half of each block's heads, or units, write much into a channel that nothing reads."""
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
            for writer, half, size in ((block.self_attn.o_proj, 16, heads), (block.mlp.down_proj, 24, units)):
                writer.weight[0] = 0.0
                if size:
                    writer.weight[:, :half] = 0.0
                    writer.weight[0, :half] = size
        model.model.norm.weight[0] = 0.0
    return open_folder(pico.save(model, folder / "unheard"))


def test_heads_that_nothing_hears_go_first_however_much_they_write(tmp_path):
    source = unheard(tmp_path, heads=0.85)
    target = source.sizes.replace(num_attention_heads=2, num_key_value_heads=2)

    def kept(recipe):
        found = rebuild(Stored(source), target, (0, 1, 2), None, shrinking.windows(), tmp_path, recipe=recipe)
        return [found.base.folds["heads", layer].keep_T.tolist() for layer in range(3)]

    assert kept(Recipe().closed()) == [[2, 3]] * 3
    assert kept(Recipe(by_loss=False).closed()) != [[2, 3]] * 3
    assert kept(Recipe(solve=False)) == kept(Recipe(by_loss=False).closed())


@pytest.mark.parametrize("fit", [3, 24], ids=["few tokens", "tokens enough"])
def test_units_that_nothing_hears_count_less(fit, tmp_path, monkeypatch):
    source = unheard(tmp_path, units=0.85)
    target = source.sizes.replace(intermediate_size=24)

    def unfelt(recipe, share):
        """How many of the units that write into the unheard channel stay, of 24 in each of three blocks."""
        monkeypatch.setattr(module, "_BY_LOSS", share)
        windows = shrinking.windows(fit=fit)
        found = rebuild(Stored(source), target, (0, 1, 2), None, windows, tmp_path, recipe=recipe)
        kept = torch.stack([found.base.folds["intermediate", layer].keep_T for layer in range(3)])
        return int((kept < 24).sum())

    by_norms = unfelt(Recipe(by_loss=False).closed(), 0.5)
    by_half, by_nearly_all = (unfelt(Recipe().closed(), share) for share in (0.5, 0.999))
    assert by_nearly_all < by_half < by_norms
    assert by_nearly_all < 0.6 * by_norms


@pytest.mark.parametrize("by_loss", [False, True], ids=["by norms", "by the loss"])
def test_heads_that_are_constant_go_first_where_a_bias_makes_up_for_them(by_loss, tmp_path):
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
    recipe = Recipe(by_loss=by_loss).closed()
    found = rebuild(Stored(source), target, (0, 1, 2), None, shrinking.windows(), tmp_path, recipe=recipe)
    kept = [found.base.folds["kv_heads", layer].keep_T.tolist() for layer in range(3)]
    assert kept == [list(range(1, groups))] * 3


def test_gradients_that_are_not_finite_name_the_matrix(tmp_path, monkeypatch):
    source = shrinking.make_source(tmp_path / "source", "llama", "mha")
    monkeypatch.setattr(
        module, "_through_head", lambda walk, end_TD, ids_T: torch.full_like(end_TD, torch.inf)
    )
    with pytest.raises(VerificationError, match=r"gradient of the loss at model.layers.*NaN or infinite"):
        importance(Walk(Stored(source)), shrinking.windows().fit, tmp_path)


@pytest.mark.parametrize(
    ("windows", "read"),
    [
        ((4, 1024), (4, 1024)),
        ((8, 1024), (8, 1024)),
        ((9, 1024), (9, 910)),
        ((32, 1024), (32, 256)),
        ((160, 1024), (32, 256)),
        ((8, 2048), (8, 1024)),
        ((200, 100), (81, 100)),
        ((1, 80000), (1, 8192)),
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
    assert len(found) == 6
    for name, felt in found.items():
        assert torch.equal(felt, some[name])
        assert not torch.equal(felt, whole[name])
    (left,) = {path.name for path in tmp_path.iterdir()} - {"source"}
    assert left.startswith("metrics-")  # of the first call, whose windows take less room
