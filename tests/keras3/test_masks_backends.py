"""Masks that move, scores from data and a resumed ramp on Keras' other backends."""

import importlib.util
import json

import pytest

from other_backend import run_under

SCRIPT = r"""
import json
import keras, numpy as np
from keras_parts import dense, points
from whet.data import Batches
from whet.keras import PruningCallback, copy, prune
from whet.keras.views import views
from whet.specs import OBS, Cubic, Movement, Prune, RigL, SparseGPT, Taylor, Wanda

keras.utils.set_random_seed(0)
held = lambda model, masks: all((v.array[masks[n] == 0] == 0).all() for n, v in views(model).items())
x, y = points()
moving = PruningCallback(Prune(0.5, schedule=RigL(frequency=3)), data=(x, y))
half = PruningCallback(Prune(0.5, criterion=Movement(), schedule=Cubic(begin=0.2, end=0.7, frequency=2)), steps=24)
model = dense()
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[moving])
rigl = [held(model, moving.masks), moving.sparsity]
other = dense()
other.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
other.fit(x[:64], y[:64], batch_size=8, epochs=2, verbose=0, callbacks=[half])
rest = PruningCallback(half._spec, steps=24)
rest.load_state_dict(half.state_dict())
between = rest._state["step"], half.sparsity
other.fit(x[:64], y[:64], batch_size=8, epochs=3, initial_epoch=2, verbose=0, callbacks=[rest])
chosen = {}
for criterion in (Taylor(), Wanda(), OBS(), SparseGPT()):
    ranked = copy(model)
    masks_of, _ = prune(ranked, Prune(0.5, criterion=criterion), masks={}, data=Batches((x, y)))
    chosen[type(criterion).__name__] = [held(ranked, masks_of), float(np.mean(masks_of["hidden/kernel"]))]
print(json.dumps({
    "backend": keras.backend.backend(),
    "rigl": rigl,
    "resumed": [*between, rest.sparsity, held(other, rest.masks)],
    "criteria": chosen,
}))
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_masks_move_score_and_resume(backend) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    found = json.loads(run_under(backend, SCRIPT).splitlines()[-1])
    assert found["backend"] == backend
    assert found["rigl"] == [True, 0.5] and all(row == [True, 0.5] for row in found["criteria"].values())
    step, sparsity, after, is_held = found["resumed"]
    assert step == 16 and 0 < sparsity <= after == 0.5 and is_held


def test_a_program_that_fails_there_fails_here() -> None:
    pytest.importorskip("torch")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_under("torch", "1 / 0")
