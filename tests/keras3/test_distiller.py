"""Losses on layers, several teachers and stored outputs inside the user's own fit: what `whet.distill` does."""

import keras
import numpy as np
import pytest

import whet
from whet import (
    CRD,
    RKD,
    AttentionTransfer,
    Cubic,
    Distill,
    EarlyStopping,
    Features,
    Prune,
    SoftTargets,
    TeacherConfidence,
    Train,
)
from whet.errors import ModelError, SpecError
from whet.keras import DistillationCallback, Distiller, EarlyStoppingCallback, PruningCallback

L = keras.layers
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(48, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int64") + (X[:, 1] > 0)
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RATE = 0.01
SEVERAL = Distill([SoftTargets(3.0)], student_weight=0.3, teachers=TeacherConfidence())
INSIDE = Distill([SoftTargets(3.0), Features("hidden", "hidden"), RKD("hidden", "hidden")], student_weight=0.3)
MAPS = [Features("hidden", "hidden", learning_rate=RATE), CRD(dimension=4, learning_rate=RATE)]
MAPPED = Distill([SoftTargets(3.0), *MAPS], student_weight=0.3)


def network(seed, width=8, penalty=None):
    keras.utils.set_random_seed(seed)
    hidden = L.Dense(width, activation="relu", name="hidden", kernel_regularizer=penalty)
    return keras.Sequential([keras.Input((6,)), hidden, L.Dense(3, name="out")])


def compiled(model, **options):
    model.compile(keras.optimizers.Adam(RATE), LOSS, **options)
    return model


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": 16, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def by_whet(student, teacher, spec):
    train = Train(epochs=2, learning_rate=RATE, decay=None)
    return whet.distill(student, teacher, spec, fit=train, train=BATCHES, progress=False).model


def assert_alike(student, expected):
    for found, wanted in zip(student.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-6)


@pytest.fixture(scope="module")
def teachers():
    made = [compiled(network(seed, 8)) for seed in (5, 6)]
    for model in made:
        fit(model, epochs=10)
    return made


def test_a_callback_takes_several_teachers(teachers):
    student = compiled(network(0))
    fit(student, DistillationCallback(SEVERAL, teachers))
    assert_alike(student, by_whet(network(0), teachers, SEVERAL))


def test_a_callback_hears_layers_and_penalties_count_in_full(teachers):
    student = compiled(network(0, penalty="l2"))
    history = fit(student, DistillationCallback(INSIDE, teachers[0]), validation_data=(X, Y)).history
    assert_alike(student, by_whet(network(0, penalty="l2"), teachers[0], INSIDE))
    assert "call" not in vars(student.layers[0]) and "compute_loss" not in vars(student)
    assert history["val_loss"][-1] == pytest.approx(student.evaluate(X, Y, verbose=0), rel=1e-5)


def test_a_callback_looks_stored_outputs_up(teachers, tmp_path):
    store = whet.teacher_outputs(teachers[0], (X, Y), tmp_path / "store", progress=False)
    spec = Distill([SoftTargets(3.0)], student_weight=0.3)
    student, live = compiled(network(0), jit_compile=True), compiled(network(0))
    fit(student, DistillationCallback(spec, store), shuffle=True)
    assert student.jit_compile and fit(student).history["loss"]  # compiled as it was
    keras.utils.set_random_seed(0)
    student = compiled(network(0))
    fit(student, DistillationCallback(spec, store))
    fit(live, DistillationCallback(spec, teachers[0]))
    assert_alike(student, live)


def test_a_distiller_trains_maps_and_leaves_a_plain_student(teachers):
    student = network(0, 5)
    distiller = compiled(Distiller(student, teachers[0], MAPPED), metrics=["accuracy"])
    begun = [np.array(weight) for weight in distiller.weights if "hidden" not in weight.path and "out" not in weight.path]
    before = [array.copy() for array in teachers[0].get_weights()]
    history = fit(distiller, validation_data=(X, Y)).history
    assert_alike(student, by_whet(network(0, 5), teachers[0], MAPPED))
    assert len(begun) == 6 and set(history) == {"accuracy", "loss", "val_accuracy", "val_loss"}
    assert all(np.array_equal(a, b) for a, b in zip(teachers[0].get_weights(), before, strict=True))
    loss = float(LOSS(Y, student(X)))
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-4) and type(student) is keras.Sequential
    np.testing.assert_array_equal(distiller.predict(X, verbose=0), student.predict(X, verbose=0))


def test_a_distiller_prunes_and_stops_early_and_learns_without_labels(teachers):
    student = network(0, 5)
    distiller = Distiller(student, teachers, Distill(student_weight=0))
    distiller.compile(keras.optimizers.Adam(RATE))
    pruning = PruningCallback(Prune(0.5, schedule=Cubic(end=0.5, frequency=1)))
    stopping = EarlyStoppingCallback(EarlyStopping(patience=1, min_delta=9.0), monitor="loss", after=pruning)
    history = fit(distiller, stopping, pruning, epochs=8).history["loss"]
    assert set(pruning.masks) == {"hidden/kernel", "out/kernel"} and pruning.sparsity == pytest.approx(0.5, abs=0.02)
    assert len(history) < 8 and stopping.best_epoch >= 3 and np.mean(student.layers[0].get_weights()[0] == 0) == 0.5
    agreed = (student.predict(X, verbose=0).argmax(1) == teachers[0].predict(X, verbose=0).argmax(1)).mean()
    assert history[stopping.best_epoch] < history[0] and agreed > 0.4


def test_what_cannot_be_is_said(teachers):
    with pytest.raises(SpecError, match=r"CRD trains a linear map.*Use whet\.keras\.Distiller"):
        fit(compiled(network(0)), DistillationCallback(Distill([SoftTargets(), CRD()]), teachers[0]))
    with pytest.raises(ModelError, match=r"'nowhere' matches no layer of the student"):
        Distiller(network(0), teachers[0], Distill([SoftTargets(), AttentionTransfer("nowhere", "hidden")]))
    with pytest.raises(ModelError, match="NaN or Inf"):
        broken = network(1)
        broken.set_weights([np.full_like(array, np.nan) for array in broken.get_weights()])
        Distiller(network(0), broken)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = L.Dense(3)

        def call(self, x):
            return self.out(x)

    own = Own()
    own(X[:2])
    with pytest.raises(SpecError, match="example="):
        Distiller(own, teachers[0])
    assert Distiller(own, teachers[0], example=(X[:4], Y[:4])).student is own
