"""Training a copy: masks, schedules, early stopping, the best weights, and what is refused."""

import math
import random

import keras
import numpy as np
import pytest

from keras_parts import batches, cnn, dense, fitted, nested, points, same_weights, undrawn
from whet.data import Batches
from whet.errors import DataError, ModelError, SpecError
from whet.keras import copy, predict
from whet.keras.views import views
from whet.specs import Cubic, Distill, EarlyStopping, Metric, Prune, Train

L = keras.layers


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def test_it_learns_and_says_how():
    model = dense()
    masks, step = fitted(model, Train(epochs=6, learning_rate=0.05))
    history = step.train["history"]
    assert masks == {} and step.train["metric"] == "accuracy" and step.spec == {"Train": {"epochs": 6, "learning_rate": 0.05}}
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and history[-1]["metric"] > 0.9
    rates = [0.05 * 0.5 * (1 + math.cos(math.pi * step / 18)) for step in (2, 5, 8, 11, 14, 17)]
    assert [row["learning_rate"] for row in history] == pytest.approx(rates)
    best = max(history, key=lambda row: row["metric"])
    assert step.train["stop"] == {"reason": "ran all 6 epochs", "best_epoch": best["epoch"], "epochs": 6}
    x, y = points(40, seed=1)
    assert (predict(model, x).argmax(1) == y).mean() == pytest.approx(best["metric"])  # the best weights are back
    assert not model.compiled and model.train_function is None


def test_masks_hold_through_every_step_and_end_at_the_target():
    model = dense()
    spec = Train(epochs=5, learning_rate=0.02, apply=[Prune(0.5, schedule=Cubic(frequency=2, end=0.5))])
    masks, step = fitted(model, spec)
    sparsity = [row["sparsity"] for row in step.train["history"]]
    assert sparsity == sorted(sparsity) and 0 < sparsity[0] < 0.5 and sparsity[-1] == 0.5
    assert [row["eligible"] for row in step.train["history"]] == [False, False, True, True, True]
    assert step.train["stop"]["best_epoch"] >= 3
    assert undrawn(step.changed) == (
        {"name": "hidden/kernel", "parameters": 32, "sparsity": 0.5},
        {"name": "out/kernel", "parameters": 24, "sparsity": 0.5},
    )
    for name, view in views(model).items():
        assert np.array_equal(view.array == 0, masks[name] == 0)


def test_masks_are_held_while_it_trains():
    model = dense()
    mask = (np.arange(32).reshape(4, 8) % 3 > 0).astype(np.uint8)
    seen = []

    def look(outputs, targets):
        seen.append(np.asarray(model.get_layer("hidden").kernel) == 0)
        return 0.5

    fitted(model, Train(epochs=2, learning_rate=0.05), masks={"hidden/kernel": mask}, metric=Metric(look, per_example=False))
    assert len(seen) == 2 and all(np.array_equal(zeros, mask == 0) for zeros in seen)


def test_masks_that_came_in_persist_without_a_prune():
    model = dense()
    mask = (np.arange(32).reshape(4, 8) % 3 > 0).astype(np.uint8)
    masks, step = fitted(model, Train(epochs=2, learning_rate=0.05), masks={"hidden/kernel": mask})
    assert np.array_equal(masks["hidden/kernel"], mask)
    assert np.array_equal(np.asarray(model.get_layer("hidden").kernel) == 0, mask == 0)
    assert step.changed == ({"name": "hidden/kernel", "parameters": 32, "sparsity": 11 / 32},)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_process_alone():
    x = np.random.default_rng(0).normal(size=(40, 8, 8, 1)).astype("float32")
    data = Batches((x, np.arange(40) % 10), "train", batch=16)  # the last batch has 8
    start = cnn(dropout=0.5, norm=True)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].copy()
    made = [copy(start) for _ in range(3)]
    made[1].get_layer("drop")(x[:1], training=True)  # dropout has drawn before: the seed must begin it anew
    for model, seed in zip(made, (7, 7, 8), strict=True):
        fitted(model, Train(epochs=2), train=data, val=None, seed=seed)
    assert same_weights(made[0], made[1]) and not same_weights(made[0], made[2])
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert keras.config.dtype_policy().name == "float32"


class _Scripted:
    """A metric that follows a script, whatever the outputs are."""

    def __init__(self, values):
        self.values, self.calls = values, 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return self.values[min(self.calls, len(self.values)) - 1]


def scripted(*values):
    return Metric(_Scripted(values), per_example=False, name="scripted")


@pytest.mark.parametrize(
    ("values", "patience", "best", "ran"),
    [([0.5, 0.6, 0.6, 0.6, 0.9], 2, 2, 4), ([0.9, 0.1, 0.2, 0.95, 0.1], 3, 4, 6), ([0.1] * 9, 1, 1, 2)],
)
def test_early_stopping_is_the_state_machine(values, patience, best, ran):
    spec = Train(epochs=6, early_stopping=EarlyStopping(patience=patience))
    _, step = fitted(dense(), spec, metric=scripted(*values))
    assert (step.train["stop"]["best_epoch"], step.train["stop"]["epochs"]) == (best, ran)


def test_the_best_weights_are_restored_with_batch_norm_statistics():
    x = np.random.default_rng(0).normal(2, 3, size=(64, 8, 8, 1)).astype("float32")
    data = Batches((x, np.arange(64) % 10), "train", batch=32)
    first, both = cnn(norm=True), None
    both = copy(first)
    fitted(first, Train(epochs=1, decay=None), train=data, val=data, metric=scripted(1.0))
    fitted(both, Train(epochs=4, decay=None), train=data, val=data, metric=scripted(1.0, 0.5, 0.5, 0.5))
    assert same_weights(first, both)
    assert float(np.abs(np.asarray(both.get_layer("norm").moving_mean)).max()) > 0


def test_stopping_waits_for_the_ramp():
    spec = Train(
        epochs=8,
        apply=[Prune(0.5, schedule=Cubic(frequency=2, end=0.6))],
        early_stopping=EarlyStopping(patience=1),
    )
    _, step = fitted(dense(), spec, metric=scripted(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2))
    assert step.train["stop"]["best_epoch"] == 5 and step.train["stop"]["epochs"] == 6
    assert step.train["history"][-1]["sparsity"] == 0.5


def test_without_val_the_loss_on_train_decides():
    _, step = fitted(dense(), Train(epochs=3, learning_rate=0.02), val=None)
    assert step.train["metric"] == "loss on train" and all(row["metric"] is None for row in step.train["history"])
    assert step.train["stop"]["best_epoch"] == 3 and "there is no val" in step.train["notes"][0]


def test_a_diverging_loss_is_an_error_and_the_weights_go_back():
    model = dense()
    before = copy(model)
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return keras.ops.mean(outputs) * float("nan" if len(calls) > 1 else 1)

    with pytest.raises(ModelError, match=r"The loss is nan in epoch 1, batch 0\. Lower Train\.learning_rate"):
        fitted(model, Train(epochs=2, loss=loss))
    assert same_weights(model, before)


def test_a_metric_that_is_never_finite_is_an_error():
    model = dense()
    model.get_layer("out").bias.assign(np.full(3, 3e38, "float32"))
    model.get_layer("out").kernel.assign(np.full((8, 3), 3e38, "float32"))
    with pytest.raises(ModelError, match="NaN or Inf"):
        fitted(model, Train(epochs=1, learning_rate=1e-9, loss=lambda o, t: keras.ops.mean(keras.ops.tanh(o))))


def test_a_model_that_ends_in_a_softmax_learns_from_its_probabilities():
    model = dense(softmax=True)
    twin = dense()
    twin.set_weights(model.get_weights())
    spec = Train(epochs=3, learning_rate=0.02)
    _, step = fitted(model, spec)
    _, plain = fitted(twin, spec)
    losses = [[row["loss"] for row in made.train["history"]] for made in (step, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_regression_weight_decay_and_the_users_loss():
    x, _ = points()
    data = Batches((x, x.sum(1)), "train", batch=32)  # targets (n,), outputs (n, 1): no broadcasting to (n, n)
    model = keras.Sequential([L.Input((4,)), L.Dense(1)])
    _, step = fitted(model, Train(epochs=60, learning_rate=0.2, weight_decay=1e-4), train=data, val=data)
    assert step.train["metric"] == "mean_squared_error" and step.train["history"][-1]["metric"] < 0.1
    _, custom = fitted(model, Train(epochs=1, loss=mean_error), train=data, val=data)
    assert custom.spec["Train"]["loss"] == {"function": f"{__name__}:mean_error"}
    with pytest.raises(ModelError, match=r"must return a scalar tensor, got a tensor of shape \(32,\)"):
        fitted(model, Train(epochs=1, loss=lambda o, t: o[:, 0] - t), train=data)


def mean_error(outputs, targets):
    return keras.ops.mean(keras.ops.abs(outputs[:, 0] - targets))


def test_dict_outputs_and_regularizers_of_the_model():
    _, step = fitted(nested(), Train(epochs=3, learning_rate=0.02))
    assert step.train["history"][-1]["loss"] < step.train["history"][0]["loss"]
    heavy = keras.Sequential([L.Input((4,)), L.Dense(3, kernel_regularizer=keras.regularizers.L2(10.0))])
    _, step = fitted(heavy, Train(epochs=1))
    assert step.train["history"][0]["loss"] > 5


def test_mixed_float16_is_trained_with_a_scaled_loss():
    model = keras.Sequential([L.Input((4,)), L.Dense(8, activation="relu", dtype="mixed_float16"), L.Dense(3, dtype="float32")])
    _, step = fitted(model, Train(epochs=8, learning_rate=0.05))
    assert step.train["history"][-1]["metric"] > 0.9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((points()[0], points()[1] + 1), r"Targets must be classes from 0 to 2 .* got 1 to 3"),
        ((points()[0],), "no targets"),
        ((points()[0][:, :2], points()[1]), r"has shape \(None, 4\), got an array of shape"),
        ((points()[0], np.zeros((96, 2), "float32")), r"Targets of shape \(32, 2\) do not fit"),
        ((points()[0], np.zeros((96, 3), "int64")), r"Integer targets of shape \(32, 3\) need logits"),
    ],
)
def test_data_that_does_not_fit(data, message):
    data = [(data[0][:32],)] if len(data) == 1 else data
    with pytest.raises(DataError, match=message):
        fitted(dense(), Train(epochs=1), train=Batches(data, "train", batch=32), val=None)


def test_nothing_to_train_and_a_ramp_that_does_not_fit():
    model = dense()
    model.trainable = False
    with pytest.raises(ModelError, match="No weight is trainable"):
        fitted(model, Train(epochs=1))
    with pytest.raises(SpecError, match="cannot ramp"):
        fitted(dense(), Train(epochs=1, apply=[Prune(0.5, schedule=Cubic())]))


def test_padding_counts_in_no_loss():
    x, y = points()
    padded = np.where(np.arange(96) < 90, y, -100)
    wild = np.where((np.arange(96) < 90)[:, None], x, 50.0).astype("float32")
    teacher = dense()
    spec = Train(epochs=1, decay=None, apply=[Distill(student_weight=0.5)])
    rows = []
    for data in ((x[:90], y[:90]), (wild, padded)):
        model = dense()
        model.set_weights([np.full(w.shape, 0.1, "float32") for w in model.get_weights()])
        _, step = fitted(model, spec, teacher=teacher, train=Batches(data, "train", batch=96), val=None)
        rows.append((step.train["history"][0]["loss"], model.get_weights()))
    assert rows[0][0] == pytest.approx(rows[1][0], rel=1e-4)


def test_batches_that_the_compiled_step_cannot_take_name_their_place():
    x, y = points()
    class_lost = [(x[:32], y[:32]), (x[:32], y[:16])]
    with pytest.raises(
        DataError, match=r"training step failed in epoch 1, batch 1 on inputs of shape \(32, 4\), targets of shape \(16,\)"
    ):
        fitted(dense(), Train(epochs=1), train=Batches(class_lost, "train"), val=None)


def test_val_is_scored_on_everything_at_once_where_asked():
    seen = []

    def whole(outputs, targets):
        seen.append(outputs.shape)
        return 0.5

    fitted(dense(), Train(epochs=1), metric=Metric(whole, per_example=False), val=batches("val", 40, seed=1))
    assert seen == [(40, 3)]
