"""The measurements must be able to fail: each verdict is checked on a model built to earn it."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import pico
from dslm.checkpoint.reader import open_folder
from dslm.errors import VerificationError
from dslm.families.axes import Role, parse_line
from dslm.load import load_model
from dslm.verify import certify, compare_checkpoints, gate
from dslm.verify.exactness import compare_models
from dslm.verify.text import token_windows
from dslm.verify.units import Shuffle, parts_of, unit_positions

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = 2


def build(folder, family="llama", seed=0, **changes):
    """A tiny random model of a family, saved; `changes` go into its config."""
    sizes = dict(SIZES)
    if family == "opt":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
        sizes["word_embed_proj_dim"] = 32
    if family in ("opt", "gpt_neox"):
        sizes.pop("num_key_value_heads")
    if family in ("gemma", "gemma2", "gemma3_text", "qwen3", "llama"):
        sizes["head_dim"] = 8
    config = CONFIG_MAPPING[family](**{**sizes, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def rewrite(source, out, change, **config):
    """Save a copy of a model with its state changed by `change(state)` and config keys replaced."""
    model = AutoModelForCausalLM.from_pretrained(source)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    target = AutoModelForCausalLM.from_config(
        type(model.config).from_dict({**model.config.to_dict(), **config})
    )
    target.load_state_dict(state)
    target.save_pretrained(out)
    return open_folder(out)


def tokens(checkpoint):
    return token_windows([checkpoint], None)[0][0]


def counts(liveness):
    return {space.name: (space.dead, space.locked) for space in liveness.spaces}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_folder(build(tmp_path_factory.mktemp("models") / "source"))


def ffn_copies(state, share):
    """Double every FFN; `share` of each original's down column goes to the original, the rest to the copy."""
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj"):
            state[f"{mlp}.{name}.weight"] = state[f"{mlp}.{name}.weight"].repeat(2, 1)
        down = state[f"{mlp}.down_proj.weight"]
        state[f"{mlp}.down_proj.weight"] = torch.cat([share * down, (1 - share) * down], dim=1)


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


# --- exactness ---------------------------------------------------------------------------------------------


def test_a_model_is_itself_bit_for_bit(source):
    report = compare_checkpoints(source, source)
    assert report.verdict == "identical"
    assert report.comparison.max_difference == report.comparison.kl == 0
    assert report.comparison.agreement == 1
    assert report.comparison.perplexity_a == report.comparison.perplexity_b
    assert 0 < report.floor.max_difference < 1e-4
    assert report.liveness.alive
    assert report.liveness.unlocked
    assert report.text == "random text"
    gate(report, max_kl=0, min_agreement=1, require_alive=True)


def test_an_exact_growth_is_the_same_function(source, tmp_path):
    grown = rewrite(source.folder, tmp_path / "g", lambda s: ffn_copies(s, 0.75), intermediate_size=96)
    report = compare_checkpoints(source, grown)
    assert report.verdict == "same"
    assert report.comparison.kl < 1e-10
    assert report.liveness.unlocked
    assert report.as_dict()["liveness"]["spaces"]["FFN units"]["units"] == 2 * 96


@pytest.mark.parametrize(("noise", "verdict"), [(1e-4, "close"), (0.3, "different")])
def test_a_perturbed_model_is_found(source, tmp_path, noise, verdict):
    def perturb(state):
        state["model.layers.0.mlp.down_proj.weight"] += noise * torch.randn(32, 48)

    other = rewrite(source.folder, tmp_path / "p", perturb)
    report = compare_checkpoints(source, other, liveness=False)
    assert report.verdict == verdict
    assert report.comparison.kl > 100 * report.floor.kl
    assert report.comparison.relative_difference > 10 * report.floor.relative_difference
    with pytest.raises(VerificationError, match=r"KL is .* nats"):
        gate(report, max_kl=report.comparison.kl / 2)
    gate(report, max_kl=report.comparison.kl * 2)


def test_a_model_with_nan_is_different(source, tmp_path):
    def poison(state):
        state["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")

    report = compare_checkpoints(source, rewrite(source.folder, tmp_path / "n", poison), liveness=False)
    assert report.verdict == "different"
    with pytest.raises(VerificationError):
        gate(report, max_kl=1e9)


def test_figures_equal_a_direct_computation(source, tmp_path):
    other = open_folder(build(tmp_path / "other", seed=1))
    windows = [torch.arange(3, 60)[None], torch.arange(60, 100)[None]]
    found, _ = compare_models(source, other, windows)
    models = [AutoModelForCausalLM.from_pretrained(c.folder).double() for c in (source, other)]
    kl, loss, agree, largest, difference = [], ([], []), [], 0.0, 0.0
    for ids in windows:
        with torch.no_grad():
            a, b = (model(ids).logits[0] for model in models)
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl += (log_a.exp() * (log_a - log_b)).sum(-1).tolist()
        agree += (a.argmax(-1) == b.argmax(-1)).tolist()
        largest, difference = max(largest, a.abs().max().item()), max(difference, (a - b).abs().max().item())
        for losses, log in zip(loss, (log_a, log_b), strict=True):
            losses += (-log[:-1].gather(1, ids[0, 1:, None])[:, 0]).tolist()
    assert found.tokens == 97
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.agreement == sum(agree) / len(agree)
    assert found.max_difference == pytest.approx(difference, rel=1e-4)
    assert found.relative_difference == pytest.approx(difference / largest, rel=1e-4)
    for perplexity, losses in zip((found.perplexity_a, found.perplexity_b), loss, strict=True):
        assert perplexity == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize(("family", "variant"), pico.CASES, ids=pico.IDS)
def test_the_floor_is_rounding_and_nothing_else(tmp_path, family, variant):
    """Reordering is exact in every family, it reorders something, and it leaves the model as it was."""
    checkpoint = open_folder(pico.save(pico.make_model(family, variant), tmp_path / family))
    model = load_model(checkpoint, dtype="float32", attention="eager")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shuffle = Shuffle(parts_of(model, checkpoint), checkpoint.family.dimensions(checkpoint.config))
    ids = pico.tokens()
    with torch.no_grad():
        logits = model.double()(ids).logits
        with shuffle.applied():
            again = model(ids).logits
            moved = [
                name
                for name, value in model.state_dict().items()
                if not torch.equal(value.float(), before[name])
            ]
    # Not to float64 precision: some families compute their norms in float32 whatever they are given.
    assert (again - logits).abs().max() < 1e-5 * logits.abs().max()
    assert len(moved) > len(before) / 2
    assert all(torch.equal(value.float(), before[name]) for name, value in model.state_dict().items())


def test_unit_positions():
    sizes = {"heads": 2, "head_dim": 2, "kv_heads": 1, "intermediate": 3, "hidden": 4}
    fused = parse_line("(heads 3 head_dim) <- hidden").axes[0]
    assert unit_positions(fused, "heads", sizes).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    qkv = parse_line("(heads head_dim)+(kv_heads head_dim)+(kv_heads head_dim) <- hidden").axes[0]
    assert unit_positions(qkv, "heads", sizes).tolist() == [[0, 1], [2, 3]]
    assert unit_positions(qkv, "kv_heads", sizes).tolist() == [[4, 5, 6, 7]]
    gated = parse_line("intermediate+intermediate <- hidden").axes[0]
    assert unit_positions(gated, "intermediate", sizes).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert unit_positions(gated, "hidden", sizes) is None


def test_other_vocabularies_are_refused(source, tmp_path):
    other = open_folder(build(tmp_path / "v", vocab_size=130))
    with pytest.raises(VerificationError, match="128 tokens and v 130"):
        compare_checkpoints(source, other)
    with pytest.raises(VerificationError, match="no tokenizer"):
        compare_checkpoints(source, source, "some text")


# --- liveness ----------------------------------------------------------------------------------------------


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
