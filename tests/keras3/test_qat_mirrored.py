"""Quantization-aware training on two devices of one machine, by TensorFlow's own strategy."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import contextlib, json
import tensorflow as tf
one = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(one, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import numpy as np
from whet.keras import finish, prepare
from whet.specs import QAT, Int, PerTensor, Quantize

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 8)).astype("float32")
y = (x[:, 0] * x[:, 1] > 0).astype("int64")
spec = Quantize(Int(4), Int(4, symmetric=False, granularity=PerTensor()), qat=QAT(observe=0.5))
found = []
for devices in (None, ["/cpu:0", "/cpu:1"]):
    strategy = None if devices is None else tf.distribute.MirroredStrategy(devices)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(16, activation="relu", name="a"), keras.layers.Dense(2, name="b")]
        model = prepare(keras.Sequential([keras.Input((8,)), *layers]), spec, calibration=[x], steps=4, progress=False)
        model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(x, y, epochs=8, batch_size=64, verbose=0, shuffle=False).history["loss"]
    plan = finish(model)[1]
    scales = [float(params.scale.sum()) for params in (*plan.weights.values(), *plan.values.values())]
    found.append({"losses": losses, "scales": scales, "replicas": 1 if strategy is None else strategy.num_replicas_in_sync})
print(json.dumps(found))
"""


def test_two_devices_train_as_one_does():
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert two["losses"][-1] < 0.75 * two["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], rel=0.03)  # each device sees half of a batch when ranges are observed
    np.testing.assert_allclose(two["scales"], one["scales"], rtol=0.05)
