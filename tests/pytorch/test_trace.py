"""Tracing before calibration: what is run, and how often."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from whet.data import Batches
from whet.errors import DataError
from whet.specs import TARGETS, Quantize
from whet.torch import quantize

ORT = TARGETS["onnxruntime"]


class Counting(nn.Module):
    """A folding pair; `rows` lists the rows of every forward pass of this model and of its copies."""

    rows: ClassVar[list[int]] = []

    def __init__(self, fixed=None):
        super().__init__()
        self.conv, self.norm, self.fixed = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), fixed

    def forward(self, x):
        Counting.rows.append(len(x))
        if self.fixed is not None:
            x = x.reshape(self.fixed, 2, 6, 6)
        return self.norm(self.conv(x)).mean((2, 3))


@pytest.fixture
def images():
    Counting.rows.clear()
    return np.random.default_rng(0).normal(size=(8, 2, 6, 6)).astype(np.float32)


def test_an_example_that_is_the_first_batch_is_run_once(images):
    plan, _ = quantize(
        Counting(), Quantize(), ORT, calibration=Batches([images, images]), example=images.copy(), progress=False
    )
    assert Counting.rows == [2, 8, 8]
    assert plan.folds == (("norm", "conv"),)


def test_another_example_is_run_too(images):
    quantize(Counting(), Quantize(), ORT, calibration=Batches([images[:4]]), example=images, progress=False)
    assert Counting.rows == [2, 8, 4]


def test_a_model_for_one_batch_size_folds_as_well(images):
    plan, _ = quantize(Counting(8), Quantize(), ORT, calibration=Batches([images]), example=images, progress=False)
    assert plan.folds == (("norm", "conv"),)


def test_a_model_that_fails_on_the_example_says_so(images):
    with pytest.raises(DataError, match="Counting failed on inputs \\(8, 2, 6, 6\\)"):
        quantize(Counting(7), Quantize(), ORT, calibration=Batches([images]), example=images, progress=False)


class OnlyInTheExample(nn.Module):
    """A layer that runs for many rows only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.first(x)) if len(x) > 4 else self.first(x)


def test_values_that_only_the_example_has_are_named():
    x = torch.linspace(-1, 1, 24).reshape(8, 3).numpy()
    with pytest.raises(DataError, match="No calibration data reached 'second/linear:0'"):
        quantize(OnlyInTheExample(), Quantize(), ORT, calibration=Batches([x[:4]]), example=x, progress=False)
