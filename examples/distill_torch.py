"""The classic pair: a 784-64-32-10 network teaches one of 784-32-10.

    python examples/distill_torch.py [--data mnist_train.npz] [--epochs 20]

Without --data it trains on scikit-learn's digits, enlarged to 28x28. An .npz file holds `x` (n, 28, 28) and `y` (n,).
"""

from __future__ import annotations

import digits
import torch
from torch import nn

import whet
from whet import Distill, SoftTargets, Train


def network(*hidden: int) -> nn.Module:
    """A classifier of 784 inputs and 10 classes."""
    sizes = (784, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def main() -> None:
    """The teacher has seen every label; the student has a fifth of them, alone or with what the teacher says of the rest."""
    options = digits.options(__doc__)
    (images, labels), val, test = digits.large(options.data)
    few = len(images) // 5
    torch.manual_seed(0)
    teacher = whet.fit(network(64, 32), Train(epochs=options.epochs, learning_rate=3e-3), train=(images, labels), val=val)
    start = network(32)
    alone = whet.fit(start, Train(epochs=options.epochs, learning_rate=3e-3), train=(images[:few], labels[:few]), val=val)

    taught = whet.distill(
        start,
        teacher.model,
        Distill([SoftTargets(temperature=4)], student_weight=0),  # no labels: the teacher's word alone
        fit=Train(epochs=options.epochs, learning_rate=3e-3),
        train=images,
        val=val,
    )

    for name, made in (("teacher", teacher), ("student, alone", alone), ("student, taught", taught)):
        print(f"{name:16} {digits.score(made.model, test)}")


if __name__ == "__main__":
    main()
