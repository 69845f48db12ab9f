"""Training with masks that move, scores that training makes, and penalties that make channels small: Keras."""

import keras
import numpy as np
import pytest

import whet
from keras_parts import dense, points
from whet import ERK, Cubic, Global, GroupLasso, Movement, Prune, Random, RigL, Taylor, Train, Wanda
from whet import keras as side
from whet.errors import ModelError, SpecError
from whet.keras.views import to_numpy

L = keras.layers
QUIET = {"progress": False}
RIGL = Prune(0.6, criterion=Random(), allocation=ERK(), schedule=RigL(fraction=0.6, frequency=2, end=0.7))
MOVING = Prune(0.6, criterion=Movement(), allocation=Global(), schedule=Cubic(begin=0.2, end=0.7, frequency=2))
RAMP = Prune(0.75, schedule=Cubic(end=0.7, frequency=2))
DATA = points()


def made(seed=0):
    keras.utils.set_random_seed(seed)
    model = dense()
    model.compile(keras.optimizers.Adam(0.03), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fit(model, callback, epochs=4, **options):
    x, y = DATA
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callback, **options)


class Watch(keras.callbacks.Callback):
    def __init__(self, pruning):
        super().__init__()
        self.pruning, self.seen = pruning, []

    def on_train_batch_end(self, batch, logs=None):
        for name, mask in self.pruning.masks.items():
            kernel = to_numpy(self.model.get_layer(name.split("/")[0]).kernel)
            assert not kernel[mask == 0].any()
        self.seen.append(self.pruning.masks)


def test_rigl_in_fit_moves_masks_at_one_sparsity_and_stops() -> None:
    model = made()
    callback = side.PruningCallback(RIGL, data=DATA)
    watch = Watch(callback)
    fit(model, [callback, watch])
    steps = len(watch.seen)
    sizes = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in watch.seen]
    assert all(size == sizes[0] for size in sizes) and sum(sizes[0].values()) == round(0.4 * 56)
    moved = [i for i in range(1, steps) if any((watch.seen[i][n] != watch.seen[i - 1][n]).any() for n in watch.seen[i])]
    assert moved and set(moved) <= set(range(2, round(0.7 * steps), 2)) and callback.is_done


def test_the_moments_of_what_rigl_grows_begin_at_zero() -> None:
    model = made()
    callback = side.PruningCallback(RIGL, data=DATA)
    seen = []

    class Moments(keras.callbacks.Callback):
        """Between the pruning at the beginning of a batch and its step."""

        def on_train_batch_begin(self, batch, logs=None):
            optimizer = self.model.optimizer
            for layer in ("hidden", "out") if optimizer.built else ():
                kernel = self.model.get_layer(layer).kernel
                index = next(i for i, one in enumerate(optimizer._trainable_variables) if one is kernel)
                slots = (optimizer._momentums[index], optimizer._velocities[index])
                seen.append((f"{layer}/kernel", callback.masks[f"{layer}/kernel"], [to_numpy(slot) for slot in slots]))

    fit(model, [callback, Moments()])
    count = 0
    for (name, before, _), (same, after, slots) in zip(seen, seen[2:], strict=False):
        grown, stayed = (before == 0) & (after == 1), (before == 1) & (after == 1)
        assert name == same and all(not slot[grown].any() for slot in slots)
        assert all(slot[stayed].any() for slot in slots)
        count += int(grown.sum())
    assert count > 0


def test_rigl_without_data_says_what_to_do() -> None:
    pruner = side.Pruner(made(), Prune(0.5, schedule=RigL(frequency=1)), steps=10)
    with pytest.raises(SpecError, match=r"RigL needs the gradient of 'hidden/kernel'.*pass data="):
        pruner.step()


@pytest.mark.parametrize(
    ("spec", "stop"), [(RAMP, 11), (MOVING, 8), (RIGL, 11)], ids=["ramp, within an epoch", "movement, between", "rigl, within"]
)
def test_fit_resumed_in_the_middle_of_the_ramp_is_the_undisturbed_one(spec, stop, tmp_path) -> None:
    x, y = DATA
    steps = 4 * len(x) // 8
    straight, callback = made(), side.PruningCallback(spec, data=DATA)
    fit(straight, callback)

    class Cut(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == stop:
                self.model.stop_training = True
                raise KeyboardInterrupt

    half, first = made(), side.PruningCallback(spec, data=DATA)
    with pytest.raises(KeyboardInterrupt):
        fit(half, [first, Cut()])
    half.save(tmp_path / "half.keras")
    state = first.state_dict()
    assert 0 < state["step"] == stop < steps

    resumed, again = keras.models.load_model(tmp_path / "half.keras"), side.PruningCallback(spec, data=DATA)
    again.load_state_dict(state)
    per_epoch = len(x) // 8
    rest = stop % per_epoch
    if rest:
        resumed.fit(x[8 * rest :], y[8 * rest :], batch_size=8, shuffle=False, verbose=0, callbacks=again)
        between = side.PruningCallback(spec, data=DATA)
        between.load_state_dict(again.state_dict())
        again = between
    fit(resumed, again, initial_epoch=-(-stop // per_epoch))
    assert all(np.array_equal(again.masks[name], mask) for name, mask in callback.masks.items())
    for one, other in zip(straight.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


def test_a_state_of_another_schedule_is_refused() -> None:
    callback = side.PruningCallback(RAMP)
    with pytest.raises(SpecError, match="no state before"):
        callback.state_dict()
    fit(made(), callback)
    with pytest.raises(SpecError, match="belongs to"):
        side.PruningCallback(MOVING).load_state_dict(callback.state_dict())


def test_a_pruner_resumes_with_what_movement_has_seen() -> None:
    x, y = DATA
    model = made()
    pruner = side.Pruner(model, MOVING, steps=20)
    for start in range(0, 64, 8):
        model.train_on_batch(x[start : start + 8], y[start : start + 8])
        pruner.step()
    state = pruner.state_dict()
    other = side.Pruner(model, MOVING, steps=20)
    other.load_state_dict(state)
    for one in (pruner, other):
        one._masker.renew(0.6)
    assert all(np.array_equal(pruner.masks[name], mask) for name, mask in other.masks.items())
    assert any(value.any() for value in state["moved"].values())


@pytest.mark.parametrize(
    "spec", [RIGL, MOVING, Prune(0.5, criterion=Taylor(batches=1), schedule=Cubic(frequency=4)), Prune(0.5, criterion=Wanda())]
)
def test_inside_train_masks_hold_to_the_end(spec) -> None:
    keras.utils.set_random_seed(0)
    result = whet.fit(dense(), Train(epochs=12, learning_rate=0.03, apply=(spec,)), train=points(), val=points(), **QUIET)
    sizes = sum(mask.size for mask in result.masks.values())
    assert sum(int((mask == 0).sum()) for mask in result.masks.values()) == pytest.approx(spec.fraction * sizes, abs=1)
    for name, mask in result.masks.items():
        kernel = to_numpy(result.model.get_layer(name.split("/")[0]).kernel)
        assert not kernel[mask == 0].any() and kernel[mask == 1].any()


def test_group_lasso_by_its_formula_beside_the_layers_own_regularizer() -> None:
    model = keras.Sequential(
        [L.Input((6, 6, 2)), L.Conv2D(4, 3, kernel_regularizer="l2", name="conv"), L.Flatten(), L.Dense(3, name="out")]
    )
    own = model.get_layer("conv").kernel.regularizer
    plain = float(sum(model.losses))
    with side.group_lasso(model, 0.5):
        total = float(sum(model.losses))
        restored = keras.regularizers.deserialize(keras.regularizers.serialize(model.get_layer("conv").kernel.regularizer))
        assert isinstance(restored, side.GroupLassoRegularizer) and restored.axis == 3
    kernels = [(to_numpy(model.get_layer("conv").kernel), (0, 1, 2), 18), (to_numpy(model.get_layer("out").kernel), 0, 64)]
    expected = sum(0.5 * np.sqrt(size) * np.sqrt((k**2).sum(axis)).sum() for k, axis, size in kernels)
    assert total - plain == pytest.approx(expected, rel=1e-5)
    assert model.get_layer("conv").kernel.regularizer is own and float(sum(model.losses)) == plain
    empty = keras.Sequential([L.Input((3,)), L.LayerNormalization()])
    with pytest.raises(ModelError, match="no convolution or dense kernel"), side.group_lasso(empty):
        pass


def test_group_lasso_in_training_makes_neurons_small() -> None:
    def least(model):
        return float(np.linalg.norm(to_numpy(model.get_layer("hidden").kernel), axis=0).min())

    keras.utils.set_random_seed(0)
    model = dense()
    plain = whet.fit(model, Train(epochs=10, learning_rate=0.03), train=points(), **QUIET)
    shrunk = whet.fit(model, Train(epochs=10, learning_rate=0.03, apply=(GroupLasso(0.05),)), train=points(), **QUIET)
    assert least(shrunk.model) < 0.5 * least(plain.model)
