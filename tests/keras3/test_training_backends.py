"""Pruning, training and distillation on Keras' other backends: the same masks, held, and a loss that falls."""

import importlib.util
import json

import pytest

from other_backend import run_under

SCRIPT = r"""
import json
import keras, numpy as np
from keras_parts import cnn, dense, fitted, points, same_weights
from whet.keras import PruningCallback, copy, predict, prune
from whet.keras.views import views
from whet.specs import CRD, RKD, Cubic, Distill, Features, Prune, SoftTargets, Train

keras.utils.set_random_seed(0)
held = lambda model, masks: all((v.array[masks[n] == 0] == 0).all() and (v.array[masks[n] == 1] != 0).all() for n, v in views(model).items())
teacher = dense()
_, first = fitted(teacher, Train(epochs=15, learning_rate=0.03))
before = copy(teacher)
student = copy(teacher)
spec = Train(epochs=12, learning_rate=0.03, apply=[Prune(0.5, schedule=Cubic(frequency=2)), Distill()])
masks, step = fitted(student, spec, teacher=teacher)
again = copy(teacher)
fitted(again, spec, teacher=teacher)
inside = [Features("hidden", "hidden"), CRD("hidden", "hidden"), RKD("hidden", "hidden")]
spec = Train(epochs=8, learning_rate=0.01, apply=[Distill([SoftTargets(), *inside])])
_, layers = fitted(dense(), spec, teacher=teacher)
free = copy(teacher)
prune(free, Prune(0.5), masks={})
(x, y), model = points(), dense()
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
callback = PruningCallback(Prune(0.5, schedule=Cubic(frequency=2, end=0.5)))
model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[callback])
image = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
conv = cnn(dropout=0.3, norm=True)
print(json.dumps({
    "backend": keras.backend.backend(),
    "teacher": first.train["history"][-1]["metric"],
    "losses": [row["loss"] for row in first.train["history"]],
    "metric": step.train["history"][-1]["metric"],
    "sparsity": step.train["history"][-1]["sparsity"],
    "held": held(student, masks),
    "teacher_same": same_weights(teacher, before),
    "deterministic": same_weights(student, again),
    "one_shot": [float((v.array == 0).mean()) for v in views(free).values()],
    "layers": [row["loss"] for row in layers.train["history"]],
    "callback": [held(model, callback.masks), callback.sparsity],
    "copied": bool(np.array_equal(predict(conv, image), predict(copy(conv), image))),
}))
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_prune_train_and_distill(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    found = json.loads(run_under(backend, SCRIPT).splitlines()[-1])
    assert found["backend"] == backend
    assert found["losses"][-1] < 0.5 * found["losses"][0] and found["teacher"] > 0.95 and found["metric"] > 0.8
    assert found["sparsity"] == 0.5 and found["one_shot"] == [0.5, 0.5] and found["callback"] == [True, 0.5]
    assert found["layers"][-1] < 0.8 * found["layers"][0]
    assert found["held"] and found["teacher_same"] and found["deterministic"] and found["copied"]
