"""One small trained classifier in each framework, and what tests want to know of it, behind one set of names.

`benches()` gives a `Bench` for PyTorch and one for Keras; tests take it as the fixture `bench`, and speak of no framework.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from whet.specs import TARGETS

CLASSES = 3
FRAMEWORKS = ("torch", "keras")


@dataclass(frozen=True)
class Bench:
    """A framework: how to build models in it and how to look into them.

    build: a trained classifier with batch norm and dropout, as `layout` images in, logits out. regressor: a small model of
    4 numbers to 1. named: two inputs `a`, `b` by name, a dict of outputs with "logits" among them. weights: every array of
    a model by name. state: everything else that a user would notice to have changed. codes: the integer weights stored in
    an exported file. cast: the model in 16-bit floats. loader: the framework's own loader of (x, y) arrays.
    """

    name: str
    target: str
    suffix: str
    layer: str  # the name of the first layer with weights
    build: Callable[[], Any]
    regressor: Callable[[], Any]
    named: Callable[[], Any]
    arrange: Callable[[np.ndarray], np.ndarray]
    weights: Callable[[Any], dict[str, np.ndarray]]
    state: Callable[[Any], Any]
    poison: Callable[[Any, float], None]
    codes: Callable[[Path], list[np.ndarray]]
    cast: Callable[[Any], Any]
    loader: Callable[[np.ndarray, np.ndarray], Any]

    @property
    def other(self) -> str:
        """A target that this framework does not write."""
        return next(target.name for target in TARGETS.values() if self.name not in target.frameworks)

    def data(self, n: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Images whose bright band says their class."""
        rng = np.random.default_rng(seed)
        y = rng.integers(0, CLASSES, n)
        x = rng.normal(0, 0.5, (n, 6, 6)).astype(np.float32)
        for image, label in zip(x, y, strict=True):
            image[2 * label : 2 * label + 2] += 1.5
        return self.arrange(x), y.astype(np.int64)

    def frozen(self, model: Any) -> Any:
        """Everything of `model` that must be the same after a verb."""
        return {name: array.copy() for name, array in self.weights(model).items()}, self.state(model)


@cache
def bench(framework: str) -> Bench:
    """The bench of `framework`; its module is imported when first asked for."""
    return importlib.import_module(f"bench_{framework}").BENCH


def same(a: Any, b: Any) -> bool:
    """Whether two frozen states are equal, to the bit."""
    (arrays, state), (others, other) = a, b
    return arrays.keys() == others.keys() and all(np.array_equal(arrays[k], others[k]) for k in arrays) and state == other


def leaves(value: Any) -> list[np.ndarray]:
    """The arrays in a structure, in its order; of a dict by key, as files order them by name."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple | list) else [np.asarray(value)]


def sqnr(reference: Any, got: Any) -> float:
    """Signal to noise in dB; 300 where there is no noise."""
    reference, got = (np.concatenate([leaf.ravel().astype(np.float64) for leaf in leaves(value)]) for value in (reference, got))
    return float(10 * np.log10(np.sum(reference**2) / max(np.sum((reference - got) ** 2), 1e-30 * np.sum(reference**2))))


def convert_in_process(monkeypatch: Any) -> None:
    """Run TensorFlow's converter in this process, where that has loaded it already: seconds less for each file."""
    if importlib.import_module("keras").backend.backend() != "tensorflow":
        return
    module = importlib.import_module("whet.keras.litert_export")
    worker = importlib.import_module("whet.keras.litert_worker")

    def run(place: Path, name: str) -> bytes:
        worker.main(json.loads((place / "job.json").read_text()), place / "model.tflite")
        return (place / "model.tflite").read_bytes()

    monkeypatch.setattr(module, "_run", run)


def registry_once(monkeypatch: Any) -> None:
    """Let PyTorch's exporter read its 1,600 ONNX functions once a process, not once a file."""
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    read = registry.__dict__["from_torchlib"].__func__

    def once(*args: Any, **options: Any) -> Any:
        key = (args, tuple(options.items()))
        if key not in _REGISTRIES:
            _REGISTRIES[key] = read(registry, *args, **options)
        return _REGISTRIES[key]

    monkeypatch.setattr(registry, "from_torchlib", staticmethod(once))


_REGISTRIES: dict[Any, Any] = {}


def few_runs(monkeypatch: Any, *, processes: bool = False) -> None:
    """Time files a few times only where Whet would choose how often, and open them in processes of their own if asked to."""
    gather = importlib.import_module("whet.runtimes.evidence").gather

    def quick(*args: Any, **options: Any) -> Any:
        runs = 5 if options.get("runs") is None else options["runs"]
        few = {"runs": runs, "processes": processes and options.get("processes", False)}
        return gather(*args, **{**options, **few})

    for module in ("whet.pipeline.compress", "whet.runtimes.evidence", "whet.cli.measuring"):
        monkeypatch.setattr(importlib.import_module(module), "gather", quick)
