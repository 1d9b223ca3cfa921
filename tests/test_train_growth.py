"""Training what was grown: the recipe follows the small model's own trajectory, and freezing keeps what was there."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import growing
import pico
from dslm.checkpoint.reader import open_folder
from dslm.errors import RecipeError
from dslm.train.growth import (
    BETAS,
    NEW,
    REWARM,
    Scale,
    freeze_old,
    growth_scale,
    parameter_groups,
    recorded_growth,
)
from dslm.train.loss import give_loss
from dslm.train.save import table_lines
from dslm.train.trainer import GroupTrainer

UNTIED = {"llama": "mha", "qwen3": "mha", "gemma2": "wide-heads-untied", "olmo2": "mha", "phi": "mha"}


def loaded(folder):
    """A model in float64, its checkpoint, and its parameters' lines of the table."""
    checkpoint = open_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model, checkpoint, table_lines(model, checkpoint)


def losses(model, scales, *, steps=50, rate=3e-3, decay=0.1):
    """The losses of so many steps of AdamW, every step on its own tokens."""
    give_loss(model)
    groups = parameter_groups(model.named_parameters(), scales, rate=rate, weight_decay=decay)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS)
    found = []
    for step in range(steps):
        ids = pico.tokens(seed=step)
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def grown_twice(family, variant, place, **options):
    source = pico.save(pico.make_model(family, variant, dtype=torch.float64), place / "small")
    sizes = open_folder(source).sizes
    return source, growing.grow(source, place / "grown", growing.doubled(sizes), **options)


@pytest.mark.parametrize("family", UNTIED)
def test_a_grown_model_follows_the_small_one_s_trajectory(family, tmp_path):
    small, grown = grown_twice(family, UNTIED[family], tmp_path, split="even")
    model, checkpoint, lines = loaded(grown)
    growth = recorded_growth(checkpoint)
    scales = {name: growth_scale(line, growth) for name, line in lines.items()}
    expected = losses(loaded(small)[0], {})
    assert expected[0] - expected[-1] > 0.5  # it learned something worth following
    assert losses(model, scales) == pytest.approx(expected, abs=1e-5)
    plain = losses(loaded(grown)[0], {})
    assert max(abs(a - b) for a, b in zip(plain, expected, strict=True)) > 1e-2


def test_what_was_added_learns_faster_and_copies_slower(tmp_path):
    source = pico.save(pico.make_model("llama", "mha"), tmp_path / "small")
    sizes = open_folder(source).sizes
    wider = sizes.replace(intermediate_size=2 * sizes.intermediate_size)
    found = {}
    for method in ("hypercloning", "padding"):
        checkpoint = open_folder(growing.grow(source, tmp_path / method, wider, method=method))
        growth = recorded_growth(checkpoint)
        layout = checkpoint.family.layout(checkpoint.config)
        name = "model.layers.0.mlp.{}_proj.weight"
        found[method] = [growth_scale(layout[name.format(part)], growth) for part in ("down", "up")]
    assert found["hypercloning"] == [Scale(0.5, 1.0, 2.0), Scale(1.0, 0.5, 1.0)]
    half_new = Scale((1 + NEW) / 2, 1.0, 1.0, new=NEW / (1 + NEW))
    assert found["padding"] == [half_new, half_new]


@pytest.mark.parametrize("method", ["hypercloning", "padding"])
def test_freezing_trains_only_what_was_added(method, tmp_path):
    _, grown = grown_twice("llama", "mha", tmp_path, method=method)
    model, checkpoint, lines = loaded(grown)
    growth = recorded_growth(checkpoint)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    named = dict(model.named_parameters())
    learning = freeze_old([(named[name], line) for name, line in lines.items()], growth)
    losses(model, {}, steps=3, decay=0.0)
    changed = 0
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != before[name]
        changed += int(moved.sum())
        old = torch.ones_like(moved)
        for position, axis in enumerate(growth.tensor_map(lines[name]).axes):
            if axis is not None:
                kept = ~torch.from_numpy(axis.added)
                old &= kept.view([-1 if i == position else 1 for i in range(moved.dim())])
        assert not (moved & old).any(), name
    assert 0.9 * learning < changed <= learning


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_new_block_of_a_wider_model_learns_as_what_is_new(family, tmp_path):
    source = open_folder(pico.save(pico.make_model(family, "mha"), tmp_path / "small"))
    target = growing.doubled(source.sizes).replace(num_hidden_layers=4)
    checkpoint = open_folder(growing.grow(source, tmp_path / "grown", target, split="even"))
    growth = recorded_growth(checkpoint)
    lines = checkpoint.family.layout(checkpoint.config).values()
    assert {growth_scale(line, growth) for line in lines if line.layer == 1} == {Scale(rate=NEW, new=1.0)}


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_all_of_a_new_block_is_new(family, tmp_path):
    source = open_folder(pico.save(pico.make_model(family, "mha"), tmp_path / "small"))
    deeper = source.sizes.replace(num_hidden_layers=4)
    model, checkpoint, lines = loaded(growing.grow(source, tmp_path / "grown", deeper))
    growth = recorded_growth(checkpoint)
    layers = {line.layer: growth_scale(line, growth) for line in lines.values()}
    assert layers == {None: Scale(), 0: Scale(), 1: Scale(rate=NEW, new=1.0), 2: Scale(), 3: Scale()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    named = dict(model.named_parameters())
    learning = freeze_old([(named[name], line) for name, line in lines.items()], growth)
    losses(model, {}, steps=3, decay=0.0)
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    assert moved == {name: line.layer == 1 for name, line in lines.items()}
    assert learning == sum(p.numel() for name, p in named.items() if lines[name].layer == 1)


def rates(folder, scales, *, steps, warmup):
    """Parameter -> its rate in every step, under a Trainer that has the scales."""
    model, _, lines = loaded(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), learning_rate=1.0, warmup_steps=warmup, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = GroupTrainer(scales=scales, model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(steps)
    groups = trainer.optimizer.param_groups
    found = {name: [] for name in lines}
    for _ in range(steps):
        for name, parameter in model.named_parameters():
            found[name] += [group["lr"] for group in groups if any(p is parameter for p in group["params"])]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 2])
def test_what_is_new_warms_up_by_itself(warmup, tmp_path):
    source = open_folder(pico.save(pico.make_model("llama", "mha"), tmp_path / "small"))
    target = source.sizes.replace(
        intermediate_size=2 * source.sizes.intermediate_size,
        num_hidden_layers=source.sizes.num_hidden_layers + 1,
    )
    grown = growing.grow(source.folder, tmp_path / "grown", target, method="padding")
    checkpoint = open_folder(grown)
    growth = recorded_growth(checkpoint)
    (new,) = growth.new_blocks
    scales = {name: growth_scale(line, growth) for name, line in loaded(grown)[2].items()}
    found = rates(grown, scales, steps=40, warmup=warmup)
    curve = found["model.norm.weight"]
    assert curve[warmup] == 1.0
    assert curve[-1] < 0.03
    rise = [min(1.0, (step + 1) / (40 * REWARM + 1)) for step in range(40)]
    assert rise[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    alone = [NEW * run * own for run, own in zip(curve, rise, strict=True)]
    assert found[f"model.layers.{new}.mlp.up_proj.weight"] == pytest.approx(alone)
    mixed = [(run + own) / 2 for run, own in zip(curve, alone, strict=True)]
    assert found[f"model.layers.{new - 1}.mlp.up_proj.weight"] == pytest.approx(mixed)


def test_a_model_without_a_record_of_growth_is_refused(tmp_path):
    source = pico.save(pico.make_model("llama", "mha"), tmp_path / "small")
    with pytest.raises(RecipeError, match="small has no record of how it was grown"):
        recorded_growth(open_folder(source))
    (source / "dslm.json").write_text('{"plan": {"model": "x"}}')
    with pytest.raises(RecipeError, match=r"the record of small \(dslm.json\) cannot be read"):
        recorded_growth(open_folder(source))


def test_a_record_of_other_sizes_is_refused(tmp_path):
    _, grown = grown_twice("llama", "mha", tmp_path)
    record = (grown / "dslm.json").read_text()
    small = tmp_path / "small"
    (small / "dslm.json").write_text(record)
    with pytest.raises(RecipeError, match="small does not have the sizes that its record says"):
        recorded_growth(open_folder(small))
