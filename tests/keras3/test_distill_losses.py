"""Distillation losses as pieces for your own Keras loop: values and gradients; and each inside `Train`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_parts import batches, dense, fitted, points
from whet import keras as side
from whet.data import Batches
from whet.errors import ModelError
from whet.numerics.losses_table import logit_loss
from whet.numerics.namespace import numpy_namespace
from whet.specs import DIST, DKD, BinarySoftTargets, Distill, LogitsMSE, Regression, SoftTargets, Train

L = keras.layers
SPECS = [SoftTargets(), SoftTargets(2.0, standardize=True), BinarySoftTargets(), LogitsMSE(), Regression(), DKD(), DIST()]
LABELS = np.asarray([0, 2, 1, 1, 2, 0])
REAL = np.asarray([True, True, False, True, True, True])


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def logits(spread=3.0, dtype="float64"):
    return [np.random.default_rng(seed).normal(size=(6, 3)).astype(dtype) * np.asarray(spread, dtype) for seed in (1, 2)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(spec):
    """The gradient against central differences of NumPy's float64; the teacher and padded rows get none."""
    s, t = logits()
    student, teacher = tf.Variable(s), tf.Variable(t)
    with tf.GradientTape() as tape:
        loss = side.distillation_loss(spec, student, teacher, LABELS, mask=REAL)
    found, none = tape.gradient(loss, [student, teacher])
    value = lambda z: logit_loss(spec, z, t, LABELS, xp=numpy_namespace, real=REAL)  # noqa: E731
    assert float(loss) == pytest.approx(value(s), rel=1e-10) and none is None
    wanted = np.zeros_like(s)
    for index in np.ndindex(s.shape):
        step = np.zeros_like(s)
        step[index] = 1e-6
        wanted[index] = (value(s + step) - value(s - step)) / 2e-6
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-7)
    assert (found.numpy()[2] == 0).all() and (found.numpy()[0] != 0).any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e4])
def test_gradients_are_finite_at_the_extremes(spec, spread):
    s, t = logits(spread, "float32")
    student = tf.Variable(s)
    with tf.GradientTape() as tape:
        loss = side.distillation_loss(spec, student, t, LABELS)
    assert np.isfinite(tape.gradient(loss, student).numpy()).all()


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
        assert float(found) == pytest.approx(logit_loss(spec, s, t, LABELS, xp=numpy_namespace), rel=1e-6), spec


def test_each_loss_in_training_with_its_weight():
    """The recorded loss of the first epoch is the weighted sum of the losses between the two models' outputs."""
    teacher, student = dense(), dense()
    x, y = points(32)
    s, t = side.predict(student, x), side.predict(teacher, x)
    losses = [SoftTargets(weight=0.5), LogitsMSE(weight=2.0), DKD(weight=0.25), DIST(weight=3.0)]
    wanted = sum(spec.weight * logit_loss(spec, s, t, y, xp=numpy_namespace) for spec in losses)
    spec = Train(epochs=1, apply=[Distill(losses, student_weight=0)])
    _, step = fitted(student, spec, teacher=teacher, train=Batches((x, y), "train", batch=32), val=None)
    assert step.train["history"][0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_student_learns_by_each():
    teacher = dense()
    fitted(teacher, Train(epochs=12, learning_rate=0.03))
    for loss in (DKD(), DIST()):
        _, step = fitted(
            dense(), Train(epochs=12, learning_rate=0.05, apply=[Distill(loss, student_weight=0)]), teacher=teacher
        )
        history = step.train["history"]
        assert history[-1]["loss"] < 0.6 * history[0]["loss"] and history[-1]["metric"] > 0.7, loss


def one_output(activation=None):
    return keras.Sequential([keras.Input((4,)), L.Dense(1, activation=activation)])


def test_one_logit_and_numbers():
    """Binary classifiers and regressors have one output, which a softmax would make constant."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    data = Batches(x, "train", batch=16)
    for loss in (BinarySoftTargets(), Regression()):
        student, teacher = one_output(), one_output()
        spec = Train(epochs=40, learning_rate=0.1, apply=[Distill(loss, student_weight=0)])
        fitted(student, spec, teacher=teacher, train=data, val=None)
        np.testing.assert_allclose(side.predict(student, x), side.predict(teacher, x), atol=0.1)


def test_padded_positions_count_in_no_loss():
    build = lambda: keras.Sequential([keras.Input((None,), dtype="int32"), L.Embedding(9, 8), L.Dense(4)])  # noqa: E731
    student, teacher = build(), build()
    ids = np.random.default_rng(0).integers(1, 9, (6, 5))
    padded, labels = np.zeros((6, 9), int), np.full((6, 9), -100)
    padded[:, :5], labels[:, :5] = ids, ids % 4
    found = []
    for data in ((ids, ids % 4), (padded, labels)):
        losses = [SoftTargets(), LogitsMSE(), DKD(), DIST()]
        spec = Train(epochs=1, apply=[Distill(losses, student_weight=0.3)])
        _, step = fitted(side.copy(student), spec, teacher=teacher, train=Batches(data, "train"), val=None)
        found.append(step.train["history"][0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "teacher", "said"),
    [
        (BinarySoftTargets(), lambda: one_output("sigmoid"), "teacher all lie between 0 and 1, as behind a sigmoid"),
        (DKD(), one_output, "DKD needs logits .* at least two"),
        (SoftTargets(), one_output, "SoftTargets needs logits .* at least two.*BinarySoftTargets"),
    ],
)
def test_what_a_loss_cannot_take_is_named(loss, teacher, said):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    with pytest.raises(ModelError, match=said):
        spec = Train(epochs=1, apply=[Distill(loss, student_weight=0)])
        fitted(one_output(), spec, teacher=teacher(), train=Batches(x, "train"), val=None)


def test_losses_that_need_what_is_not_there():
    spec = Train(epochs=1, apply=[Distill(DKD(), student_weight=0)])
    with pytest.raises(ModelError, match="DKD needs integer targets"):
        fitted(dense(), spec, teacher=dense(), train=Batches(points(32)[0], "train"), val=None)
    spec = Train(epochs=1, apply=[Distill(LogitsMSE())])
    with pytest.raises(ModelError, match="The teacher ends in a softmax, and LogitsMSE compares the logits themselves"):
        fitted(dense(), spec, teacher=dense(softmax=True), train=batches())
