"""Prune, distill and quantize inside the user's own fit, by Keras' own."""

import keras
import numpy as np
import pytest

import whet
from whet import QAT, Cubic, Distill, EarlyStopping, Int, Prune, Quantize, SoftTargets, Train
from whet.errors import MetricError, ModelError
from whet.keras.callbacks import DistillationCallback, EarlyStoppingCallback, PruningCallback

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(96, 8)).astype(np.float32)
Y = ((X[:, :4].sum(1) > 0) + 2 * (X[:, 4] > 0)).astype(np.int64)
TAUGHT = Distill([SoftTargets(temperature=4.0)], student_weight=0.4)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(width=16, seed=0, softmax=False):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    end = [layers.Softmax()] if softmax else []
    return keras.Sequential([keras.Input((8,)), layers.Dense(width, activation="relu"), layers.Dense(4), *end])


def compiled(model, rate=0.01):
    model.compile(keras.optimizers.Adam(rate), LOSS, metrics=["accuracy"])
    return model


def fit(model, callbacks, epochs=1, **options):
    options = {"batch_size": 32, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=callbacks, **options)


@pytest.mark.parametrize("softmax", [False, True])
def test_a_fit_with_a_teacher_is_what_whet_distill_does(softmax):
    teacher = network(32, seed=5, softmax=softmax)
    batches = [(X[i : i + 32], Y[i : i + 32]) for i in range(0, 96, 32)]
    expected = whet.distill(
        network(), teacher, TAUGHT, fit=Train(epochs=1, learning_rate=0.01, decay=None), train=batches, progress=False
    )
    student, before = compiled(network()), [w.copy() for w in teacher.get_weights()]
    fit(student, [DistillationCallback(TAUGHT, teacher)])
    for found, wanted in zip(student.get_weights(), expected.model.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert all(np.array_equal(one, other) for one, other in zip(teacher.get_weights(), before, strict=True))


def test_the_model_is_as_it_was_afterwards_and_validation_shows_its_own_loss():
    teacher, student, twin = network(32, seed=5), compiled(network(), 1e-9), compiled(network(), 1e-9)
    for model in (student, twin):
        fit(model, [])  # a training step that is compiled before the teacher comes
    own = fit(twin, [], validation_data=(X, Y)).history
    taught = fit(student, [DistillationCallback(TAUGHT, teacher)], validation_data=(X, Y)).history
    assert taught["val_loss"][0] == pytest.approx(own["val_loss"][0], rel=1e-4)
    assert abs(taught["loss"][0] - own["loss"][0]) > 0.05
    assert "compute_loss" not in vars(student) and fit(student, []).history["loss"][0] == pytest.approx(
        own["loss"][0], rel=1e-4
    )


def test_prune_distill_and_quantization_aware_training_in_one_fit_each(tmp_path):
    pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("LiteRT files are written on the TensorFlow backend")
    teacher, student = compiled(network(32, seed=5)), compiled(network())
    fit(teacher, [], epochs=20)
    fit(student, [], epochs=20)
    pruning = PruningCallback(Prune(0.5, schedule=Cubic(end=0.5, frequency=1)))
    fit(student, [DistillationCallback(TAUGHT, teacher), pruning], epochs=6)
    assert pruning.sparsity == pytest.approx(0.5, abs=0.02)
    spec = Quantize(Int(8), qat=QAT(observe=0.25))
    prepared = compiled(whet.keras.prepare(student, spec, calibration=X, masks=pruning.masks, steps=12, progress=False), 1e-3)
    stopping = EarlyStoppingCallback(EarlyStopping(patience=3), monitor="loss")
    fit(prepared, [DistillationCallback(TAUGHT, teacher), stopping], epochs=4)
    assert stopping.is_eligible and stopping.best_epoch is not None
    made = whet.finish(prepared, example=X[:1], masks=pruning.masks)
    evidence = whet.measure(made.export(tmp_path / "model.tflite"), (X, Y), progress=False)
    assert evidence.metric["value"] > 0.8 and "int8" in evidence.dtypes["stored"]
    assert np.mean(made.float_model.layers[0].get_weights()[0] == 0) > 0.4


def test_the_best_is_at_the_final_sparsity_and_comes_back():
    student = compiled(network())
    fit(student, [], epochs=15)  # already good: every epoch of the ramp would be best
    pruning = PruningCallback(Prune(0.9, schedule=Cubic(end=0.6, frequency=1)))
    stopping = EarlyStoppingCallback(EarlyStopping(patience=2, min_delta=0.5), after=pruning)
    history = fit(student, [stopping, pruning], epochs=20, validation_data=(X, Y)).history["val_loss"]
    assert len(history) < 18 and stopping.best_epoch >= 11 and min(history) < history[stopping.best_epoch]
    assert float(student.evaluate(X, Y, verbose=0)[0]) == pytest.approx(history[stopping.best_epoch], abs=1e-5)
    assert np.mean(student.layers[0].get_weights()[0] == 0) == pytest.approx(0.9, abs=0.02)


def test_early_stopping_goes_on_where_its_state_was_taken():
    first = EarlyStoppingCallback(EarlyStopping(patience=2))
    second = EarlyStoppingCallback(EarlyStopping(patience=2))
    model = compiled(network(), 1e-9)
    first.set_model(model)
    first.on_train_begin()
    first.on_epoch_end(0, {"val_loss": 1.0})
    first.on_epoch_end(1, {"val_loss": 2.0})
    second.load_state_dict(first.state_dict())
    second.set_model(model)
    second.on_train_begin()
    assert not model.stop_training
    second.on_epoch_end(2, {"val_loss": 3.0})
    assert model.stop_training and second.best_epoch == 0
    assert np.array_equal(second.state_dict()["best"][0], model.get_weights()[0])


def test_what_cannot_be_is_said():
    teacher = network(32, seed=5)
    with pytest.raises(ModelError, match="Distill needs a teacher"):
        fit(compiled(network()), [DistillationCallback(TAUGHT, None)])

    class Own(keras.Sequential):
        def train_step(self, *args):
            return {"loss": keras.ops.zeros(())}

    model = Own([keras.Input((8,)), keras.layers.Dense(4)])
    model.compile("adam", LOSS, run_eagerly=True)
    with pytest.raises(ModelError, match="did not call compute_loss"):
        fit(model, [DistillationCallback(TAUGHT, teacher)])
    with pytest.raises(MetricError, match="monitor='val_loss' is not among what this training tells: accuracy, loss"):
        fit(compiled(network()), [EarlyStoppingCallback(EarlyStopping())])
