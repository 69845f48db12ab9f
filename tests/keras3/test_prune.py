"""One-shot pruning and pruning in the user's own loop."""

import keras
import numpy as np
import pytest

from keras_parts import batches, cnn, dense, nested, points, undrawn
from whet.errors import ModelError, SpecError
from whet.keras import Pruner, PruningCallback, copy, prune
from whet.keras.views import views
from whet.specs import Cubic, Global, Prune

L = keras.layers


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def test_the_smallest_weights_go_and_the_count_is_exact():
    model = dense()
    before = {name: view.array for name, view in views(model).items()}
    masks, step = prune(model, Prune(0.5), masks={})
    sizes = {name: view.array.size for name, view in views(model).items()}
    assert undrawn(step.changed) == tuple(
        {"name": name, "parameters": sizes[name], "sparsity": 0.5} for name in ("hidden/kernel", "out/kernel")
    )
    for name, view in views(model).items():
        mask, old = masks[name], before[name]
        assert mask.dtype == np.uint8 and mask.shape == old.shape
        assert np.array_equal(view.array, np.where(mask, old, 0)) and not np.signbit(view.array[mask == 0]).any()
        assert np.abs(old[mask == 0]).max() <= np.abs(old[mask == 1]).min()


def test_global_ranks_all_layers_together():
    model = dense()
    model.get_layer("hidden").kernel.assign(np.full((4, 8), 0.01, "float32"))
    model.get_layer("out").kernel.assign(np.full((8, 3), 1.0, "float32"))
    masks, _ = prune(model, Prune(0.5, allocation=Global()), masks={})
    assert masks["hidden/kernel"].sum() == 32 - 28 and masks["out/kernel"].sum() == 24


def test_masks_from_before_stay_and_count():
    model = dense()
    kernel = model.get_layer("hidden").kernel
    old = np.ones((4, 8), np.uint8)
    largest = np.unravel_index(np.abs(np.array(kernel)).argmax(), (4, 8))
    old[largest] = 0
    masks, _ = prune(model, Prune(0.5, include="hidden"), masks={"hidden/kernel": old})
    assert masks["hidden/kernel"][largest] == 0 and (masks["hidden/kernel"] == 0).sum() == 16
    assert np.array(kernel)[largest] == 0 and set(masks) == {"hidden/kernel"}


def test_keep_include_and_patterns_that_match_nothing():
    _, step = prune(nested(), Prune(0.5, keep=("inner", "nowhere*")), masks={})
    assert [row["name"] for row in step.changed] == ["shared/kernel", "deep/same/kernel", "same/kernel"]
    assert {"name": "inner/same", "reason": "in keep"} in step.skipped and step.unmatched == ("nowhere*",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Prune(0.0), "sparsity 0 is reached already"),
        (Prune(0.5, keep=("*",)), "hidden: in keep"),
        (Prune(0.5, include=("nowhere",)), "match no layer: nowhere"),
        (Prune(0.001), "removes less than one weight"),
    ],
)
def test_changing_nothing_is_an_error(spec, message):
    with pytest.raises(ModelError, match=message):
        prune(dense(), spec, masks={})


def test_a_schedule_needs_training():
    with pytest.raises(SpecError, match="needs training"):
        prune(dense(), Prune(0.5, schedule=Cubic()), masks={})


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(ModelError, match=r"mask of shape \(2, 2\) for 'hidden/kernel'"):
        prune(dense(), Prune(0.5), masks={"hidden/kernel": np.ones((2, 2))})


def test_frozen_layers_are_pruned_and_the_unknown_is_listed():
    i = keras.Input((6, 4))
    model = keras.Model(i, L.Dense(3, name="fc")(L.LSTM(5, name="lstm")(i)))
    model.trainable = False
    _, step = prune(model, Prune(0.6), masks={})
    assert undrawn(step.changed) == ({"name": "fc/kernel", "parameters": 15, "sparsity": 9 / 15},)
    assert step.skipped == ({"name": "lstm/lstm_cell", "reason": "LSTMCell weights are not pruned"},)


def test_pruner_holds_and_resumes_in_the_middle_of_a_ramp():
    spec = Prune(0.75, schedule=Cubic(frequency=2, end=0.8))
    model = cnn()
    pruner = Pruner(model, spec, steps=20)
    seen = []
    for step in range(20):
        for weight in model.trainable_weights:
            weight.assign_add(np.full(weight.shape, 0.01, "float32"))
        pruner.step()
        seen.append(pruner.sparsity)
        if step == 6:
            saved, resumed = pruner.state_dict(), copy(model)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(0.75, abs=0.01) and pruner.is_done
    again = Pruner(resumed, spec, steps=20)
    again.load_state_dict(saved)
    for _ in range(7, 20):
        for weight in resumed.trainable_weights:
            weight.assign_add(np.full(weight.shape, 0.01, "float32"))
        again.step()
    assert all(np.array_equal(again.masks[name], mask) for name, mask in pruner.masks.items())
    assert all((view.array[pruner.masks[name] == 0] == 0).all() for name, view in views(model).items())
    with pytest.raises(SpecError, match="over 20 steps"):
        Pruner(model, spec, steps=30).load_state_dict(saved)


class _Spy(keras.callbacks.Callback):
    def __init__(self, pruning):
        super().__init__()
        self.pruning, self.sparsities = pruning, []

    def on_train_batch_end(self, batch, logs=None):
        zeros = [float((np.array(self.model.get_layer(name).kernel) == 0).mean()) for name in ("hidden", "out")]
        self.sparsities.append(zeros)


@pytest.mark.parametrize("together", [1, 2])
def test_callback_prunes_in_the_users_own_fit(together):
    model, (x, y) = dense(), points()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), steps_per_execution=together)
    callback = PruningCallback(Prune(0.5, schedule=Cubic(frequency=2, end=0.5)))
    spy = _Spy(callback)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[callback, spy])
    rising = [sum(zeros) for zeros in spy.sparsities]
    assert rising == sorted(rising) and rising[0] < 0.2 and spy.sparsities[-1] == [0.5, 0.5]
    assert callback.is_done and callback.sparsity == 0.5
    for name, view in views(model).items():
        assert np.array_equal(view.array == 0, callback.masks[name] == 0)


class _Restoring(keras.callbacks.Callback):
    """As EarlyStopping(restore_best_weights=True), with the best found in the first batch."""

    def on_train_batch_begin(self, batch, logs=None):
        self.saved = getattr(self, "saved", None) or self.model.get_weights()

    def on_train_end(self, logs=None):
        self.model.set_weights(self.saved)


def test_callback_bakes_its_masks_into_restored_weights():
    model, (x, y) = dense(), points()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = PruningCallback(Prune(0.5, schedule=Cubic(frequency=2, end=0.5)))
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[_Restoring(), callback])
    assert all((view.array == 0).mean() == 0.5 for view in views(model).values())


def test_callback_needs_a_length_and_goes_on_from_initial_epoch():
    model, (x, y) = dense(), points(64)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def endless():
        while True:
            yield x[:8], y[:8]

    spec = Prune(0.5, schedule=Cubic(frequency=2, end=0.5))
    with pytest.raises(SpecError, match="number of batches per epoch is unknown"):
        model.fit((pair for pair in [(x[:8], y[:8])] * 8), epochs=1, verbose=0, callbacks=[PruningCallback(spec)])
    late = PruningCallback(spec)
    model.fit(endless(), steps_per_epoch=8, epochs=4, initial_epoch=3, verbose=0, callbacks=[late])
    assert late.sparsity == 0.5


def test_batches_are_untouched_by_pruning():
    first = batches().first()[0].copy()
    prune(dense(), Prune(0.5), masks={})
    assert np.array_equal(first, batches().first()[0])
