"""Post-training quantization of PyTorch models: trace, equalize, calibrate, solve, refine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from whet.data import Batches
from whet.graph.correct import correct_analytically
from whet.graph.equalize import Equalized, check_same_function, equalize
from whet.graph.placement import Plan, rules_for
from whet.graph.refine import check_data, refine, refines
from whet.graph.solve import solve
from whet.records import Step
from whet.specs import Int, Quantize, Target, to_dict
from whet.specs.quantization import AdaRound
from whet.torch.block_rounding import round_blocks
from whet.torch.model import predict
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
    check_calibration(calibration, observed)
    check_data(spec, calibration)
    rules = rules_for(target, spec)
    equalized = _equalized(model, spec, rules, calibration, example)
    options: dict[str, Any] = {"progress": progress, "observer": spec.observer, "tensors": equalized.tensors}
    traced = trace(model, example, calibration if observed else None, **options)
    graph, folds = traced.calibration.graph, traced.calibration.folds
    if equalized.folds is not None and set(equalized.folds) != set(folds):  # some batch parts a pair that the example folds
        equalized = Equalized(skipped=[("", "nothing equalized: some batches run a convolution without its batch norm")])
        traced = trace(model, example, calibration if observed else None, **(options | {"tensors": {}}))
    solved = solve(traced.calibration, traced.weights, traced.biases, spec, rules)
    solved = equalized.noted(solved)
    if refines(spec) or spec.correct_bias is not None:
        runner = TorchRunner(model, graph, dict(folds), calibration, equalized.tensors)
        solved = refine(solved, graph, traced.weights, traced.biases, runner, progress=progress)
        if isinstance(spec.rounding, AdaRound) and spec.rounding.blocks and calibration is not None:
            plan, rows = round_blocks(solved.plan, graph, traced.weights, calibration, runner, spec.rounding, progress=progress)
            changed = tuple({**row, **rows.get(row["name"], {})} for row in solved.changed)
            solved = replace(solved, plan=plan, changed=changed)
        if spec.correct_bias is not None and spec.correct_bias.analytic:
            solved = correct_analytically(solved, graph, traced.weights, traced.biases, runner)
    listed = {row["name"] for row in solved.skipped}
    skipped = [*solved.skipped, *({"name": n, "reason": why} for n, why in traced.skipped if n not in listed)]
    unique = tuple({(row["name"], row["reason"]): row for row in skipped}.values())
    step = Step(to_dict(spec), solved.changed, unique, time.perf_counter() - started, None, solved.unmatched)
    return solved.plan, step


def _equalized(model: Any, spec: Quantize, rules: Target, calibration: Batches | None, example: Any) -> Equalized:
    """What `spec.equalize` changes; checked to leave what the model computes for `example`."""
    if spec.equalize is None:
        return Equalized()
    traced = trace(model, example, None, progress=False)
    graph, folds = traced.calibration.graph, dict(traced.calibration.folds)
    found = equalize(graph, traced.weights, traced.biases, spec, rules, TorchRunner(model, graph, folds, calibration, {}))
    before, after = predict(model, example), predict(TorchRunner(model, graph, folds, None, found.tensors).reference, example)
    check_same_function(before, after, type(spec.equalize).__name__)
    return replace(found, folds=traced.calibration.folds)
