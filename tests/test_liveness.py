"""Dead and locked units: each is found in a model built to have it, and only there."""

import json

import pytest
import torch

import verifying
from dslm.checkpoint.reader import open_folder
from dslm.errors import VerificationError
from dslm.families.axes import Role
from dslm.verify import certify, compare_checkpoints, gate
from dslm.verify.text import token_windows
from verifying import build, ffn_copies, rewrite

source = verifying.source  # a fixture


def tokens(checkpoint):
    return token_windows([checkpoint], None)[0][0]


def counts(liveness):
    return {space.name: (space.dead, space.locked) for space in liveness.spaces}


def pad_hidden(state, checkpoint, size, readers):
    """Widen the residual stream with channels nobody writes; old ones are scaled so that the norms agree."""
    scale, old = (size / 32) ** 0.5, 32
    for name, line in checkpoint.family.layout(checkpoint.config).items():
        value = state[name]
        for position, axis in enumerate(line.spec.axes):
            if axis.dimensions != ("hidden",):
                continue
            shape = list(value.shape)
            shape[position] = size - old
            fill = torch.zeros(shape)
            if axis.role is Role.READ:
                fill = torch.randn(shape) * 0.1 if readers == "random" else fill
                value = torch.cat([value / scale, fill], dim=position)
            elif axis.role is Role.GAIN:
                value = torch.cat([value, torch.ones(shape)], dim=position)
            else:
                value = torch.cat([value * scale, fill], dim=position)
        state[name] = value


def test_even_copies_are_locked_and_uneven_are_not(source, tmp_path):
    even = rewrite(source.folder, tmp_path / "e", lambda s: ffn_copies(s, 0.5), intermediate_size=96)
    found = certify(even, tokens(even), source=source)
    assert counts(found)["FFN units"] == (0, 2 * 48)
    assert found.alive
    assert not found.unlocked
    assert found.examples == ("layer 0: FFN unit 48 equals FFN unit 0, in weights and in gradient",)
    uneven = rewrite(source.folder, tmp_path / "u", lambda s: ffn_copies(s, 0.75), intermediate_size=96)
    assert certify(uneven, tokens(uneven)).unlocked


@pytest.mark.parametrize(("readers", "alive"), [("zero", False), ("random", True)])
def test_padding_that_zeroes_both_sides_is_dead(source, tmp_path, readers, alive):
    padded = rewrite(
        source.folder, tmp_path / "p", lambda s: pad_hidden(s, source, 48, readers), hidden_size=48
    )
    report = compare_checkpoints(source, padded)
    assert report.verdict == "same"
    assert report.liveness.alive is alive
    assert report.liveness.unlocked
    assert counts(report.liveness)["residual channels"] == (0 if alive else 16, 0)
    if alive:
        gate(report, require_alive=True)
        assert report.liveness.dead_parameters == 0
    else:
        assert report.liveness.dead_parameters > 16 * 128
        with pytest.raises(VerificationError, match="16 of 48 residual channels"):
            gate(report, require_alive=True)


@pytest.mark.parametrize(
    ("zeroed", "alive"),
    [
        (("down_proj",), True),
        (("up_proj",), True),
        (("gate_proj",), True),
        (("up_proj", "down_proj"), False),
        (("gate_proj", "down_proj"), False),
        (("gate_proj", "up_proj"), False),
    ],
)
def test_two_zeros_out_of_three_kill_a_gated_unit(source, tmp_path, zeroed, alive):
    def zero(state):
        for name in zeroed:
            weight = state[f"model.layers.1.mlp.{name}.weight"]
            (weight.T if name == "down_proj" else weight)[5] = 0

    found = certify(open_folder(rewrite(source.folder, tmp_path / "z", zero).folder), tokens(source))
    assert found.alive is alive
    assert counts(found)["FFN units"] == (0 if alive else 1, 0)


def test_an_identity_block_is_alive_and_a_silent_one_is_not(source, tmp_path):
    def zero(names):
        def change(state):
            for name in names:
                state[f"model.layers.1.{name}.weight"].zero_()

        return change

    identity = rewrite(source.folder, tmp_path / "i", zero(["self_attn.o_proj", "mlp.down_proj"]))
    assert certify(identity, tokens(identity)).alive
    silent = rewrite(source.folder, tmp_path / "s", zero(["self_attn.o_proj", "self_attn.v_proj"]))
    found = certify(silent, tokens(silent))
    assert counts(found)["query heads"] == (4, 0)
    assert counts(found)["key-value heads"] == (2, 0)


def test_heads_are_copies_only_with_their_keys(source, tmp_path):
    def copy_head(state, new, old):
        q, o = (
            state["model.layers.0.self_attn.q_proj.weight"],
            state["model.layers.0.self_attn.o_proj.weight"],
        )
        q[8 * new : 8 * new + 8] = q[8 * old : 8 * old + 8]
        o[:, 8 * new : 8 * new + 8] = o[:, 8 * old : 8 * old + 8]

    # Heads 0 and 1 share key-value head 0; heads 2 and 3 share key-value head 1.
    same = rewrite(source.folder, tmp_path / "s", lambda s: copy_head(s, 1, 0))
    assert counts(certify(same, tokens(same)))["query heads"] == (0, 1)
    other = rewrite(source.folder, tmp_path / "o", lambda s: copy_head(s, 2, 0))
    assert certify(other, tokens(other)).unlocked

    def copy_group(state):
        copy_head(state, 2, 0)
        copy_head(state, 3, 1)
        for name in ("k_proj", "v_proj"):
            weight = state[f"model.layers.0.self_attn.{name}.weight"]
            weight[8:16] = weight[:8]

    group = rewrite(source.folder, tmp_path / "g", copy_group)
    found = counts(certify(group, tokens(group)))
    assert found["query heads"] == (0, 2)
    assert found["key-value heads"] == (0, 1)


def test_a_relu_unit_that_is_silent_on_the_text_is_not_dead(tmp_path):
    plain = open_folder(build(tmp_path / "opt", "opt"))

    def silence(state):
        state["model.decoder.layers.0.fc1.bias"][3] = -1000

    quiet = rewrite(plain.folder, tmp_path / "q", silence)
    assert certify(quiet, tokens(quiet)).alive

    def kill(state):
        state["model.decoder.layers.0.fc1.weight"][3] = 0
        state["model.decoder.layers.0.fc1.bias"][3] = 0
        state["model.decoder.layers.0.fc2.weight"][:, 3] = 0

    dead = rewrite(plain.folder, tmp_path / "d", kill)
    assert counts(certify(dead, tokens(dead)))["FFN units"] == (1, 0)


def test_what_the_source_had_is_not_blamed(source, tmp_path):
    def kill(state):
        state["model.layers.1.mlp.up_proj.weight"][5] = 0
        state["model.layers.1.mlp.down_proj.weight"][:, 5] = 0

    lame = rewrite(source.folder, tmp_path / "lame", kill)
    grown = rewrite(lame.folder, tmp_path / "grown", lambda s: ffn_copies(s, 0.75), intermediate_size=96)
    assert not certify(grown, tokens(grown)).alive
    report = compare_checkpoints(lame, grown)
    assert counts(report.liveness)["FFN units"][0] == 2
    assert report.liveness.alive
    gate(report, require_alive=True)
    json.dumps(report.as_dict())
