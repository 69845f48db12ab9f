"""Whet makes a trained PyTorch or Keras 3 model small and fast, and proves that it still works.

Importing it loads no framework: verbs and pieces are fetched when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from whet.errors import WhetError
from whet.specs import (
    AWQ,
    GPTQ,
    HQQ,
    MSE,
    NF4,
    QAT,
    Adaptive,
    AdaRound,
    BiasCorrection,
    Budget,
    CrossLayer,
    Cubic,
    Distill,
    Dynamic,
    EarlyStopping,
    Entropy,
    Float,
    Global,
    Int,
    KMeans,
    Magnitude,
    Metric,
    MinMax,
    MovingAverage,
    Nearest,
    OneShot,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    Piecewise,
    PowerOfTwo,
    Prune,
    Quantize,
    Recipe,
    SmoothQuant,
    SoftTargets,
    Target,
    Train,
    Uniform,
    Weight,
)

if TYPE_CHECKING:
    from whet.pipeline.compress import compress
    from whet.pipeline.compressed import Compressed
    from whet.pipeline.store import load
    from whet.pipeline.verbs import distill, fit, inspect, measure, prune, quantize
    from whet.records import Evidence, Report
    from whet.runtimes import targets

__version__ = "0.1.0"

_LAZY = {
    "compress": "whet.pipeline.compress",
    "Compressed": "whet.pipeline.compressed",
    "load": "whet.pipeline.store",
    "distill": "whet.pipeline.verbs",
    "fit": "whet.pipeline.verbs",
    "inspect": "whet.pipeline.verbs",
    "measure": "whet.pipeline.verbs",
    "prune": "whet.pipeline.verbs",
    "quantize": "whet.pipeline.verbs",
    "Evidence": "whet.records",
    "Report": "whet.records",
}
_MODULES = {"targets": "whet.runtimes.targets", "torch": "whet.torch", "keras": "whet.keras"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'whet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})


__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "MSE",
    "NF4",
    "QAT",
    "AdaRound",
    "Adaptive",
    "BiasCorrection",
    "Budget",
    "Compressed",
    "CrossLayer",
    "Cubic",
    "Distill",
    "Dynamic",
    "EarlyStopping",
    "Entropy",
    "Evidence",
    "Float",
    "Global",
    "Int",
    "KMeans",
    "Magnitude",
    "Metric",
    "MinMax",
    "MovingAverage",
    "Nearest",
    "OneShot",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "Piecewise",
    "PowerOfTwo",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "SmoothQuant",
    "SoftTargets",
    "Target",
    "Train",
    "Uniform",
    "Weight",
    "WhetError",
    "compress",
    "distill",
    "fit",
    "inspect",
    "load",
    "measure",
    "prune",
    "quantize",
    "targets",
]
