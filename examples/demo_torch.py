"""A trained PyTorch network becomes a sparse int8 ONNX file, which ONNX Runtime runs beside the original.

Run it with `make demo-torch`. It writes out/demo/torch/.
"""

from __future__ import annotations

import digits
import torch
from torch import nn

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


def network() -> nn.Module:
    """The two-convolution network of the classic guides: 18,480 parameters for 1x8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 3),
        nn.ReLU(),
        nn.Conv2d(10, 20, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 50),
        nn.ReLU(),
        nn.Linear(50, 10),
    )


def main() -> None:
    """Train the original, compress it, print before and after."""
    train, val, test = ((x[:, None], y) for x, y in digits.load())
    torch.manual_seed(0)
    original = whet.fit(network(), Train(epochs=20, learning_rate=1e-2, weight_decay=0.1), train=train, val=val)
    compressed = whet.compress(
        original.model,
        train=train,
        val=val,
        test=test,
        budget=whet.Budget(max_drop=0.01, size=0.40, gzip=0.20),
        recipe=RECIPE,
        target="onnxruntime",
        out="out/demo/torch",
        overwrite=True,
    )
    print_report(compressed.report)


if __name__ == "__main__":
    main()
