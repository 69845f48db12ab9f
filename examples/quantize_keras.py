"""A 784-64-32-10 Keras classifier becomes an int8 LiteRT file, run beside the float one.

    python examples/quantize_keras.py [--data mnist_train.npz] [--epochs 20]

Without --data it trains on scikit-learn's digits, enlarged to 28x28. An .npz file holds `x` (n, 28, 28) and `y` (n,).
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import digits
import keras

import whet
from whet import Quantize
from whet.report.console import print_report


def network() -> keras.Model:
    """784-64-32-10."""
    layers = keras.layers
    hidden = [layers.Dense(64, activation="relu"), layers.Dense(32, activation="relu")]
    return keras.Sequential([keras.Input((28, 28)), layers.Flatten(), *hidden, layers.Dense(10)])


def main() -> None:
    """Train with Keras, then quantize, export, run both files, and print what changed."""
    options = digits.options(__doc__)
    train, val, test = digits.large(options.data)
    keras.utils.set_random_seed(0)
    model = network()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(*train, validation_data=val, epochs=options.epochs, verbose=0)

    small = whet.compress(model, train=train, val=val, test=test, recipe=[Quantize()], target="litert")

    print_report(small.report)


if __name__ == "__main__":
    main()
