"""Awkward models from the user's side: pruned, quantized, exported, run, saved and loaded; or refused by name."""

import importlib

import keras
import numpy as np
import pytest
import torch

import keras_parts
import whet
import zoo_keras
from bench import bench, leaves, same, sqnr
from whet.runtimes.evidence import pack
from whet.runtimes.sessions import open_session
from zoo_cases import CASES, LISTED, TABLE


def build(framework, name):
    return importlib.import_module(f"zoo_{framework}").CASES[name]()


def test_the_first_ten_cases_are_there_in_both_frameworks():
    for number in range(1, 11):
        pairs = [pair for name, pair in CASES.items() if name.split()[0] == str(number)]
        assert any(torch for torch, _ in pairs) and any(keras for _, keras in pairs)
    built = {framework: set(importlib.import_module(f"zoo_{framework}").CASES) for framework in ("torch", "keras")}
    assert built["torch"] == {name for framework, name in TABLE if framework == "torch"} | {"branching"}
    assert built["keras"] == {name for framework, name in TABLE if framework == "keras"}


@pytest.mark.parametrize(("framework", "name"), TABLE)
def test_it_goes_all_the_way(framework, name, tmp_path):
    b = bench(framework)
    model, inputs = build(framework, name)
    before = b.frozen(model)
    pruned = whet.prune(model, whet.Prune(0.3), progress=False)
    made = whet.quantize(pruned, calibration=[inputs], progress=False)

    assert same(before, b.frozen(model))
    removed = sum(int((mask == 0).sum()) for mask in made.masks.values())
    assert removed >= 0.25 * sum(mask.size for mask in made.masks.values()) > 0

    simulated, floats = made.side.predict(made.model, inputs), pruned.side.predict(pruned.model, inputs)
    assert [leaf.shape for leaf in leaves(simulated)] == [leaf.shape for leaf in leaves(made.side.predict(model, inputs))]
    assert sqnr(floats, simulated) > 15  # int8 is near the pruned model, whatever the weights

    path = made.export(tmp_path / f"model{b.suffix}")
    session = open_session(path)
    found = pack(session.run(inputs), session, floats)
    assert type(found) is type(simulated)
    assert sqnr(simulated, found) > 35
    codes, kept = b.codes(path), [mask for key, mask in made.masks.items() if key in made.plan.weights]
    assert sum(int((array == 0).sum()) for array in codes) >= sum(int((mask == 0).sum()) for mask in kept)

    again = whet.load(made.save(tmp_path / "saved"), build(framework, name)[0])
    for one, other in zip(leaves(again.side.predict(again.model, inputs)), leaves(simulated), strict=True):
        assert np.array_equal(one, other)

    skipped = {row["name"]: row["reason"] for step in made.steps for row in step.skipped}
    assert all(reason for reason in skipped.values())
    for layer in LISTED.get((framework, name), ()):
        assert any(key == layer or key.startswith((f"{layer}.", f"{layer}/")) for key in skipped), skipped


def test_control_flow_by_values_is_simulated_and_not_exported(tmp_path):
    model, inputs = build("torch", "branching")
    made = whet.quantize(whet.prune(model, whet.Prune(0.3), progress=False), calibration=[inputs], progress=False)
    assert sqnr(made.side.predict(made.model, inputs), model(torch.from_numpy(inputs)).detach().numpy()) > 5
    assert {"name": "unused", "reason": "never run by the example or the calibration data"} in made.steps[1].skipped
    with pytest.raises(whet.WhetError, match="depend on the values of tensors"):
        made.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert not torch.overrides._get_current_function_mode_stack()  # the trace that failed watches nothing any more


class Loop(keras.Model):
    """Decides by the values that it sees."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(3)

    def call(self, x):
        return self.out(x) if float(keras.ops.sum(x)) > 0 else self.out(-x)


def subclassed():
    model = keras_parts.bare()
    return model, np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def dense_subclass():
    class Mine(keras.layers.Dense):
        def call(self, x):
            return super().call(x) * 2.0

    i = keras.Input((4,))
    return keras.Model(i, keras.layers.Dense(3)(Mine(8, name="mine")(i))), subclassed()[1]


def with_lambda():
    i = keras.Input((4,))
    x = keras.layers.Lambda(lambda t: t * 2.0, output_shape=(8,), name="double")(keras.layers.Dense(8)(i))
    return keras.Model(i, keras.layers.Dense(3)(x)), subclassed()[1]


def scaled():
    """Factors in front of layers, which the converter would multiply into their weights."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(6, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(6, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
        ]
    )
    inputs = np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 3)).astype(np.float32)
    return zoo_keras.randomize(model), inputs


@pytest.mark.parametrize("make", [subclassed, dense_subclass, with_lambda, scaled])
def test_what_people_write_in_keras_works(make, tmp_path):
    model, inputs = make()
    made = whet.quantize(
        whet.prune(model, whet.Prune(0.25), train=[inputs], progress=False), calibration=[inputs], progress=False
    )
    found = open_session(made.export(tmp_path / "model.tflite")).run(inputs)
    assert sqnr(made.side.predict(made.model, inputs), found) > 35
    again = whet.load(made.save(tmp_path / "saved"), model)
    assert np.array_equal(again.side.predict(again.model, inputs), made.side.predict(made.model, inputs))


def test_a_subclassed_keras_model_that_cannot_be_traced_is_refused():
    model, inputs = Loop(), subclassed()[1]
    model(inputs)
    with pytest.raises(whet.WhetError, match=r"could not be copied.*custom class"):
        whet.quantize(model, calibration=[inputs], progress=False)


def test_an_unbuilt_keras_model_is_refused():
    with pytest.raises(whet.WhetError, match=r"is not built.*Call it once"):
        whet.prune(keras_parts.Bare(), whet.Prune(0.5), progress=False)
