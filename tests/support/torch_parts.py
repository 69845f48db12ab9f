"""Small PyTorch models and data for the tests of the PyTorch side."""

import numpy as np
import torch
from torch import nn

from whet.data import Batches
from whet.graph.epochs import TrainingRun
from whet.torch import train as train_


def seeded(build, seed=0):
    """`build()` with torch's random numbers drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


class Small(nn.Module):
    """Conv, batch norm, dropout, linear: 3 classes from 1×6×6."""

    def __init__(self, dropout=0.0, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.bn(self.conv(x))).flatten(1)))


def small(dropout=0.0, classes=3, seed=0):
    return seeded(lambda: Small(dropout, classes), seed).eval()


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too, and a hidden layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.again = self.hidden
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.again(torch.relu(self.hidden(self.embed(ids)))))


class Rows(nn.Module):
    """Logits that a linear layer and a softmax make: what a distillation must refuse as teacher."""

    def __init__(self, classes=3):
        super().__init__()
        self.head = nn.Linear(36, classes)

    def forward(self, x):
        return torch.softmax(self.head(x.flatten(1)), -1)


def examples(n=96, classes=3, seed=0):
    """Images (n, 1, 6, 6) with a bright band where the class says, and their classes (n,)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = rng.normal(0, 0.7, (n, 1, 6, 6)).astype(np.float32)
    for row, label in zip(x, y, strict=True):
        row[0, 2 * label % 6 : 2 * label % 6 + 2] += 1.5
    return x, y.astype(np.int64)


def batches(n=96, batch=32, seed=0, classes=3):
    return Batches(examples(n, classes, seed), "train", batch=batch)


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_training(model, spec, **changes):
    """`whet.torch.train` with the arguments that a test does not care about filled in."""
    arguments = {"train": batches(), "val": batches(48, seed=1), "progress": False}
    return train_(model, spec, TrainingRun(**(arguments | changes)))
