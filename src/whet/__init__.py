"""Whet makes a trained PyTorch or Keras 3 model small and fast, and proves that it still works.

Importing it loads no framework: verbs and pieces are fetched when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from whet.errors import WhetError
from whet.specs import vocabulary
from whet.specs.vocabulary import *  # noqa: F403

if TYPE_CHECKING:
    from whet.graph.teacher_store import StoredOutputs
    from whet.pipeline.compress import compress
    from whet.pipeline.compressed import Compressed
    from whet.pipeline.expectation import expectation
    from whet.pipeline.rates import LearningRates, learning_rate
    from whet.pipeline.sensitivity import Sensitivity, sensitivity
    from whet.pipeline.store import load
    from whet.pipeline.teaching import teacher_outputs
    from whet.pipeline.verbs import distill, finish, fit, groups, inspect, measure, prune, quantize
    from whet.records import Evidence, Report
    from whet.runtimes import targets

__version__ = "0.1.0"

_LAZY = {
    "StoredOutputs": "whet.graph.teacher_store",
    "teacher_outputs": "whet.pipeline.teaching",
    "compress": "whet.pipeline.compress",
    "Compressed": "whet.pipeline.compressed",
    "load": "whet.pipeline.store",
    "distill": "whet.pipeline.verbs",
    "LearningRates": "whet.pipeline.rates",
    "learning_rate": "whet.pipeline.rates",
    "expectation": "whet.pipeline.expectation",
    "finish": "whet.pipeline.verbs",
    "fit": "whet.pipeline.verbs",
    "groups": "whet.pipeline.verbs",
    "inspect": "whet.pipeline.verbs",
    "measure": "whet.pipeline.verbs",
    "prune": "whet.pipeline.verbs",
    "quantize": "whet.pipeline.verbs",
    "sensitivity": "whet.pipeline.sensitivity",
    "Sensitivity": "whet.pipeline.sensitivity",
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
    "Compressed",
    "Evidence",
    "LearningRates",
    "Report",
    "Sensitivity",
    "StoredOutputs",
    "WhetError",
    "compress",
    "distill",
    "expectation",
    "finish",
    "fit",
    "groups",
    "inspect",
    "learning_rate",
    "load",
    "measure",
    "prune",
    "quantize",
    "sensitivity",
    "targets",
    "teacher_outputs",
]
__all__ += vocabulary.__all__
