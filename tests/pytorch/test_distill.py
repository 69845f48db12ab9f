"""Distillation in PyTorch: the loss, and a teacher that is never changed."""

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import Rows, Small, batches, examples, run_training, same_state, seeded, small, state_of
from whet import torch as side
from whet.data import Batches
from whet.errors import DataError, ModelError, SpecError
from whet.specs import Distill, SoftTargets, Train
from whet.torch.distill import look_like_probabilities


def textbook(student, teacher, temperature):
    """`T² · Σ p log(p / q)` by the definition, in float64."""
    p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True) for z in (teacher, student))
    return temperature**2 * (p * np.log(p / q)).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 4)])
def test_soft_targets_against_the_textbook(temperature, shape):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=shape) * 3, rng.normal(size=shape) * 3
    student = torch.from_numpy(s).requires_grad_()
    teacher = torch.from_numpy(t).requires_grad_()
    loss = side.soft_targets(student, teacher, temperature)
    assert loss.item() == pytest.approx(textbook(s, t, temperature), rel=1e-12)
    loss.backward()
    assert teacher.grad is None
    # ∂/∂z of T²·KL is T·(q - p), over the number of rows
    q, p = torch.softmax(student.detach() / temperature, -1), torch.softmax(teacher.detach() / temperature, -1)
    torch.testing.assert_close(student.grad, temperature * (q - p) / (student.numel() / shape[-1]))
    assert side.soft_targets(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


def test_soft_targets_of_sixteen_bits_are_computed_in_float32():
    logits = torch.tensor([[300.0, 0.0]], dtype=torch.float16)
    assert side.soft_targets(logits, logits.flip(-1), 1.0).dtype == torch.float32
    assert torch.isfinite(side.soft_targets(logits, logits.flip(-1), 1.0))


def test_soft_targets_refuse_what_does_not_fit():
    with pytest.raises(ModelError, match=r"got \(2, 3\) from the student and \(2, 4\) from the teacher"):
        side.soft_targets(torch.zeros(2, 3), torch.zeros(2, 4), 4.0)
    with pytest.raises(SpecError, match="temperature"):
        side.soft_targets(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


def teacher_of(epochs=6):
    model = small(seed=5)
    run_training(model, Train(epochs=epochs, learning_rate=0.02))
    return model


def test_a_student_learns_from_the_teacher_alone():
    teacher, student = teacher_of(), small(seed=1)
    x, _ = examples(128, seed=9)
    before = np.mean(np.argmax(side.predict(student, x), -1) == np.argmax(side.predict(teacher, x), -1))
    unlabelled = Batches(x, "train", batch=16)
    spec = Train(epochs=8, learning_rate=0.01, apply=[Distill(student_weight=0)])
    _, step = run_training(student, spec, train=unlabelled, val=None, teacher=teacher)
    after = np.mean(np.argmax(side.predict(student, x), -1) == np.argmax(side.predict(teacher, x), -1))
    assert after > 0.9 > before
    assert step.train["history"][-1]["loss"] < 0.2 * step.train["history"][0]["loss"]


def test_the_two_losses_are_weighed():
    losses = {}
    for name, apply in {"none": [], "all": [Distill(student_weight=0)], "some": [Distill(student_weight=0.25)]}.items():
        spec = Train(epochs=1, learning_rate=1e-9, apply=apply)
        _, step = run_training(small(seed=1), spec, teacher=teacher_of(1), val=None, train=batches(32))
        losses[name] = step.train["history"][0]["loss"]
    assert losses["some"] == pytest.approx(0.25 * losses["none"] + 0.75 * losses["all"], rel=1e-5)
    assert losses["all"] != pytest.approx(losses["none"], rel=0.1)


def test_several_soft_targets_are_summed():
    losses = []
    for loss in ([SoftTargets(1.0)], [SoftTargets(6.0)], [SoftTargets(1.0), SoftTargets(6.0)]):
        spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(loss, student_weight=0)])
        _, step = run_training(small(seed=1), spec, teacher=teacher_of(1), val=None, train=batches(32))
        losses.append(step.train["history"][0]["loss"])
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-5)


class WakesTeacher(Small):
    """A student whose forward puts its teacher into training mode, as `student.train()` does when it holds it."""

    def forward(self, x):
        if self.training:
            self.reach[0].train()
        return super().forward(x)


def test_the_teacher_is_never_changed():
    teacher = teacher_of(1)
    teacher.train()
    teacher.bn.eval()
    teacher.drop.p = 0.9
    before = state_of(teacher)
    student = seeded(WakesTeacher)
    object.__setattr__(student, "reach", [teacher])
    run_training(student, Train(epochs=2, apply=[Distill()]), teacher=teacher)
    assert same_state(before, state_of(teacher))
    assert teacher.training and teacher.drop.training and not teacher.bn.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())


def test_the_teachers_mode_comes_back_after_an_error():
    teacher = small().train()
    with pytest.raises(ModelError):
        run_training(small(), Train(epochs=1, apply=[Distill()]), teacher=nn.Sequential(teacher, nn.Softmax(-1)).train())
    assert teacher.training


@pytest.mark.parametrize(
    "student, teacher, said",
    [
        (small, lambda: seeded(Rows), "outputs of the teacher are probabilities"),
        (lambda: nn.Sequential(small(), nn.Softmax(-1)), small, "probabilities"),
        (small, lambda: small(classes=4), r"got \(32, 3\) from the student and \(32, 4\) from the teacher"),
        (small, lambda: None, "Distill needs a teacher.*NoneType"),
        (lambda: small(classes=1), lambda: small(classes=1), "at least two"),
    ],
)
def test_what_cannot_be_distilled_is_named(student, teacher, said):
    with pytest.raises(ModelError, match=said):
        run_training(student(), Train(epochs=1, apply=[Distill(student_weight=0)]), teacher=teacher())


def test_a_teacher_that_shares_weights_with_the_student():
    student = small()
    with pytest.raises(ModelError, match=r"share 'conv\.weight'"):
        run_training(student, Train(epochs=1, apply=[Distill()]), teacher=student)


def test_a_teacher_with_nan_outputs():
    teacher = small()
    with torch.no_grad():
        teacher.head.bias[0] = float("nan")
    with pytest.raises(ModelError, match="teacher returned NaN"):
        run_training(small(), Train(epochs=1, apply=[Distill()]), teacher=teacher)


def test_missing_targets_are_named():
    with pytest.raises(DataError, match=r"no targets.*student_weight=0"):
        spec = Train(epochs=1, apply=[Distill()])
        run_training(small(), spec, teacher=small(seed=1), train=Batches(examples()[0], "train"), val=None)


class Tokens(nn.Module):
    """Logits (n, length, 4) from token ids."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, ids):
        return self.out(self.embed(ids))


def test_padded_positions_count_in_no_loss():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 9, (6, 5))
    labels = ids % 4
    padded_ids, padded_labels = np.zeros((6, 9), int), np.full((6, 9), -100)
    padded_ids[:, :5], padded_labels[:, :5] = ids, labels
    found = []
    for data in ((ids, labels), (padded_ids, padded_labels)):
        spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(student_weight=0.5)])
        _, step = run_training(seeded(Tokens), spec, teacher=seeded(Tokens, 1), train=Batches(data, "train"), val=None)
        found.append(step.train["history"][0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_classes_on_axis_one():
    """Segmentation: logits (n, classes, h, w), targets (n, h, w)."""
    build = lambda seed: seeded(lambda: nn.Conv2d(1, 3, 1), seed)  # noqa: E731
    x, _ = examples(8)
    y = (x[:, 0] > 0).astype(np.int64)
    student, teacher = build(0), build(1)
    expected = textbook(*(np.moveaxis(side.predict(m, x), 1, -1).astype(np.float64) for m in (student, teacher)), 4.0)
    spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(student_weight=0)])
    _, step = run_training(student, spec, teacher=teacher, train=Batches((x, y), "train"), val=None)
    assert step.train["history"][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_probabilities_are_told_from_logits():
    logits = torch.randn(8, 5)
    assert look_like_probabilities(torch.softmax(logits, -1))
    assert look_like_probabilities(torch.softmax(logits, -1).bfloat16())
    assert not look_like_probabilities(logits)
    assert not look_like_probabilities(torch.log_softmax(logits, -1))
    assert not look_like_probabilities(torch.sigmoid(logits))
    assert not look_like_probabilities(torch.ones(8, 1))
