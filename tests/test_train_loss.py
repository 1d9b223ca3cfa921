"""The piecewise loss: the stock loss for every family, and a teacher's share of it."""

import pytest
import torch
from torch.nn import functional

import pico
from dslm.logits import divergence
from dslm.train.data import separates
from dslm.train.loss import IGNORED, Distillation, give_loss

PIECE = 5 * pico.VOCAB  # five tokens at a time


def masked_labels(ids):
    labels = ids.clone()
    labels[0, :7] = IGNORED
    return labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "variant"), pico.CASES)
def test_the_loss_and_its_gradients_are_those_of_transformers(family, variant):
    model, ids = pico.make_model(family, variant), pico.tokens()
    labels = masked_labels(ids)
    expected = model(input_ids=ids, labels=labels, num_items_in_batch=50).loss
    wanted = gradients(model, expected)
    give_loss(model, piece=PIECE)
    found = model(input_ids=ids, labels=labels, num_items_in_batch=50)
    torch.testing.assert_close(found.loss, expected, rtol=2e-6, atol=0)
    for name, gradient in gradients(model, found.loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    assert found.row_tokens.tolist() == [23 - 6, 23]


def test_a_row_s_share_of_the_loss():
    model, ids = pico.make_model("llama", "mha"), pico.tokens()
    alone = [model(input_ids=row[None], labels=row[None]).loss.item() * 23 for row in ids]
    give_loss(model, piece=PIECE)
    found = model(input_ids=ids, labels=ids)
    assert found.row_nats.tolist() == pytest.approx(alone, rel=1e-5)
    assert found.loss.item() == pytest.approx(sum(alone) / 46, rel=1e-5)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.3)])
def test_distillation_is_forward_kl_mixed_with_the_labels(temperature, weight):
    student, teacher = pico.make_model("llama", "mha", seed=1), pico.make_model("llama", "mha", seed=2)
    ids = pico.tokens()
    labels = masked_labels(ids)
    q = (student(ids).logits[:, :-1].double() / temperature).softmax(-1)
    p = (teacher(ids).logits[:, :-1].double() / temperature).softmax(-1)
    wanted = labels[:, 1:] != IGNORED
    kl = (p * (p.log() - q.log())).sum(-1)[wanted].mean()
    nats = functional.cross_entropy(student(ids).logits[:, :-1].double()[wanted], labels[:, 1:][wanted])
    expected = ((1 - weight) * nats + weight * temperature**2 * kl).item()
    give_loss(student, Distillation(teacher, temperature, weight), PIECE)
    assert student(input_ids=ids, labels=labels).loss.item() == pytest.approx(
        nats.item(), rel=1e-5
    )  # evaluation
    found = student.train()(input_ids=ids, labels=labels).loss
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_a_teacher_with_a_longer_table_is_read_up_to_the_student_s():
    long, short = torch.randn(3, 12), torch.randn(3, 10)
    assert torch.equal(divergence(long, short, 1.0), divergence(long[:, :10], short, 1.0))


@pytest.mark.parametrize("taught", [False, True])
def test_logits_exist_a_piece_at_a_time(taught):
    model, teacher, ids = pico.make_model("llama", "mha"), pico.make_model("llama", "mha"), pico.tokens()
    seen = {model: [], teacher: []}
    for one, sizes in seen.items():
        one.lm_head.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(out.shape[0]))
    give_loss(model, Distillation(teacher, 1.0, 0.5) if taught else None, piece=PIECE)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for one, sizes in seen.items():
        assert max(sizes, default=0) == (5 if one is model or taught else 0)
        assert sum(sizes) == (2 * 46 if one is model or taught else 0)  # forward, and again for the gradient


def test_a_batch_with_nothing_to_learn_has_a_loss_of_zero_and_gradients():
    model, ids = pico.make_model("llama", "mha"), pico.tokens()
    give_loss(model, piece=PIECE)
    loss = model(input_ids=ids, labels=torch.full_like(ids, IGNORED), num_items_in_batch=9).loss
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("family", sorted({family for family, _ in pico.CASES}))
def test_which_families_keep_documents_apart(family):
    variant = next(v for f, v in pico.CASES if f == family)
    model = pico.make_model(family, variant)
    assert separates(model) is (family != "opt")  # its positions are counted from the mask
