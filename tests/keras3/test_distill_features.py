"""Losses on features and relations with Keras: the piece, its gradients, relations inside `Train`, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_parts import dense, fitted, points
from whet import keras as side
from whet.data import Batches
from whet.errors import ModelError
from whet.numerics.losses_layers import layer_loss
from whet.numerics.namespace import numpy_namespace
from whet.specs import PKT, RKD, AttentionTransfer, Distill, Features, SimilarityPreserving, SoftTargets, Train

SPECS = [Features("a", "b"), AttentionTransfer("a", "b"), RKD(), SimilarityPreserving(), PKT()]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_values_and_gradients_are_those_of_the_formula(spec):
    s, t = (np.random.default_rng(seed).normal(size=(4, *shape)) for seed, shape in enumerate([(4, 2, 3), (2, 2, 3)]))
    student, teacher = tf.Variable(s), tf.Variable(t)
    with tf.GradientTape() as tape:
        loss = side.layer_loss(spec, student, teacher)
    found, none = tape.gradient(loss, [student, teacher])
    value = lambda z: layer_loss(spec, z, t, xp=numpy_namespace)  # noqa: E731
    assert float(loss) == pytest.approx(value(s), rel=1e-10) and none is None
    for index in [(0, 0, 0, 0), (1, 3, 1, 2), (3, 2, 0, 1)]:
        step = np.zeros_like(s)
        step[index] = 1e-6
        assert found.numpy()[index] == pytest.approx((value(s + step) - value(s - step)) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_gradients_are_finite_where_all_examples_are_equal(spec, value):
    student, teacher = tf.Variable(np.full((3, 2, 2, 4), value, "float32")), np.ones((3, 2, 2, 4), "float32")
    with tf.GradientTape() as tape:
        loss = side.layer_loss(spec, student, teacher)
    assert np.isfinite(float(loss)) and np.isfinite(tape.gradient(loss, student).numpy()).all()


def test_relations_between_outputs_in_training():
    teacher, student = dense(), dense()
    x, y = points(32)
    s, t = side.predict(student, x), side.predict(teacher, x)
    losses = [RKD(weight=0.5), PKT(), SimilarityPreserving(weight=2.0)]
    wanted = sum(spec.weight * layer_loss(spec, s, t, xp=numpy_namespace) for spec in losses)
    spec = Train(epochs=1, apply=[Distill(losses, student_weight=0)])
    _, step = fitted(student, spec, teacher=teacher, train=Batches((x, y), "train", batch=32), val=None)
    assert step.train["history"][0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_layers_are_not_heard_and_that_is_said():
    with pytest.raises(ModelError, match=r"Features of the layer 'hidden' cannot be heard inside Train with a Keras model"):
        fitted(dense(), Train(epochs=1, apply=[Distill([SoftTargets(), Features("hidden", "hidden")])]), teacher=dense())
