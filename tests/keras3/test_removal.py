"""Real removal through the verbs: budgets, saving and loading, exported files run by their runtimes, quantization after."""

import json

import numpy as np

import whet
import zoo_keras
from other_backend import run_under
from whet.data import leaves
from whet.keras import predict
from whet.runtimes.sessions import open_session
from whet.specs import Channel, Prune, Quantize, Train

SCRIPT = r"""
import json
import keras, numpy as np
import zoo_keras
from whet.data import Batches
from whet.keras import predict, remove
from whet.specs import Channel, Head, Prune, Taylor

left = {}
for name, what in (("small_resnet", Channel()), ("attention_layer", Head()), ("nested_functional", Channel())):
    model, inputs = zoo_keras.CASES[name]()
    made, _, _ = remove(model, Prune(0.5, granularity=what, round_to=1), example=inputs)
    assert np.isfinite(predict(made, inputs)).all()
    left[name] = made.count_params() / model.count_params()
model, inputs = zoo_keras.CASES["digits_cnn"]()
data = Batches([(inputs, np.arange(len(inputs)) % 3)], "train")
made, _, _ = remove(model, Prune(0.5, granularity=Channel(), criterion=Taylor()), example=inputs, data=data)
left["taylor"] = made.count_params() / model.count_params()
print(json.dumps({"backend": keras.backend.backend(), "left": left}))
"""


def pruned(name="digits_cnn", spec=None):
    model, inputs = zoo_keras.CASES[name]()
    return model, inputs, whet.prune(model, spec or Prune(0.5, granularity=Channel(), round_to=1), example=inputs)


def test_budgets_are_met_and_counted_as_inspect_counts() -> None:
    model, inputs = zoo_keras.CASES["small_resnet"]()
    full = whet.inspect(model, inputs)
    for budget in ("macs", "parameters"):
        made = whet.prune(model, Prune(**{budget: 0.5}, granularity=Channel(), round_to=1), example=inputs)
        left = whet.inspect(made.float_model, inputs)
        share = getattr(left, budget) / getattr(full, budget)
        assert 0.35 < share <= 0.5, (budget, share)
    made = whet.prune(model, Prune(bytes=0.5, granularity=Channel(), round_to=1), example=inputs)
    assert 4 * made.float_model.count_params() <= 0.5 * 4 * model.count_params()


def test_saved_and_loaded_alone_and_into_the_original(tmp_path) -> None:
    model, inputs, made = pruned("nested_functional")
    made = whet.prune(made, Prune(0.5, granularity=Channel(), round_to=1), example=inputs)  # twice
    made.save(tmp_path / "saved")
    for given in (None, model):
        again = whet.load(tmp_path / "saved", model=given)
        assert again.float_model.count_params() == made.float_model.count_params() < model.count_params()
        np.testing.assert_array_equal(predict(again.model, inputs), predict(made.model, inputs))


def test_files_and_integers_after_removal(tmp_path) -> None:
    model, inputs, made = pruned("small_resnet")
    expected = predict(made.model, inputs)
    for target, suffix in (("litert", "tflite"), ("onnxruntime", "onnx")):
        path = made.export(tmp_path / f"small.{suffix}", target=target)
        found = leaves(open_session(path).run(inputs))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    small = whet.quantize(made, Quantize(), calibration=[inputs])
    path = small.export(tmp_path / "int8.tflite", target="litert")
    whole = whet.quantize(model, Quantize(), calibration=[inputs]).export(tmp_path / "whole.tflite", target="litert")
    assert path.stat().st_size < whole.stat().st_size
    found = leaves(open_session(path).run(inputs))[0]
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_what_is_left_is_trained() -> None:
    model, inputs = zoo_keras.CASES["digits_cnn"]()
    data = [(inputs, np.arange(len(inputs)) % 3)] * 2
    spec = Prune(0.5, granularity=Channel(), round_to=1)
    made = whet.prune(model, spec, fit=Train(epochs=4, learning_rate=0.01), train=data, progress=False)
    losses = [row["loss"] for row in made.steps[-1].train["history"]]
    assert losses[-1] < losses[0] and made.float_model.count_params() < model.count_params()


def test_the_same_under_torch() -> None:
    found = json.loads(run_under("torch", SCRIPT).splitlines()[-1])
    assert found["backend"] == "torch" and all(share < 0.8 for share in found["left"].values()), found
