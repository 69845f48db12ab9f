"""Keras on JAX: training spread over two devices by `keras.distribution`, and the losses over their whole range."""

import importlib.util
import json

import pytest

import loss_books
from other_backend import run_under

SCRIPT = r"""
import json
import keras, numpy as np
import loss_books, whet
from keras_parts import dense, points
from whet import QAT, Cubic, Distill, EarlyStopping, Features, Int, Prune, Quantize, SoftTargets, Train
from whet.keras import Distiller, EarlyStoppingCallback, PruningCallback, distillation_loss, layer_loss

x, y = points(64)
taught = Distill([SoftTargets(), Features("hidden", "hidden")])
stop = EarlyStopping(patience=9)
spec = Train(epochs=4, learning_rate=0.03, apply=[Prune(0.5, schedule=Cubic(frequency=2)), taught], early_stopping=stop)
runs = []
for parallel in (False, True):
    keras.distribution.set_distribution(keras.distribution.DataParallel() if parallel else None)
    keras.utils.set_random_seed(0)
    model, teacher = dense(), dense()
    before = [array.copy() for array in (*model.get_weights(), *teacher.get_weights())]
    made = whet.fit(model, spec, train=(x, y), val=(x, y), teacher=teacher, progress=False)
    after = [*model.get_weights(), *teacher.get_weights()]
    runs.append({
        "devices": len(model.trainable_variables[0].value.devices()),
        "untouched": all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)),
        "losses": [row["loss"] for row in made.steps[-1].train["history"]],
        "sparsity": [float((kernel == 0).mean()) for kernel in made.float_model.get_weights()[::2]],
    })
spec = Quantize(Int(4), qat=QAT(epochs=4, learning_rate=0.01))
aware = whet.quantize(made, spec, train=(x, y), calibration=x, progress=False)
pruning = PruningCallback(Prune(0.5, schedule=Cubic(frequency=2, end=0.5)))
stopping = EarlyStoppingCallback(EarlyStopping(), monitor="loss", after=pruning)
distiller = Distiller(model, [teacher, dense()], Distill())
distiller.compile(keras.optimizers.Adam(0.03), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
history = distiller.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[stopping, pruning]).history["loss"]
keras.distribution.set_distribution(None)
print(json.dumps({
    "backend": keras.backend.backend(),
    "runs": runs,
    "aware": [row["loss"] for row in aware.steps[-1].train["history"]],
    "fit": [history, pruning.sparsity, stopping.best_epoch, float((model.get_weights()[0] == 0).mean())],
    "books": loss_books.computed(distillation_loss, layer_loss, keras.ops.convert_to_tensor, spreads=(0.3, 1e4)),
}))
"""


@pytest.mark.timeout(900)  # a machine may be busy: it compiles for about 20 s
def test_two_devices_train_as_one_does_and_losses_are_the_books():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    found = json.loads(run_under("jax", SCRIPT).splitlines()[-1])
    one, two = found["runs"]
    assert found["backend"] == "jax" and (one["devices"], two["devices"]) == (1, 2)
    assert one["untouched"] and two["untouched"] and two["sparsity"] == [0.5, 0.5]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and two["losses"][-1] < 0.7 * two["losses"][0]
    assert found["aware"][-1] < found["aware"][0]
    history, sparsity, best, zeros = found["fit"]
    assert history[-1] < history[0] and sparsity == zeros == 0.5 and best >= 2
    expected = loss_books.expected()
    far = {name: value for name, value in found["books"].items() if value != pytest.approx(expected[name], rel=1e-5)}
    assert len(found["books"]) == len(expected) / 2 and not far
