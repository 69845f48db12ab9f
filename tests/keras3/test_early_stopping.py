"""Early stopping decides as Keras' own callback does, where both should."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.numerics.stopping import StoppingState, update
from whet.specs import EarlyStopping


class Weightless:
    """What Keras' callback asks of a model."""

    stop_training = False

    def get_weights(self):
        return []

    def set_weights(self, weights):
        pass


def by_keras(values, patience, min_delta, higher):
    """The epochs of the stop and of the best by Keras' callback."""
    callback = keras.callbacks.EarlyStopping(
        "val", min_delta=min_delta, patience=patience, mode="max" if higher else "min", restore_best_weights=True
    )
    callback.set_model(Weightless())
    callback.on_train_begin()
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val": value})
        if callback.model.stop_training:
            return epoch, callback.best_epoch
    return None, callback.best_epoch


def by_us(values, spec, higher):
    state = StoppingState()
    for epoch, value in enumerate(values):
        state, decision = update(state, value, spec, higher_is_better=higher)
        if decision.stop:
            return epoch, state.best_epoch
    return None, state.best_epoch


# Eighths: float32, in which Keras compares, holds them and their differences exactly.
eighths = st.lists(st.integers(-16, 16).map(lambda i: i / 8), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(values=eighths, patience=st.integers(1, 4), min_delta=st.sampled_from([0.0, 0.125, 0.5]), higher=st.booleans())
def test_the_same_stop_and_the_same_best(values, patience, min_delta, higher):
    spec = EarlyStopping(patience=patience, min_delta=min_delta)
    assert by_us(values, spec, higher) == by_keras(values, patience, min_delta, higher)


def test_nan_after_the_first_epoch_waits_in_both():
    values = [0.5, np.nan, np.nan, 0.75]
    assert by_us(values, EarlyStopping(patience=2), True) == by_keras(values, 2, 0.0, True) == (2, 0)
    assert by_us(values, EarlyStopping(patience=3), True) == by_keras(values, 3, 0.0, True) == (None, 3)


@pytest.mark.parametrize("higher", [True, False])
def test_nan_in_the_first_epoch_is_never_best_here(higher):
    """Keras takes it for the best, and nothing is better than it."""
    values = [np.nan, 0.5, 0.5]
    assert by_us(values, EarlyStopping(patience=3), higher) == (None, 1)
    assert by_keras(values, 3, 0.0, higher)[1] == 0
