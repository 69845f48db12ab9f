"""Keras' own fit prunes a network while another teaches it, and then trains it for int8; LiteRT runs the file.

    pip install 'whet[keras,litert,demo]'
    python examples/fit_keras.py [--data mnist_train.npz] [--epochs 20]

Without --data it trains on scikit-learn's digits, enlarged to 28x28. An .npz file holds `x` (n, 28, 28) and `y` (n,).
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tempfile
from pathlib import Path
from typing import Any

import digits
import keras

import whet
from whet import QAT, Cubic, Distill, EarlyStopping, Int, Prune, Quantize, SoftTargets
from whet.keras.callbacks import DistillationCallback, EarlyStoppingCallback, PruningCallback


def network(hidden: int) -> Any:
    """A classifier of 28x28 images."""
    layers = [keras.layers.Flatten(), keras.layers.Dense(hidden, activation="relu"), keras.layers.Dense(10)]
    return compiled(keras.Sequential([keras.Input((28, 28)), *layers]), 2e-3)


def compiled(model: Any, rate: float) -> Any:
    """`model` with Adam and the loss of its logits."""
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main() -> None:
    """Train a teacher; prune and teach a student; train it for int8; measure the file."""
    options = digits.options(__doc__)
    (x, y), val, test = digits.large(options.data)
    fit = {"batch_size": 64, "epochs": options.epochs, "validation_data": val, "verbose": 0}
    keras.utils.set_random_seed(0)
    teacher, student = network(128), network(32)
    teacher.fit(x, y, **fit)
    taught = DistillationCallback(Distill([SoftTargets(temperature=4)], student_weight=0.3), teacher)

    pruning = PruningCallback(Prune(0.8, schedule=Cubic(end=0.5)))
    stopping = EarlyStoppingCallback(EarlyStopping(patience=5), after=pruning)
    student.fit(x, y, callbacks=[taught, stopping, pruning], **fit)

    spec = Quantize(Int(8), qat=QAT())
    prepared = compiled(whet.keras.prepare(student, spec, calibration=val[0], masks=pruning.masks), 5e-4)
    prepared.fit(x, y, callbacks=[taught, EarlyStoppingCallback(EarlyStopping(patience=5))], **fit)

    small = whet.finish(prepared, example=val[0][:1], masks=pruning.masks)
    with tempfile.TemporaryDirectory() as folder:
        file = small.export(Path(folder) / "student.tflite")
        print(f"teacher        {digits.score(teacher, test)}")
        print(f"student, int8  {digits.score(file, test)}, {pruning.sparsity:.0%} of its weights removed")


if __name__ == "__main__":
    main()
