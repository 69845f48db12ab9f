"""The Keras runner of post-training algorithms: the float and the quantized program side by side on calibration data.

Values are computed when they are asked for and kept while something may still read them, so that the sequence of all layers
costs one forward pass of either program.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.data import Batches
from whet.errors import DataError
from whet.graph.channels import WEIGHTED
from whet.graph.matrices import layout
from whet.graph.nodes import Node
from whet.graph.placement import Plan
from whet.graph.refine import Request
from whet.keras.clone import Call, Model, Program, Tensor, refs, substituted
from whet.keras.model import arrange
from whet.keras.namespace import xp
from whet.keras.patches import Geometry, columns_at, geometry, outputs_at, positions
from whet.keras.quantize import planned, quantized_view, round_at_run_time, rounded_weights
from whet.keras.trace import lowered
from whet.keras.variables import named_variables
from whet.keras.views import to_numpy, walk
from whet.numerics.affine import fake_quantize, quantize_bias
from whet.numerics.regression import Regression, merged, regression
from whet.numerics.threads import threads_for

ROWS = 1 << 16  # of one weight, over all calibration data: a sample of the positions where there are more
BLOCK = 8192  # rows that are summed in float32
LEAST_AGREEMENT = 1e-3  # of the greatest output: between a layer's own output and its product of rows


class Evaluator:
    """A program on batches of calibration data, value by value.

    plan: rounds the values that it quantizes; without the last bits of integer kernels, which moments do not hold.
    """

    def __init__(self, model: Model, program: Program, calibration: Batches, plan: Plan | None) -> None:
        self.program, self.plan = program, plan
        self.makers: dict[str, Call] = {ref.name: call for call in program.calls for ref in refs(call.outputs)}
        self.readers: dict[str, set[str]] = {}
        for call in program.calls:
            for ref in call.inputs:
                self.readers.setdefault(ref.name, set()).add(call.node.name)
        self.given = [ref.name for ref in refs(program.inputs)]
        self.inputs = [keras.tree.flatten(arrange(model, inputs)) for inputs, _ in calibration]
        self.batches: list[dict[str, Tensor]] = [{} for _ in self.inputs]
        self.done: list[set[str]] = [set() for _ in self.inputs]

    def value(self, index: int, name: str) -> Tensor:
        """The value `name` of a batch."""
        held = self.batches[index]
        pending = [name]
        while pending:  # not by recursion: networks are deep
            wanted = pending[-1]
            if wanted in held:
                pending.pop()
                continue
            if wanted in self.given:
                array = self.inputs[index][self.given.index(wanted)]
                held[wanted] = self._rounded(wanted, keras.ops.convert_to_tensor(array))
                continue
            call = self.makers[wanted]
            missing = [ref.name for ref in call.inputs if ref.name not in held]
            if missing:
                pending += missing
                continue
            self._run(index, call)
        return held[name]

    def _run(self, index: int, call: Call) -> None:
        held = self.batches[index]
        args, kwargs = substituted((call.args, call.kwargs), held)
        if isinstance(call.operation, keras.Layer):
            kwargs = {**kwargs, **({"training": False} if getattr(call.operation, "_call_has_training_arg", False) else {})}
        with without_gradients():
            results = keras.tree.flatten(call.operation(*args, **kwargs))
        for ref, tensor in zip(refs(call.outputs), results, strict=True):
            held[ref.name] = self._rounded(ref.name, tensor) if ref.is_float else tensor
        self.done[index].add(call.node.name)

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        params = None if self.plan is None else self.plan.values.get(name)
        if params is None or "float" not in keras.backend.standardize_dtype(tensor.dtype):
            return tensor
        return fake_quantize(tensor, float(params.scale), float(params.zero_point), params.spec, xp=xp)

    def forget(self, keep: set[str]) -> None:
        """Let go of the values whose readers have all run."""
        for held, done in zip(self.batches, self.done, strict=True):
            for name in [n for n in held if n not in keep and self.readers.get(n, set()) <= done]:
                if name in self.readers:
                    del held[name]

    def has_run(self, node: str) -> bool:
        """Whether an operation has run on any batch."""
        return any(node in done for done in self.done)


def without_gradients() -> Any:
    """A context in which nothing is recorded for gradients."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


@dataclass(slots=True)
class _Rows:
    """The columns of a call's input, (groups, rows, columns), and its wanted outputs, (rows, channels)."""

    columns: npt.NDArray[np.float32]
    targets: npt.NDArray[np.float32]


class KerasRunner:
    """`graph.refine.Runner` for a Keras model.

    tensors: what takes the place of the folded model's own variables in the float program too (equalized ones).
    """

    def __init__(
        self, model: Model, example: Any, calibration: Batches | None, tensors: Mapping[str, npt.NDArray[np.float32]]
    ) -> None:
        self.model, self.example, self.calibration = model, example, calibration
        self.program = lowered(model, example)
        self.variables = named_variables(self.program)
        for name, array in tensors.items():
            self.variables[name].assign(array.reshape(self.variables[name].shape))
        self.layers = dict(walk(model))
        self.nodes: dict[str, list[Call]] = {}
        for call in self.program.calls:
            if call.node.op in WEIGHTED and call.node.weight is not None:
                self.nodes.setdefault(call.node.weight, []).append(call)
        self._exact: Evaluator | None = None
        self._own: Evaluator | None = None
        self._used: dict[str, tuple[Any, ...]] = {}  # weight -> what was rounded to get its present values

    def regressions(self, plan: Plan | None, requests: Sequence[Request]) -> Mapping[str, tuple[Regression, ...]]:
        """See `Runner`."""
        if self.calibration is None:
            raise DataError("The moments of a model's values need calibration data, got None. Pass calibration=.")
        exact = self._exact = self._exact or Evaluator(self.model, self.program, self.calibration, None)
        own = exact if plan is None else self._quantized(plan, self.calibration)
        found: dict[str, tuple[Regression, ...]] = {}
        wrong: set[str] = set()
        for index in range(len(exact.batches)):
            for request in requests:
                for count, call in enumerate(self.nodes.get(request.weight, ())):
                    block = self._rows(exact, own, index, request, call, count)
                    if block is None:
                        wrong.add(request.weight)
                    elif request.weight not in wrong:
                        before = found.get(request.weight, (None,) * len(block.columns))
                        found[request.weight] = tuple(_add(a, b, g, block) for g, (a, b) in enumerate(_pair(before, block)))
        keep = {value for request in requests for call in self.nodes.get(request.weight, ()) for value in call.node.inputs}
        if plan is not None:
            exact.forget(set())
            own.forget(keep)
        return {name: seen for name, seen in found.items() if name not in wrong}

    def evaluators(self, plan: Plan) -> tuple[Evaluator, Evaluator]:
        """The float program, and the one that `plan` quantizes."""
        if self.calibration is None:
            raise DataError("Running a model on calibration data needs some, got None. Pass calibration=.")
        self._exact = self._exact or Evaluator(self.model, self.program, self.calibration, None)
        return self._exact, self._quantized(plan, self.calibration)

    def restart(self) -> None:
        """Begin again at the inputs."""
        self._exact = self._own = None

    def _quantized(self, plan: Plan, calibration: Batches) -> Evaluator:
        """The quantized program, whose variables are those of `plan`."""
        own = self._own
        if own is None or own.plan is None or own.plan.values is not plan.values:
            program = planned(self.model, plan, self.example)
            for name, array in rounded_weights(program, plan).items():
                program.kernels[name].variable.assign(array)
            round_at_run_time(program, plan)
            own, self._used = Evaluator(self.model, program, calibration, plan), {}
        named = dict.fromkeys((*plan.weights, *plan.tensors))
        changed = [name for name in named if name in self.nodes and self._is_new(plan, name)]
        for name in changed:
            self.assign(own.program, plan, name)
        if any(own.has_run(call.node.name) for name in changed for call in self.nodes[name]):
            own = Evaluator(self.model, own.program, calibration, plan)  # what has run is not as it was: begin again
        self._own = own
        return own

    def _is_new(self, plan: Plan, name: str) -> bool:
        """Whether a weight, or the bias beside it, is rounded in another way than when it was assigned last."""
        bias = self.nodes[name][0].node.bias or ""
        state = (plan.weights.get(name), plan.codes.get(name), plan.tensors.get(name), plan.tensors.get(bias))
        before, self._used[name] = self._used.get(name), state
        return before is None or any(a is not b for a, b in zip(state, before, strict=True))

    def assign(self, program: Program, plan: Plan, name: str) -> None:
        """*In place*: a weight, and the bias beside it, as `plan` rounds them."""
        kernel, bias = self.program.kernels[name], self.nodes[name][0].node.bias
        array = np.asarray(quantized_view(kernel).array, np.float32)
        array = plan.tensors[name].reshape(array.shape) if name in plan.tensors else array
        stored = plan.rounded(name, array) if name in plan.weights else array
        program.kernels[name].variable.assign(stored.reshape(kernel.variable.shape))
        if bias is None:
            return
        values = plan.tensors.get(bias, to_numpy(self.program.biases[bias])).astype(np.float32)
        if bias in plan.biases:
            source, weight = plan.biases[bias]
            scales = plan.values[source].scale, plan.weights[weight].scale
            values = quantize_bias(values, *scales).astype(np.float32) * np.asarray(scales[0] * scales[1], np.float32)
        program.biases[bias].assign(values.reshape(program.biases[bias].shape))

    def _rows(self, exact: Evaluator, own: Evaluator, index: int, request: Request, call: Call, count: int) -> _Rows | None:
        node = call.node
        if len(node.inputs) != 1:
            return None
        output = _array(exact.value(index, node.name))
        shape = geometry(call.operation, node.op)
        most = -(-ROWS // max(len(exact.batches), 1))
        at = positions(shape, output, most, zlib.crc32(f"{request.weight}/{index}/{count}".encode()))
        targets = outputs_at(shape, output, at)
        if index == 0 and not self._is_product(exact, index, call, shape, at, targets):
            return None
        x = _array(own.value(index, node.inputs[0]))
        if request.beside is not None:
            lost = _array(exact.value(index, request.beside)) - _array(own.value(index, request.beside))
            targets = targets + outputs_at(shape, lost, at)
        return _Rows(columns_at(shape, x, output.shape[1:-1], at), targets)

    def _is_product(self, exact: Evaluator, index: int, call: Call, shape: Geometry, at: Any, targets: Any) -> bool:
        """Whether the float output is the product of the rows and the weight, which all that follows rests on."""
        x = _array(exact.value(index, call.node.inputs[0]))
        columns = columns_at(shape, x, _array(exact.value(index, call.node.name)).shape[1:-1], at)
        view = quantized_view(self.program.kernels[str(call.node.weight)])
        where = layout(view, call.node.op, shape.groups)
        matrices = where.matrices(np.asarray(view.array, np.float32))
        if matrices.shape[2] != columns.shape[2]:
            return False
        made = np.concatenate([c @ m.T for c, m in zip(columns, matrices, strict=True)], axis=1)
        bias = 0.0 if call.node.bias is None else to_numpy(self.program.biases[call.node.bias])
        return bool(
            np.max(np.abs(made + bias - targets), initial=0.0) <= LEAST_AGREEMENT * np.max(np.abs(targets), initial=1e-6)
        )

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        found: npt.NDArray[np.float32] = to_numpy(self.variables[name]).astype(np.float32)
        return found

    def affine(self, node: Node) -> tuple[str, ...] | None:
        """See `Runner`."""
        call = next((call for call in self.program.calls if call.node.name == node.name), None)
        layer = None if call is None else call.operation
        last = getattr(layer, "axis", None) in (-1, [-1], (-1,)) or getattr(layer, "axis", None) == [len(node_shape(call)) - 1]
        if not isinstance(layer, keras.layers.LayerNormalization | keras.layers.RMSNormalization) or not last:
            return None
        if isinstance(layer, keras.layers.RMSNormalization):
            return (f"{node.layer}/{layer.scale.name}",)
        if not layer.scale:
            return None
        return (f"{node.layer}/gamma", f"{node.layer}/beta") if layer.center else (f"{node.layer}/gamma",)

    def normal(self, weight: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """See `Runner`."""
        layer = weight.rpartition("/")[0]
        path = next((norm for norm, folded in self.program.folds if folded == layer), None)
        if path is None:
            return None
        norm = self.layers[path]
        ones = np.ones(tuple(norm.moving_mean.shape))
        shift = to_numpy(norm.beta).astype(np.float64) if norm.center else 0 * ones
        factor = np.abs(to_numpy(norm.gamma).astype(np.float64)) if norm.scale else ones
        plain = quantized_view(lowered(self.model, self.example).kernels[weight])
        new = np.asarray(quantized_view(self.program.kernels[weight]).array, np.float64)
        others = tuple(axis for axis in range(new.ndim) if axis != plain.out_axis % new.ndim)
        sizes = [np.maximum(np.sum(np.abs(np.asarray(a, np.float64)), axis=others), 1e-30) for a in (new, plain.array)]
        scaled = sizes[0] / sizes[1]
        return shift * scaled, factor * scaled


def node_shape(call: Call | None) -> tuple[int | None, ...]:
    """The shape of what a call reads first."""
    return () if call is None else call.inputs[0].shape


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = to_numpy(tensor).astype(np.float32, copy=False)
    return array


def _pair(before: tuple[Regression | None, ...], block: _Rows) -> list[tuple[Regression | None, npt.NDArray[np.float32]]]:
    return list(zip(before, block.columns, strict=True))


def _add(seen: Regression | None, columns: npt.NDArray[np.float32], group: int, block: _Rows) -> Regression:
    """`seen` with the rows of one group."""
    wide = block.targets.shape[1] // len(block.columns)
    targets = np.ascontiguousarray(block.targets[:, group * wide : (group + 1) * wide])
    with threads_for(min(len(columns), BLOCK) * columns.shape[1] ** 2):
        for start in range(0, len(columns), BLOCK):
            seen = merged(seen, regression(columns[start : start + BLOCK], targets[start : start + BLOCK]))
    if seen is None:
        raise DataError("Calibration data is empty: there are no rows to take moments of.")
    return seen
