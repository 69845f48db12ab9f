"""The two-convolution network loses 80 % of its weights while it trains, and its file shrinks when it is packed.

    python examples/prune_torch.py [--data mnist_train.npz] [--epochs 20]

Without --data it trains on scikit-learn's digits, enlarged to 28x28. An .npz file holds `x` (n, 28, 28) and `y` (n,).
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import digits
import torch
from torch import nn

import whet
from whet import Cubic, Prune, Train


def network() -> nn.Module:
    """Two convolutions of 10 and 20 channels, then 320-50-10."""
    convolutions = [nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10))


def main() -> None:
    """Train, prune on a schedule, and print accuracy and packed bytes of both."""
    options = digits.options(__doc__)
    train, val, test = ((x[:, None], y) for x, y in digits.large(options.data))
    torch.manual_seed(0)
    training = Train(epochs=options.epochs, learning_rate=3e-3)
    dense = whet.fit(network(), training, train=train, val=val)

    sparse = whet.prune(dense, Prune(0.8, schedule=Cubic()), fit=training, train=train, val=val)

    print(whet.expectation(Prune(0.8)))
    with tempfile.TemporaryDirectory() as folder:
        for name, made in (("dense", dense), ("sparse", sparse)):
            file = made.export(Path(folder) / f"{name}.onnx")
            packed = len(gzip.compress(file.read_bytes()))
            print(f"{name:7} {packed:>8,} bytes packed  {digits.score(file, test)}")


if __name__ == "__main__":
    main()
