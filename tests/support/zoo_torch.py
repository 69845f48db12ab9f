"""Awkward PyTorch models, small enough to quantize, prune and export in a moment.

`CASES` maps a name to a function that returns `(model, inputs)`: the model in inference mode with seeded weights, and a
batch of inputs as `whet.data.Batches` yields them (an array, a tuple by position, or a dict by keyword).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo_torch_models import (
    Attention,
    Branching,
    Concat,
    Decoder,
    Demo,
    Depthwise,
    Functional,
    FusedQkv,
    Grouped,
    GroupedQuery,
    Permute,
    PixelShuffle,
    Recurrent,
    Residual,
    Shuffle,
    Siamese,
    Tied,
    Twice,
)

Case = tuple[nn.Module, Any]
CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a builder; its model is built from one seed and put in inference mode with used batch-norm statistics."""

    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        def seeded() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                model, inputs = build()
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                        module.running_mean.normal_(0, 0.3)
                        module.running_var.uniform_(0.5, 2.0)
                        if module.affine:
                            nn.init.uniform_(module.weight, 0.5, 1.5)
                            nn.init.normal_(module.bias, 0, 0.3)
                return model.eval(), inputs

        CASES[name] = seeded
        return seeded

    return register


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@case("demo")
def demo() -> Case:
    """The demo's CNN."""
    return Demo(), normal(16, 1, 8, 8)


@case("residual")
def residual() -> Case:
    """Case 1."""
    return Residual(), normal(16, 3, 8, 8)


@case("concat")
def concat() -> Case:
    """Case 2."""
    return Concat(), normal(16, 3, 8, 8)


@case("depthwise")
def depthwise() -> Case:
    """Case 3."""
    return Depthwise(), normal(16, 3, 8, 8)


@case("grouped")
def grouped() -> Case:
    """Case 4."""
    return Grouped(), normal(16, 3, 8, 8)


@case("shuffle")
def shuffle() -> Case:
    """Case 5."""
    return Shuffle(), normal(16, 4, 6, 6)


@case("permute")
def permute() -> Case:
    """Case 6."""
    return Permute(), normal(16, 3, 8, 8)


@case("pixel_shuffle")
def pixel_shuffle() -> Case:
    """Case 7."""
    return PixelShuffle(), normal(16, 3, 6, 6)


@case("decoder")
def decoder() -> Case:
    """Case 8."""
    return Decoder(), normal(16, 6)


@case("fused_qkv")
def fused_qkv() -> Case:
    """Case 9, one projection."""
    return FusedQkv(), normal(16, 7, 16)


@case("grouped_query")
def grouped_query() -> Case:
    """Case 9, grouped queries."""
    return GroupedQuery(), normal(16, 7, 16)


@case("attention")
def attention() -> Case:
    """Case 10."""
    return Attention(), normal(16, 5, 6)


@case("recurrent")
def recurrent() -> Case:
    """Case 11."""
    return Recurrent(), normal(16, 5, 6)


@case("tied")
def tied() -> Case:
    """Case 12."""
    return Tied(), np.random.default_rng(3).integers(0, 20, (16, 5))


@case("twice")
def twice() -> Case:
    """Case 13."""
    return Twice(), normal(16, 3, 8, 8)


@case("siamese")
def siamese() -> Case:
    """Cases 13 and 23."""
    return Siamese(), {"left": normal(16, 6), "right": normal(16, 6, seed=4)}


@case("functional")
def functional() -> Case:
    """Case 15."""
    return Functional(), normal(16, 3, 8, 8)


@case("weight_norm")
def weight_norm() -> Case:
    """Case 16."""
    wrapped = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(wrapped, nn.ReLU(), nn.Linear(8, 3)), normal(16, 6)


@case("branching")
def branching() -> Case:
    """Case 22: cannot be exported."""
    return Branching(), normal(16, 6)


@case("sequential")
def sequential() -> Case:
    """Case 24, with in-place ReLU, dropout and a batch norm behind a linear layer."""
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5)]
    head = [nn.Linear(54, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3)]
    return nn.Sequential(*layers, *head), normal(16, 3, 8, 8)
