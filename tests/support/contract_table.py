"""The techniques that every promise is held against. A new technique joins by one line in `TECHNIQUES`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import whet
from bench import Bench, bench
from whet import Cubic, Distill, Float, Global, Int, Prune, Quantize, SparseGPT, Train

QUIET: dict[str, Any] = {"progress": False}
SHORT = Train(epochs=2, learning_rate=2e-3)
RAMP = Prune(0.5, schedule=Cubic(frequency=1))


@dataclass(frozen=True)
class Technique:
    """One thing that Whet does to a model.

    run: `(bench, model, seed)` to a Compressed. vain: a call that would change nothing, and must say so. again: what
    running it on its own result does: "works", or a text of the refusal. sparsity: of the masks. bits: of the stored
    integer weights; 32 for float. agreement: least SQNR in dB between simulation and file.
    """

    name: str
    run: Callable[[Bench, Any, int], Any]
    vain: Callable[[Bench, Any], Any]
    again: str = "works"
    sparsity: float = 0.0
    bits: int = 32
    agreement: float = 80.0


def data(b: Bench) -> dict[str, Any]:
    return {"train": b.data(96), "val": b.data(48, 1), **QUIET}


def pruned(spec: Prune) -> Callable[[Bench, Any, int], Any]:
    return lambda b, m, seed: whet.prune(m, spec, train=b.data(32), seed=seed, **QUIET)


def trained(spec: Train) -> Callable[[Bench, Any, int], Any]:
    return lambda b, m, seed: whet.fit(m, spec, seed=seed, **data(b))


@cache
def teacher(framework: str) -> Any:
    return bench(framework).build()


def distilled(b: Bench, m: Any, seed: int) -> Any:
    return whet.distill(m, teacher(b.name), Distill(), fit=SHORT, seed=seed, **data(b))


def quantized(spec: Quantize) -> Callable[[Bench, Any, int], Any]:
    return lambda b, m, seed: whet.quantize(m, spec, calibration=b.data(64)[0], seed=seed, **QUIET)


def pruned_quantized(b: Bench, m: Any, seed: int) -> Any:
    return quantized(Quantize())(b, pruned(Prune(0.5))(b, m, seed), seed)


def trained_quantized(b: Bench, m: Any, seed: int) -> Any:
    together = Train(epochs=3, apply=(RAMP, Distill()))
    return quantized(Quantize())(b, whet.fit(m, together, teacher=m, seed=seed, **data(b)), seed)


def compressed(b: Bench, m: Any, seed: int) -> Any:
    return whet.compress(m, recipe=[Train(epochs=3, apply=(RAMP, Distill())), Quantize()], seed=seed, **data(b))


def frozen(b: Bench, m: Any) -> Any:
    """`m` with nothing that training could move."""
    if b.name == "torch":
        return m.requires_grad_(False)
    m.trainable = False
    return m


def everything_kept(b: Bench, m: Any) -> Any:
    return quantized(Quantize(keep=("*",)))(b, m, 0)


INT8: dict[str, Any] = {"bits": 8, "agreement": 40.0, "again": "quantized already"}
TECHNIQUES: dict[str, Technique] = {
    t.name: t
    for t in (
        Technique(
            "prune_uniform", pruned(Prune(0.5)), lambda b, m: pruned(Prune(0.0))(b, m, 0), sparsity=0.5, again="reached already"
        ),
        Technique(
            "prune_global",
            pruned(Prune(0.5, allocation=Global())),
            lambda b, m: pruned(Prune(0.5, keep=("*",)))(b, m, 0),
            sparsity=0.5,
            again="reached already",
        ),
        Technique(
            "prune_sparsegpt",
            pruned(Prune(0.5, criterion=SparseGPT())),
            lambda b, m: pruned(Prune(0.0, criterion=SparseGPT()))(b, m, 0),
            sparsity=0.5,
            again="reached already",
        ),
        Technique(
            "prune_in_training",
            trained(Train(epochs=3, apply=RAMP)),
            lambda b, m: trained(Train(epochs=3, apply=Prune(0.0)))(b, m, 0),
            sparsity=0.5,
            again="reached already",
        ),
        Technique("train", trained(SHORT), lambda b, m: trained(SHORT)(b, frozen(b, m), 0)),
        Technique("distill", distilled, lambda b, m: distilled(b, frozen(b, m), 0)),
        Technique("quantize", quantized(Quantize()), everything_kept, **INT8),
        Technique("quantize_weights", quantized(Quantize(Int(8), None)), everything_kept, **INT8),
        Technique(
            "float16",
            quantized(Quantize(Float("float16"), None)),
            lambda b, m: quantized(Quantize(Float("float16"), None, keep=("*",)))(b, m, 0),
            bits=16,
            again="quantized already",
        ),
        Technique("prune_then_quantize", pruned_quantized, everything_kept, sparsity=0.5, **INT8),
        Technique("train_then_quantize", trained_quantized, everything_kept, sparsity=0.5, **INT8),
        Technique("compress", compressed, everything_kept, sparsity=0.5, **INT8),
    )
}


@cache
def made(technique: str, framework: str) -> Any:
    """The technique's result in a framework, made once; nobody changes it."""
    b = bench(framework)
    return TECHNIQUES[technique].run(b, b.build(), 0)


@dataclass(frozen=True)
class Rerun:
    """A second run from the same seed, from other global random states: what it found, left and gave."""

    model: Any
    before: Any
    after: Any
    random_states: tuple[Any, Any]
    result: Any


@cache
def rerun(technique: str, framework: str) -> Rerun:
    b = bench(framework)
    made(technique, framework)
    np.random.seed(991)
    random.seed(991)
    model = b.build()
    before, states = b.frozen(model), _random_states()
    result = TECHNIQUES[technique].run(b, model, 0)
    return Rerun(model, before, b.frozen(model), (states, _random_states()), result)


def _random_states() -> Any:
    return random.getstate(), np.random.get_state()[1].tolist()
