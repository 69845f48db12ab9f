"""Post-training quantization of Keras models: trace, equalize, calibrate, solve, refine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from whet.data import Batches
from whet.errors import DataError
from whet.graph.correct import correct_analytically
from whet.graph.equalize import Equalized, check_same_function, equalize
from whet.graph.nodes import Graph
from whet.graph.placement import Placement, Plan, rules_for
from whet.graph.refine import needs_data, refine, refines
from whet.graph.solve import Calibration, solve
from whet.keras.block_rounding import round_blocks
from whet.keras.calibrate import calibrate
from whet.keras.clone import Model, Program, assemble
from whet.keras.model import forward, is_plain, predict
from whet.keras.moments import KerasRunner
from whet.keras.quantize import arrays
from whet.keras.trace import lowered
from whet.keras.variables import named_variables
from whet.records import Step
from whet.specs import Int, Quantize, Target
from whet.specs.base import to_dict
from whet.specs.quantization import AdaRound


def quantize(
    model: Model, spec: Quantize, target: Target, *, calibration: Batches | None, example: Any, progress: bool
) -> tuple[Plan, Step]:
    """Trace, equalize, calibrate, place, solve and refine. `model` is untouched.

    Raises:
        ModelError: the model cannot be traced, or nothing in it would change.
        DataError: calibration is missing or empty, does not fit the model, or reaches NaN or Inf.
    """
    started = time.monotonic()
    observed = isinstance(spec.activations, Int)
    _check_calibration(spec, calibration)
    if is_plain(model):
        forward(model, example)  # says so where the model does not take it; tracing a subclassed one does
    rules = rules_for(target, spec)
    equalized = _equalized(model, spec, rules, calibration, example)
    program = _program(model, example, equalized.tensors)
    ranges = calibrate(program, calibration, progress, spec.observer) if observed and calibration is not None else {}
    weights, biases = arrays(program)
    solved = solve(Calibration(program.graph, ranges, tuple(program.folds)), weights, biases, spec, rules)
    solved = equalized.noted(solved)
    if refines(spec) or spec.correct_bias is not None:
        runner = KerasRunner(model, example, calibration, equalized.tensors)
        solved = refine(solved, program.graph, weights, biases, runner, progress=progress)
        if isinstance(spec.rounding, AdaRound) and spec.rounding.blocks:
            plan, rows = round_blocks(solved.plan, program.graph, weights, runner, spec.rounding, progress=progress)
            changed = tuple({**row, **rows.get(row["name"], {})} for row in solved.changed)
            solved = replace(solved, plan=plan, changed=changed)
        if spec.correct_bias is not None and spec.correct_bias.analytic:
            solved = correct_analytically(solved, program.graph, weights, biases, runner)
    skipped = (*solved.skipped, *_float_operations(program.graph, solved.placement, target))
    step = Step(to_dict(spec), solved.changed, skipped, time.monotonic() - started, None, solved.unmatched)
    return solved.plan, step


def _check_calibration(spec: Quantize, calibration: Batches | None) -> None:
    if calibration is not None or not (isinstance(spec.activations, Int) or needs_data(spec)):
        return
    if isinstance(spec.activations, Int):
        raise DataError(
            "Quantizing activations needs calibration data: pass calibration= some hundred examples like those the model "
            "will see, or quantize weights only with Quantize(…, activations=None)."
        )
    raise DataError(
        "This Quantize runs the model on data to choose scales and codes: pass calibration= some hundred examples like those "
        "the model will see, or leave rounding=, equalize= and correct_bias= out."
    )


def _program(model: Model, example: Any, tensors: Mapping[str, npt.NDArray[Any]]) -> Program:
    """The program of `model` with `tensors` in the place of its own variables."""
    program = lowered(model, example)
    variables = named_variables(program)
    for name, array in tensors.items():
        variables[name].assign(array.reshape(variables[name].shape))
    return program


def _equalized(model: Model, spec: Quantize, rules: Target, calibration: Batches | None, example: Any) -> Equalized:
    """What `spec.equalize` changes; checked to leave what the model computes for `example`."""
    if spec.equalize is None:
        return Equalized()
    program = lowered(model, example)
    weights, biases = arrays(program)
    runner = KerasRunner(model, example, calibration, {})
    found = equalize(program.graph, weights, biases, spec, rules, runner)
    after = predict(assemble(_program(model, example, found.tensors)), example)
    check_same_function(predict(model, example), after, type(spec.equalize).__name__)
    return found


def _float_operations(graph: Graph, placement: Placement, target: Target) -> list[dict[str, str]]:
    """Operations without weights that read integers and compute in float: their layers are listed, not hidden."""
    known = target.compute | target.quantized | target.fused | target.shared
    found = {
        node.layer: {"name": node.layer, "reason": f"operation {node.op!r} computes in float on {target.name}"}
        for node in graph.nodes
        if node.op not in known and node.weight is None and any(value in placement.values for value in node.inputs)
    }
    return list(found.values())
