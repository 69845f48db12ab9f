"""Post-training quantization of Keras models: trace, calibrate, solve; and the simulation of what was solved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from whet.data import Batches, rows
from whet.errors import DataError, ModelError
from whet.graph.nodes import Graph
from whet.graph.placement import Placement, Plan
from whet.graph.solve import Calibration, solve
from whet.graph.views import WeightView
from whet.keras.arithmetic import Arithmetic
from whet.keras.clone import Model, Program, Ref, Tensor, assemble, safe
from whet.keras.model import predict
from whet.keras.namespace import xp
from whet.keras.trace import lowered
from whet.keras.views import Kernel, to_numpy
from whet.numerics.affine import QParams, fake_quantize, quantize_bias
from whet.numerics.observers import Range
from whet.progress import task
from whet.records import Step
from whet.specs import Int, Quantize, Target
from whet.specs.base import to_dict

TIE = 1e-4  # what float arithmetic may take from a mean that is half a code


@keras.saving.register_keras_serializable(package="whet")
class FakeQuantize(keras.layers.Layer):  # type: ignore[misc]
    """What an integer tensor holds, in float: `scale * (clip(round(x / scale) + zero_point) - zero_point)`.

    Per tensor, with the straight-through gradient. bits, symmetric and narrow are those of `Int`. `away=True` rounds halves
    of the signed codes away from zero, as LiteRT's average pooling does.
    """

    def __init__(
        self,
        scale: float,
        zero_point: int,
        bits: int = 8,
        symmetric: bool = False,
        narrow: bool | None = None,
        away: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.away = bool(away)
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.codes = Int(bits, symmetric=symmetric, narrow=narrow)
        self.supports_masking = True
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """`x`, of any shape, rounded to the codes' values."""
        if self.away:
            signed = x / self.scale + float(self.zero_point - self._shift)
            rounded = ops.sign(signed) * ops.floor(ops.abs(signed) + (0.5 + TIE))
            x = x + ops.stop_gradient((rounded - float(self.zero_point - self._shift)) * self.scale - x)
        return fake_quantize(x, self.scale, float(self.zero_point), self.codes, xp=xp)

    @property
    def _shift(self) -> int:
        """What is taken from the codes to make them signed."""
        return 0 if self.codes.symmetric else 2 ** (self.codes.bits - 1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        codes = {"bits": self.codes.bits, "symmetric": self.codes.symmetric, "narrow": self.codes.narrow}
        return {**super().get_config(), "scale": self.scale, "zero_point": self.zero_point, "away": self.away, **codes}


def quantize(
    model: Model, spec: Quantize, target: Target, *, calibration: Batches | None, example: Any, progress: bool
) -> tuple[Plan, Step]:
    """Trace, calibrate, place and solve. `model` is untouched.

    Raises:
        ModelError: the model cannot be traced, or nothing in it would change.
        DataError: calibration is missing or empty, does not fit the model, or reaches NaN or Inf.
    """
    started = time.monotonic()
    program = lowered(model, example)
    ranges: dict[str, Range] = {}
    if spec.activations is not None:
        if calibration is None:
            raise DataError(
                "Quantizing activations needs calibration data: pass calibration= some hundred examples like those the model "
                "will see, or quantize weights only with Quantize(…, activations=None)."
            )
        ranges = calibrate(program, calibration, progress)
    weights, biases = arrays(program)
    solved = solve(Calibration(program.graph, ranges, tuple(program.folds)), weights, biases, spec, target)
    skipped = (*solved.skipped, *_float_operations(program.graph, solved.placement, target))
    step = Step(to_dict(spec), solved.changed, skipped, time.monotonic() - started, None, solved.unmatched)
    return solved.plan, step


def arrays(program: Program) -> tuple[dict[str, WeightView], dict[str, npt.NDArray[np.float32]]]:
    """The weights, as they are quantized, and biases of a program as NumPy arrays, batch norm folded."""
    weights = {name: quantized_view(kernel) for name, kernel in program.kernels.items()}
    return weights, {name: to_numpy(variable).astype(np.float32) for name, variable in program.biases.items()}


def quantized_view(kernel: Kernel) -> WeightView:
    """A kernel as it is quantized: a depthwise one, (…, in, multiplier), as (…, 1, in * multiplier)."""
    view = kernel.view()
    if view.in_axis is not None:
        return view
    array = np.reshape(view.array, (*view.array.shape[:-2], 1, -1))
    return WeightView(view.name, view.layer, array, array.ndim - 1, None)


def calibrate(program: Program, calibration: Batches, progress: bool) -> dict[str, Range]:
    """The range of every floating-point value over all batches; NaN where a value was not finite."""
    watched = [ref.name for ref in program.values()]
    observed = assemble(program, outputs=lambda tensors, _: [_extremes(tensors[name]) for name in watched])
    ranges: dict[str, Range] = {}
    with task("Calibrating", None, enabled=progress) as shown:
        for inputs, _ in calibration:
            count = rows(inputs)
            for name, (low, high) in zip(watched, predict(observed, inputs), strict=True):
                ranges[name] = _joined(ranges.get(name), Range(float(low), float(high), count))
            shown.advance()
    return ranges


def _extremes(tensor: Tensor) -> Tensor:
    """(2,): least and greatest value; NaN where any is not finite."""
    tensor = ops.cast(tensor, "float32")
    pair = ops.stack([ops.min(tensor), ops.max(tensor)])
    return ops.where(ops.all(ops.isfinite(tensor)), pair, float("nan"))


def _joined(seen: Range | None, new: Range) -> Range:
    if seen is None:
        return new
    low, high = np.minimum(seen.low, new.low), np.maximum(seen.high, new.high)  # both keep a NaN
    return Range(float(low), float(high), seen.count + new.count)


def _float_operations(graph: Graph, placement: Placement, target: Target) -> list[dict[str, str]]:
    """Operations without weights that read integers and compute in float: their layers are listed, not hidden."""
    known = target.compute | target.quantized | target.fused | target.shared
    found = {
        node.layer: {"name": node.layer, "reason": f"operation {node.op!r} computes in float on {target.name}"}
        for node in graph.nodes
        if node.op not in known and node.weight is None and any(value in placement.values for value in node.inputs)
    }
    return list(found.values())


def simulate(model: Model, plan: Plan) -> Model:
    """A copy of `model` that computes, in float, what the target's integers will.

    It is a flat Functional model: batch norm folded, weights and biases rounded, a `FakeQuantize` layer behind every value
    that the plan quantizes.

    Raises:
        ModelError: the plan was made for another model.
    """
    program = planned(model, plan)
    for name, array in rounded_weights(program, plan).items():
        program.kernels[name].variable.assign(array)
    for name, codes, scale in bias_codes(program, plan):
        program.biases[name].assign(codes.astype(np.float32) * scale)
    return assemble(program, insert=inserter(program, plan))


def planned(model: Model, plan: Plan, example: Any = None) -> Program:
    """The program of `model`, which `plan` must fit."""
    program = lowered(model, _symbolic_example(model) if example is None else example)
    values = {ref.name for ref in program.values()}
    missing = [name for name in (*plan.weights, *plan.casts) if name not in program.kernels]
    missing += [name for name in plan.biases if name not in program.biases]
    missing += [name for name in plan.tensors if name not in program.kernels and name not in program.biases]
    missing += [name for name in plan.values if name not in values]
    if missing:
        raise ModelError(
            f"This plan was made for another model: it quantizes {missing[0]!r}, which {model.name!r} does not have. "
            "Quantize this model itself."
        )
    for name, array in plan.tensors.items():
        variable = program.kernels[name].variable if name in program.kernels else program.biases[name]
        variable.assign(array.reshape(variable.shape))
    return program


def _symbolic_example(model: Model) -> Any:
    """What a subclassed model was built with, in the place of an example; None where it does not say."""
    build = getattr(model, "_build_shapes_dict", None)
    shape = next(iter(build.values()), None) if build and len(build) == 1 else None
    if not isinstance(shape, tuple | list) or not shape or not all(size is None or isinstance(size, int) for size in shape):
        return None
    return np.zeros([size or 1 for size in shape], np.float32)


def rounded_weights(program: Program, plan: Plan) -> dict[str, npt.NDArray[np.float32]]:
    """The planned weights as the file will hold them, in float."""
    found = {}
    for name in plan.weights:
        kernel = program.kernels[name]
        array = np.asarray(quantized_view(kernel).array, np.float32)
        found[name] = plan.rounded(name, array).reshape(kernel.variable.shape)
    for name, dtype in plan.casts.items():
        array = to_numpy(program.kernels[name].variable)
        found[name] = to_numpy(ops.cast(ops.cast(ops.convert_to_tensor(array), dtype), "float32"))
    return found


def bias_codes(program: Program, plan: Plan) -> list[tuple[str, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """(name, int32 codes, scale) of every planned bias."""
    found = []
    for name, (source, weight) in plan.biases.items():
        bias = to_numpy(program.biases[name]).astype(np.float32)
        scales = plan.values[source].scale, plan.weights[weight].scale
        found.append((name, quantize_bias(bias, *scales), np.asarray(scales[0] * scales[1], np.float32)))
    return found


def _alike(one: QParams | None, other: QParams | None) -> bool:
    return one is not None and other is not None and bool(one.scale == other.scale and one.zero_point == other.zero_point)


def inserter(program: Program, plan: Plan) -> Any:
    """What stands behind each value: its quantizer, or nothing where the codes cannot have changed."""
    moved = {"max_pool", "reshape", "flatten", "transpose", "identity", "concat", "pad"}
    same: Mapping[str, bool] = {
        call.node.name: call.node.op in moved
        and all(plan.values.get(value) is plan.values.get(call.node.name) for value in call.node.inputs)
        for call in program.calls
    }

    # Where an average has the scale of its input, the runtime takes the mean of the codes themselves.
    averages = {
        call.node.name
        for call in program.calls
        if call.node.op == "avg_pool" and _alike(plan.values.get(call.node.inputs[0]), plan.values.get(call.node.name))
    }

    kernels = Arithmetic(program, plan)

    def insert(ref: Ref, tensor: Tensor) -> Tensor:
        tensor = kernels.computed(ref, tensor)
        params = plan.values.get(ref.name)
        if params is None or same.get(ref.name, False):
            return kernels.seen(ref, tensor)
        spec = params.spec
        name = f"quantize_{safe(ref.name)}"
        scale, zero_point = float(params.scale), int(params.zero_point)
        away = ref.name in averages
        quantizer = FakeQuantize(scale, zero_point, spec.bits, spec.symmetric, spec.narrow, away, name=name)
        return kernels.seen(ref, quantizer(tensor))

    return insert
