"""Quantization-aware training and a teacher on two devices of one machine, by TensorFlow's own strategy."""

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
from whet.keras import DistillationCallback
from whet.specs import QAT, Distill, Features, Int, PerTensor, Quantize, SoftTargets

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 8)).astype("float32")
y = (x[:, 0] * x[:, 1] > 0).astype("int64")
spec = Quantize(Int(4), Int(4, symmetric=False, granularity=PerTensor()), qat=QAT(observe=0.5))
found = []
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
taught = Distill([SoftTargets()], student_weight=0.5)


def net():
    hidden = keras.layers.Dense(16, activation="relu", name="a", kernel_regularizer="l2")
    return keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(2, name="b")])


def fit(student, spec, teacher):
    student.compile(keras.optimizers.SGD(0.1), loss)
    callback = DistillationCallback(spec, teacher)
    return student.fit(x, y, epochs=3, batch_size=64, verbose=0, shuffle=False, callbacks=[callback]).history["loss"]


for devices in (None, ["/cpu:0", "/cpu:1"]):
    strategy = None if devices is None else tf.distribute.MirroredStrategy(devices)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(16, activation="relu", name="a"), keras.layers.Dense(2, name="b")]
        model = prepare(keras.Sequential([keras.Input((8,)), *layers]), spec, calibration=[x], steps=4, progress=False)
        model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        student, teacher = net(), net()
    distilled, refused = fit(student, taught, teacher), ""
    try:
        fit(student, Distill([SoftTargets(), Features("a", "a")]), teacher)
    except Exception as error:
        refused = str(error)
    losses = model.fit(x, y, epochs=8, batch_size=64, verbose=0, shuffle=False).history["loss"]
    plan = finish(model)[1]
    scales = [float(params.scale.sum()) for params in (*plan.weights.values(), *plan.values.values())]
    found.append({"distilled": distilled, "refused": refused, "losses": losses, "scales": scales, "replicas": 1 if strategy is None else strategy.num_replicas_in_sync})
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
    assert two["distilled"] == pytest.approx(one["distilled"], rel=1e-4) and two["distilled"][-1] < two["distilled"][0]
    assert one["refused"] == "" and "not heard under a TensorFlow strategy" in two["refused"]
    np.testing.assert_allclose(two["scales"], one["scales"], rtol=0.05)
