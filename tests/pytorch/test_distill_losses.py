"""Distillation losses as pieces for your own PyTorch loop: values, gradients, 16 bits; and each inside `Train`."""

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import batches, run_training, seeded, small
from whet import torch as side
from whet.data import Batches
from whet.errors import ModelError, SpecError
from whet.numerics.losses_table import logit_loss
from whet.numerics.namespace import numpy_namespace
from whet.specs import DIST, DKD, BinarySoftTargets, Distill, LogitsMSE, Regression, SoftTargets, Train

SPECS = [SoftTargets(), SoftTargets(2.0, standardize=True), BinarySoftTargets(), LogitsMSE(), Regression(), DKD(), DIST()]
LABELS = torch.tensor([0, 2, 1, 1, 2, 0])


def logits(spread=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 3, generator=generator, dtype=torch.float64) * spread).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_the_losss_own_and_the_teacher_gets_none(spec):
    student, teacher = (z.requires_grad_() for z in logits())
    real = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda z: side.distillation_loss(spec, z, teacher.detach(), LABELS, mask=real), [student])
    side.distillation_loss(spec, student, teacher, LABELS, mask=real).backward()
    assert teacher.grad is None and (student.grad[2] == 0).all() and (student.grad[0] != 0).any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e4])
def test_gradients_are_finite_at_the_extremes(spec, spread):
    student, teacher = (z.requires_grad_() for z in logits(spread, torch.float32))
    side.distillation_loss(spec, student, teacher, LABELS).backward()
    assert torch.isfinite(student.grad).all()


def test_the_gradient_of_soft_targets_in_float32_at_high_temperatures():
    """∂/∂z of T²·KL is T·(q - p) over the number of rows, to 1e-4 of float64's where the divergence itself is 1e-5."""
    student, teacher = (z.requires_grad_() for z in logits(1.0, torch.float32))
    side.soft_targets(student, teacher, 100.0).backward()
    q, p = (torch.softmax(z.detach().double() / 100, -1) for z in (student, teacher))
    torch.testing.assert_close(student.grad.double(), 100 * (q - p) / 6, rtol=1e-4, atol=1e-6)


def test_the_pieces_are_the_losses_by_name():
    s, t = logits()
    pieces = [
        (side.soft_targets(s, t, 2.0, standardize=True), SoftTargets(2.0, standardize=True)),
        (side.binary_soft_targets(s, t, 3.0), BinarySoftTargets(3.0)),
        (side.logits_mse(s, t), LogitsMSE()),
        (side.regression(s, t), Regression()),
        (side.dkd(s, t, LABELS, 0.5, 2.0, 3.0), DKD(0.5, 2.0, 3.0)),
        (side.dist(s, t, 0.5, 2.0, 3.0), DIST(0.5, 2.0, 3.0)),
    ]
    for found, spec in pieces:
        wanted = logit_loss(spec, s.numpy(), t.numpy(), LABELS.numpy(), xp=numpy_namespace)
        assert found.item() == pytest.approx(wanted, rel=1e-9), spec
    with pytest.raises(SpecError, match=r"DKD\.beta"):
        side.dkd(s, t, LABELS, 1.0, -1.0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sixteen_bits_are_computed_in_float32(spec):
    s, t = logits(30.0, torch.bfloat16)
    found = side.distillation_loss(spec, s, t, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, side.distillation_loss(spec, s.float(), t.float(), LABELS))


def test_each_loss_in_training_with_its_weight():
    """The recorded loss of the first epoch is the weighted sum of the losses between the two models' outputs."""
    teacher, data = small(seed=5), batches(32, batch=32)
    x, y = data.first()
    losses = [SoftTargets(weight=0.5), LogitsMSE(weight=2.0), DKD(weight=0.25), DIST(weight=3.0)]
    student = small(seed=1).eval()  # dropout and batch norm as predict sees them
    for module in student.modules():
        module.train = lambda mode=True, m=module: m
    s, t = side.predict(student, x), side.predict(teacher, x)
    wanted = sum(spec.weight * logit_loss(spec, s, t, y, xp=numpy_namespace) for spec in losses)
    spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(losses, student_weight=0)])
    _, step = run_training(student, spec, teacher=teacher, train=data, val=None)
    assert step.train["history"][0]["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("spec", [LogitsMSE(), DKD(), DIST(), SoftTargets(2.0, standardize=True)], ids=str)
def test_a_student_learns_by_each(spec):
    teacher = small(seed=5)
    run_training(teacher, Train(epochs=6, learning_rate=0.02))
    train = Train(epochs=5, learning_rate=0.02, apply=[Distill(spec, student_weight=0)])
    _, step = run_training(small(seed=1), train, teacher=teacher)
    history = step.train["history"]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"] and history[-1]["metric"] > 0.7


def test_one_logit_and_numbers():
    """Binary classifiers and regressors have one output, which a softmax would make constant."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    build = lambda seed: seeded(lambda: nn.Linear(4, 1), seed)  # noqa: E731
    for loss in (BinarySoftTargets(), Regression()):
        spec = Train(epochs=40, learning_rate=0.1, apply=[Distill(loss, student_weight=0)])
        student, teacher = build(0), build(1)
        run_training(student, spec, teacher=teacher, train=Batches(x, "train", batch=16), val=None)
        np.testing.assert_allclose(side.predict(student, x), side.predict(teacher, x), atol=0.1)
    with pytest.raises(ModelError, match=r"SoftTargets needs logits .* at least two.*BinarySoftTargets"):
        spec = Train(epochs=1, apply=[Distill(student_weight=0)])
        run_training(build(0), spec, teacher=build(1), train=Batches(x, "train", batch=16), val=None)


def test_what_a_loss_cannot_take_is_named():
    x = np.random.default_rng(0).normal(size=(64, 1, 6, 6)).astype(np.float32)
    with pytest.raises(ModelError, match="DKD needs integer targets"):
        spec = Train(epochs=1, apply=[Distill(DKD(), student_weight=0)])
        run_training(small(), spec, teacher=small(seed=1), train=Batches(x, "train", batch=16), val=None)
    with pytest.raises(ModelError, match="teacher all lie between 0 and 1, as behind a sigmoid"):
        spec = Train(epochs=1, apply=[Distill(BinarySoftTargets(), student_weight=0)])
        run_training(small(), spec, teacher=nn.Sequential(small(seed=1), nn.Sigmoid()))
    with pytest.raises(ModelError, match=r"teacher are probabilities .* DIST takes logits"):
        spec = Train(epochs=1, apply=[Distill(DIST(), student_weight=0)])
        run_training(small(), spec, teacher=nn.Sequential(small(seed=1), nn.Softmax(-1)))
