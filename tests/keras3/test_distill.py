"""Distillation: the loss by hand, the teacher untouched, and what is refused."""

import keras
import numpy as np
import pytest

from keras_parts import batches, dense, fitted, nested, points, same_weights
from whet.data import Batches
from whet.errors import ModelError, SpecError
from whet.keras import copy, soft_targets
from whet.keras.distill import ends_in_softmax
from whet.specs import Cubic, Distill, Prune, SoftTargets, Train

L = keras.layers


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def _log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_soft_targets_by_hand():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 5, 4)) * 3
    for temperature in (1.0, 4.0, 20.0):
        ls, lt = _log_softmax(s / temperature), _log_softmax(t / temperature)
        expected = temperature**2 * (np.exp(lt) * (lt - ls)).sum(-1).mean()
        found = float(soft_targets(keras.ops.convert_to_tensor(s), keras.ops.convert_to_tensor(t), temperature))
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ModelError, match=r"got \(5, 4\) from the student and \(5, 3\) from the teacher"):
        soft_targets(s, t[:, :3], 4.0)
    with pytest.raises(SpecError, match="temperature"):
        soft_targets(s, t, 0.0)


def test_a_student_learns_from_the_teacher_alone_and_never_changes_it():
    teacher = dense()
    fitted(teacher, Train(epochs=12, learning_rate=0.03))
    teacher.get_layer("hidden").trainable = False
    before = copy(teacher)
    x, y = points()
    student = dense()
    wrong = Batches((x, (y + 1) % 3), "train", batch=32)  # targets that the weight of 0 must silence
    spec = Train(epochs=15, learning_rate=0.03, apply=[Distill(student_weight=0.0)])
    _, step = fitted(student, spec, teacher=teacher, train=wrong)
    assert step.train["history"][-1]["metric"] > 0.9 and step.train["history"][-1]["loss"] < step.train["history"][0]["loss"]
    assert same_weights(teacher, before) and not teacher.get_layer("hidden").trainable
    assert len(teacher.trainable_weights) == 2 and not teacher.compiled and teacher.predict_function is None


def test_unlabelled_batches_suffice_for_the_teacher_alone():
    x, _ = points()
    spec = Train(epochs=5, learning_rate=0.03, apply=[Distill(student_weight=0)])
    _, step = fitted(dense(), spec, teacher=dense(), train=Batches(x, "train"))
    assert step.train["history"][-1]["loss"] < 0.8 * step.train["history"][0]["loss"]


def test_the_loss_is_the_weighted_sum():
    teacher, student = dense(), dense()
    x, y = points(32)
    from whet.keras import predict

    s, t = predict(student, x), predict(teacher, x)
    supervised = -_log_softmax(s)[np.arange(32), y].mean()
    soft = sum(
        T * T * (np.exp(_log_softmax(t / T)) * (_log_softmax(t / T) - _log_softmax(s / T))).sum(-1).mean() for T in (2.0, 5.0)
    )
    spec = Train(epochs=1, apply=[Distill([SoftTargets(2.0), SoftTargets(5.0)], student_weight=0.3)])
    _, step = fitted(student, spec, teacher=teacher, train=Batches((x, y), "train"), val=None)
    assert step.train["history"][0]["loss"] == pytest.approx(0.3 * supervised + 0.7 * soft, rel=1e-4)


def test_prune_and_distill_together():
    teacher = dense()
    fitted(teacher, Train(epochs=12, learning_rate=0.03))
    student = copy(teacher)
    spec = Train(epochs=6, learning_rate=0.01, apply=[Prune(0.5, schedule=Cubic(frequency=2)), Distill()])
    _, step = fitted(student, spec, teacher=teacher)
    assert step.train["history"][-1]["sparsity"] == 0.5 and step.train["history"][-1]["metric"] > 0.8


def test_dict_outputs_teach_by_their_logits():
    teacher = nested()
    _, step = fitted(copy(teacher), Train(epochs=1, apply=[Distill()]), teacher=teacher)
    assert np.isfinite(step.train["history"][0]["loss"])


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (lambda: unnamed_softmax(), dense, r"outputs of the teacher are probabilities .* Take the softmax off"),
        (dense, lambda: unnamed_softmax(), "outputs of the student are probabilities"),
        (lambda: dense(4), dense, r"got \(32, 3\) from the student and \(32, 4\) from the teacher"),
        (lambda: None, dense, "Distill needs a teacher, a keras.Model; got NoneType"),
    ],
)
def test_teachers_that_cannot_teach(teacher, student, message):
    with pytest.raises(ModelError, match=message):
        fitted(student(), Train(epochs=1, apply=[Distill()]), teacher=teacher(), train=batches())


def unnamed_softmax():
    """Probabilities that no softmax layer has made."""
    model = dense()
    powers = keras.ops.exp(model.outputs[0])
    return keras.Model(model.inputs, powers / keras.ops.sum(powers, -1, keepdims=True))


def nested_softmax():
    i = keras.Input((4,))
    return keras.Model(i, keras.Sequential([*dense().layers, L.Softmax()])(i))


def by_operation():
    model = dense()
    return keras.Model(model.inputs, {"logits": keras.ops.softmax(model.outputs[0]), "other": model.outputs[0]})


@pytest.mark.parametrize("build", [lambda: dense(softmax=True), nested_softmax, by_operation])
def test_a_softmax_at_the_end_is_undone_exactly(build):
    """The loss is the one between models that return the logits themselves, and is told of."""
    from whet.keras import predict

    x, y = points(32)
    normalized, logits = build(), dense()
    for target, source in zip(normalized.weights, logits.weights, strict=True):
        target.assign(source)
    plain, student = dense(), build()
    spec = Train(epochs=1, apply=[Distill([SoftTargets(2.0)], student_weight=0)])
    s, t = predict(plain, x), predict(logits, x)
    expected = 4 * (np.exp(_log_softmax(t / 2)) * (_log_softmax(t / 2) - _log_softmax(s / 2))).sum(-1).mean()
    for target, source in zip(student.weights, plain.weights, strict=True):
        target.assign(source)
    for teacher, learner, told in ((normalized, copy(plain), ["teacher"]), (normalized, student, ["teacher", "student"])):
        _, step = fitted(learner, spec, teacher=teacher, train=Batches((x, y), "train"), val=None)
        assert step.train["history"][0]["loss"] == pytest.approx(expected, rel=1e-4)
        assert [note.split()[1] for note in step.train["notes"] if "softmax" in note] == told


def test_a_softmax_over_other_axes_is_not_undone():
    i = keras.Input((3, 4))
    assert not ends_in_softmax(keras.Model(i, L.Softmax(axis=1)(i))) and ends_in_softmax(keras.Model(i, L.Softmax(axis=2)(i)))
    assert not ends_in_softmax(dense()) and not ends_in_softmax(unnamed_softmax())


def test_nan_and_shared_teachers_are_refused():
    teacher, student = dense(), dense()
    teacher.get_layer("out").bias.assign(np.full(3, np.nan, "float32"))
    with pytest.raises(ModelError, match="teacher returned NaN or Inf"):
        fitted(student, Train(epochs=1, apply=[Distill()]), teacher=teacher)
    with pytest.raises(ModelError, match="share"):
        fitted(student, Train(epochs=1, apply=[Distill()]), teacher=student)
