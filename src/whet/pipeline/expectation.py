"""What pruning will and will not give on a target, said before it runs."""

from __future__ import annotations

import math

from whet.errors import SpecError
from whet.specs import NM, TARGETS, Block, Group, Layer, Prune, Recipe, Target, Train, find_target
from whet.specs.pruning import AMOUNTS

_DEFLATE = 1.2  # times the entropy: what gzip took of ResNet-20's masked weights at sparsities of 0.5 to 0.95 (docs/pruning.md)


def expectation(spec: Prune, target: str | Target | None = None) -> str:
    """One paragraph: what `spec` will do to the file of `target` and to its time, and what it will not.

    Sizes are of float32 weights, estimated before anything is chosen. Without a target it speaks of all of them.

    Raises:
        SpecError: `spec` is no `Prune`. TargetError: an unknown target.
    """
    if not isinstance(spec, Prune):
        raise SpecError(f"expectation() takes a whet.Prune(…), got {spec!r}.")
    known = TARGETS.get(target) if isinstance(target, str) else target
    where = "every target" if target is None else (find_target(target, "torch") if known is None else known).name
    return _removed(spec, where) if spec.removes else _masked(spec, where)


def expectations(recipe: Recipe, target: str | Target | None = None) -> list[str]:
    """The expectation of every pruning in a recipe, in order, alike ones once."""
    prunes = [step for step in recipe.steps if isinstance(step, Prune)]
    prunes += [item for step in recipe.steps if isinstance(step, Train) for item in step.apply if isinstance(item, Prune)]
    return list(dict.fromkeys(expectation(spec, target) for spec in prunes))


def zeros_bytes(sparsity: float) -> float:
    """The fraction of a float32 weight's bytes that its masked form needs at least: `1 - s + H(s) / 32`.

    `H(s)` is the entropy, in bits, of one zero's place. Values that remain do not compress.
    """
    if not 0 < sparsity < 1:
        return 1.0 - sparsity
    entropy = -(sparsity * math.log2(sparsity) + (1 - sparsity) * math.log2(1 - sparsity))
    return 1 - sparsity + entropy / 32


def _masked(spec: Prune, where: str) -> str:
    sparsity = spec.fraction
    least = zeros_bytes(sparsity)
    told = (
        f"{sparsity:.0%} of the weights become zeros, which stay stored and are still multiplied with: on {where} the file "
        f"keeps its bytes and its time. Compressed it shrinks: gzip to about {min(1.0, _DEFLATE * least):.2f} of its "
        f"bytes (at best {least:.2f})."
    )
    if isinstance(spec.granularity, NM):
        n, m = spec.granularity.n, spec.granularity.m
        kernels = "sparse tensor cores of NVIDIA GPUs, from Ampere on, through TensorRT or cuSPARSELt"
        told += (
            f" The 2:4 pattern is faster only on {kernels}, which no target here uses."
            if (n, m) == (2, 4)
            else f" The {n}:{m} pattern needs kernels made for it; of hardware only 2:4 is known ({kernels})."
        )
    if isinstance(spec.granularity, Block):
        told += f" Blocks of {spec.granularity.rows} × {spec.granularity.columns} need kernels made for them to be faster."
    return f"{told} For a faster file remove channels: granularity=Channel()."


def _removed(spec: Prune, where: str) -> str:
    if isinstance(spec.granularity, Group):
        return f"The positions named leave, with all that holds them: tensors, the file and its time on {where} become smaller."
    amount = next((name for name in AMOUNTS if getattr(spec, name) is not None), None)
    if isinstance(spec.granularity, Layer):
        many = f"{spec.granularity.count} layers" if spec.granularity.count else f"{spec.fraction:.0%} of the layers that can"
        what = many if amount in (None, "sparsity") else "as many layers as the budget asks for"
        return (
            f"Of the residual blocks or transformer layers leave {what}: the file loses their bytes, and on {where} their "
            "whole time. Accuracy falls until the rest is trained: put Train(…) behind it."
        )
    unit = type(spec.granularity).__name__.lower()
    if amount == "sparsity":
        left = 1 - spec.fraction
        told = (
            f"{spec.fraction:.0%} of the {unit}s leave: weights between two pruned layers keep about {left * left:.2f} of "
            f"their bytes and multiplications, those beside inputs and outputs {left:.2f}. On {where} time falls too, by less: "
            "what is small waits for memory"
        )
    elif amount == "latency":
        told = (
            f"{type(spec.granularity).__name__}s leave until the exported file, timed on {where}, holds "
            f"latency={spec.latency!r}; every layer is timed at several widths first, which takes seconds to minutes"
        )
    else:
        told = (
            f"{type(spec.granularity).__name__}s leave until {amount}={getattr(spec, str(amount)):g} holds. Time on {where} "
            "falls too, but not in proportion; write latency= for a time"
        )
    rounded = (
        f", and widths that are no multiple of {spec.round_to} are avoided" if spec.round_to > 1 and unit == "channel" else ""
    )
    after = (
        "Accuracy falls until the rest is trained: put Train(…) behind it; reconstruct=Reconstruct() gives part back at once."
        if spec.reconstruct is None
        else "What stays is solved anew on the data, which gives back part of the accuracy; Train(…) behind it gives back more."
    )
    return f"{told}{rounded}. {after}"
