"""A trained Keras 3 network becomes a sparse int8 LiteRT file, which LiteRT runs beside the original.

Run it with `make demo-keras`. It writes out/demo/keras/.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import digits
import keras

import whet
from whet import Cubic, Distill, EarlyStopping, Global, Prune, Quantize, Recipe, SoftTargets, Train
from whet.report.console import print_report

RECIPE = Recipe(
    [
        Train(
            epochs=40,
            learning_rate=5e-3,
            apply=[Prune(0.8, allocation=Global(), schedule=Cubic(end=0.5)), Distill([SoftTargets(temperature=4.0)])],
            early_stopping=EarlyStopping(patience=10),
        ),
        Quantize(),
    ]
)


def network() -> keras.Model:
    """The two-convolution network of the classic guides: 18,480 parameters for 8x8x1 images."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(10, 3),
            layers.ReLU(),
            layers.Conv2D(20, 3),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(50),
            layers.ReLU(),
            layers.Dense(10),
        ]
    )


def main() -> None:
    """Train the original, compress it, print before and after."""
    train, val, test = ((x[..., None], y) for x, y in digits.load())
    keras.utils.set_random_seed(0)
    original = whet.fit(network(), Train(epochs=20, learning_rate=1e-2, weight_decay=0.1), train=train, val=val)
    compressed = whet.compress(
        original.model,
        train=train,
        val=val,
        test=test,
        budget=whet.Budget(max_drop=0.01, size=0.40, gzip=0.20),
        recipe=RECIPE,
        target="litert",
        out="out/demo/keras",
        overwrite=True,
    )
    print_report(compressed.report)


if __name__ == "__main__":
    main()
