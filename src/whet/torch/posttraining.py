"""Post-training quantization of PyTorch models: trace, equalize, calibrate, solve, refine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from whet.data import Batches
from whet.graph.placement import Plan
from whet.graph.refine import needs_data, refine
from whet.graph.solve import solve
from whet.records import Step
from whet.specs import Int, Quantize, Target, to_dict
from whet.torch.moments import TorchRunner
from whet.torch.trace import check_calibration, trace


def quantize(
    model: Any, spec: Quantize, target: Target, *, calibration: Batches | None, example: Any, progress: bool
) -> tuple[Plan, Step]:
    """Trace `model`, equalize, calibrate, place, solve and refine; `model` is untouched.

    example: a batch's inputs as `Batches` yields them, to trace with. Ranges and moments come from `calibration` alone.

    Raises:
        DataError: calibration data is needed and there is none, or it reached no value or none that is finite.
        ModelError: nothing would be quantized.
    """
    started = time.perf_counter()
    observed = isinstance(spec.activations, Int)
    check_calibration(calibration, observed or needs_data(spec))
    traced = trace(model, example, calibration if observed else None, progress=progress)
    solved = solve(traced.calibration, traced.weights, traced.biases, spec, _rules(target, spec))
    if calibration is not None and needs_data(spec):
        graph, folds = traced.calibration.graph, dict(traced.calibration.folds)
        runner = TorchRunner(model, graph, folds, calibration, {})
        solved = refine(solved, graph, traced.weights, traced.biases, runner, progress=progress)
    listed = {row["name"] for row in solved.skipped}
    skipped = [*solved.skipped, *({"name": n, "reason": why} for n, why in traced.skipped if n not in listed)]
    unique = tuple({(row["name"], row["reason"]): row for row in skipped}.values())
    step = Step(to_dict(spec), solved.changed, unique, time.perf_counter() - started, None, solved.unmatched)
    return solved.plan, step


def _rules(target: Target, spec: Quantize) -> Target:
    """With symmetric activations a ReLU is no part of the rounding (half of the codes lie below zero): it stands alone."""
    symmetric = isinstance(spec.activations, Int) and spec.activations.symmetric
    return replace(target, fused=frozenset()) if symmetric and not target.signed_activations else target
