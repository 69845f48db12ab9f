"""Tracing and calibration: the graph of a model, and the range of every value in it, from calls that are intercepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.data import Batches
from whet.errors import DataError
from whet.graph.nodes import Graph, Node, kinds_of
from whet.graph.solve import Calibration
from whet.graph.views import WeightView
from whet.numerics.clipping import needs_histogram
from whet.numerics.observers import HistogramRange, Range, observe_histogram, observe_minmax, observe_moving_average
from whet.progress import task
from whet.specs.quantization import MinMax, MovingAverage, Observer
from whet.torch.fold import FoldedWeights, fold_, foldable, folded_weights
from whet.torch.interception import Call, Interceptor, Session, map_tensors, tensors_in
from whet.torch.model import call, copy, device_of, dtype_of, to_tensors
from whet.torch.namespace import xp
from whet.torch.operations import Operation, operation

Tensor = Any
_CONSTANT = ""  # the value name of a tensor that depends on parameters and constants only


@dataclass(frozen=True, slots=True)
class Traced:
    """What tracing found. weights: views of every weight in the graph, after folding, in float32; biases: likewise.

    skipped: (layer, reason) for layers that no operation of the graph stands for.
    """

    calibration: Calibration
    weights: Mapping[str, WeightView]
    biases: Mapping[str, npt.NDArray[np.float32]]
    skipped: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Seen:
    """What the calls of all forward passes showed."""

    nodes: dict[str, Node] = field(default_factory=dict)
    axes: dict[str, tuple[str, tuple[int, int | None]]] = field(default_factory=dict)  # weight -> (layer, axes)
    ranges: dict[str, Range | HistogramRange] = field(default_factory=dict)
    inputs: dict[str, None] = field(default_factory=dict)
    outputs: dict[str, None] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    computed: dict[str, str] = field(default_factory=dict)  # layer -> why its weight is no parameter
    broken: set[str] = field(default_factory=set)


def trace(
    model: Any,
    example: Any,
    calibration: Batches | None,
    *,
    progress: bool,
    observer: Observer | None = None,
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Traced:
    """Trace `model` on `example`, fold its batch norms, then observe every value on all of `calibration`.

    `model` is untouched. `example` and the batches are as `Batches` yields them. Ranges come from `calibration` only, as
    `observer` needs them (None: least and greatest values). tensors: what takes the place of the folded model's own.

    Raises:
        DataError: the model failed on the example or on a batch.
    """
    refused: set[str] = set()
    while True:
        work = copy(model).eval()
        folds = {norm: layer for norm, layer in _find_folds(work, example).items() if norm not in refused}
        folded = folded_weights(work, folds)
        fold_(work, folds, folded)
        if tensors is not None:
            folded |= replace_(work, tensors)
        tracer = Tracer(work, folds)
        tracer.observer = MinMax() if observer is None else observer
        if calibration is None:
            _run(work, example)
        else:
            _observe(work, tracer, example, calibration, progress)
        if not tracer.seen.broken:
            return _collect(work, tracer, folds, folded)
        # A branch that only some batches take runs a convolution without its batch norm: that pair stays as it is.
        refused |= tracer.seen.broken


def _observe(work: Any, tracer: Tracer, example: Any, calibration: Batches, progress: bool) -> None:
    """Run the example, unobserved, and all of `calibration`; an example that is its first batch is run once."""
    with task("calibrate", len(calibration), enabled=progress) as bar:
        for index, (inputs, _) in enumerate(calibration):
            if index == 0 and not _same(inputs, example):
                _run(work, example)
            tracer.observing = True
            _run(work, inputs)
            bar.advance()


def _same(one: Any, other: Any) -> bool:
    """Whether two batches hold equal arrays in one structure."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one is other or (one.dtype == other.dtype and np.array_equal(one, other))
    return one is other


def _run(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        call(model, to_tensors(inputs, device_of(model), dtype_of(model)))


def _find_folds(model: Any, example: Any) -> dict[str, str]:
    """The batch norms that can be folded: two rows show it, or the whole example where the model does not take two."""
    few = _two_rows(to_tensors(example, device_of(model), dtype_of(model)))
    try:
        return _folds_of(model, few)
    except DataError:
        return _folds_of(model, example)


def _folds_of(model: Any, inputs: Any) -> dict[str, str]:
    scout = copy(model)
    tracer = Tracer(scout)
    _run(scout, inputs)
    return foldable(tracer.graph(), scout)


def _two_rows(tensors: Any) -> Any:
    """The first two rows of all tensors where they have the same number of them, else all rows."""
    rows = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors_in(tensors)}
    return map_tensors(tensors, lambda tensor: tensor[:2]) if len(rows) == 1 and 0 not in rows else tensors


class Tracer(Interceptor):
    """Records nodes, and once `observing`, the range of every value."""

    def __init__(self, model: Any, folds: Mapping[str, str] | None = None) -> None:
        super().__init__(model, folds)
        self.seen = _Seen()
        self.observing = False
        self.observer: Observer = MinMax()

    def graph(self) -> Graph:
        """What was recorded so far."""
        return Graph(tuple(self.seen.nodes.values()), tuple(self.seen.inputs), tuple(self.seen.outputs))

    def enter(self, session: Session, args: Any, kwargs: Any) -> Any:
        """Name the floating-point inputs `input:k`."""
        for index, tensor in enumerate(t for t in tensors_in((args, kwargs)) if t.is_floating_point()):
            name = f"input:{index}"
            self.seen.inputs[name] = None
            self._produce(session, tensor, name)
        return args, kwargs

    def after(self, session: Session, call: Call, site: str, result: Any) -> Any:
        """Record the node of this call."""
        operands = call.tensors()
        self.seen.parameters.update(name for t in operands if (name := session.parameter(t)) is not None)
        target = call.target
        results = [target] if target is not None else [t for t in tensors_in(result) if t.is_floating_point()]
        results = [t for t in results if target is not None or all(t is not operand for operand in operands)]
        values = [session.values[id(t)][1] for t in operands if id(t) in session.values]
        values = [value for value in values if value != _CONSTANT]
        data = [t for t in operands if not t.is_floating_point() and session.parameter(t) is None]
        if not values and not data:
            for tensor in results:
                session.values[id(tensor)] = (tensor, _CONSTANT)
            return result
        found = operation(call, lambda tensor: self._is_constant(session, tensor))
        if results:
            node = self._node(session, call, site, found, tuple(values), len(results))
            self.seen.nodes.setdefault(site, node)
            for name, tensor in zip(node.values, results, strict=True):
                self._produce(session, tensor, name)
        return result

    def leave(self, session: Session, outputs: Any) -> Any:
        """Note which values are returned."""
        for tensor in tensors_in(outputs):
            if id(tensor) in session.values and session.values[id(tensor)][1] != _CONSTANT:
                self.seen.outputs[session.values[id(tensor)][1]] = None
        return outputs

    def broken(self, norms: list[str]) -> None:
        """These batch norms cannot be folded after all."""
        self.seen.broken.update(norms)

    def _produce(self, session: Session, tensor: Tensor, name: str) -> None:
        session.values[id(tensor)] = (tensor, name)
        if self.observing:
            values = tensor.detach()
            values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
            self.seen.ranges[name] = self._observed(self.seen.ranges.get(name), values)

    def _observed(self, state: Range | HistogramRange | None, values: Tensor) -> Range | HistogramRange:
        if needs_histogram(self.observer):
            before = state if isinstance(state, HistogramRange) else None
            return observe_histogram(before, values.cpu(), xp=xp)
        before_range = state if isinstance(state, Range) else None
        if isinstance(self.observer, MovingAverage):
            return observe_moving_average(before_range, values, self.observer.momentum, xp=xp)
        return observe_minmax(before_range, values, xp=xp)

    def _is_constant(self, session: Session, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return True
        return session.parameter(tensor) is not None or session.values.get(id(tensor), (None, _CONSTANT))[1] == _CONSTANT

    def _node(self, session: Session, call: Call, site: str, found: Operation, inputs: tuple[str, ...], outputs: int) -> Node:
        path = session.path
        weight = None if found.weight is None else session.parameter(found.weight)
        bias = None if found.bias is None else session.parameter(found.bias)
        layer = path
        more = tuple(name for name in (session.parameter(tensor) for tensor in found.more) if name is not None)
        if found.weight is not None:
            if weight is not None:
                layer = layer_of(path, weight) if not found.more else path
                self.seen.axes.setdefault(weight, (layer, found.axes))
                for name in more:
                    self.seen.axes.setdefault(name, (layer, (0, 1)))
            elif self._is_constant(session, found.weight):
                self.seen.computed[path] = "its weight is computed in the forward pass (weight_norm or another parametrization)"
        elif found.op not in ("add", "mul", "concat"):
            named = (session.parameter(t) for t in call.tensors() if isinstance(t, torch.nn.Parameter))
            weight = next((name for name in named if name is not None), None)
            layer = path or weight or ""  # a bare parameter of the model itself is named, not the model
        return Node(site, found.op, inputs, layer, weight, bias, outputs, kinds_of(session.module), more)


def layer_of(path: str, weight: str) -> str:
    """The name users give a layer in keep and include: its module's path, or that of a bare parameter it uses."""
    owner, _, last = weight.rpartition(".")
    return owner if last == "weight" and owner else path if last == "weight" else weight


def replace_(model: Any, tensors: Mapping[str, npt.NDArray[np.float32]]) -> FoldedWeights:
    """*In place*: the values that take the place of a folded model's own; the same as tensors."""
    found = {name: torch.from_numpy(array) for name, array in tensors.items()}
    with torch.no_grad():
        for name, tensor in found.items():
            owner, _, last = name.rpartition(".")
            getattr(model.get_submodule(owner), last).copy_(tensor)
    return found


def _collect(model: Any, tracer: Tracer, folds: dict[str, str], folded: FoldedWeights) -> Traced:
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def array(name: str) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = folded.get(name, tensors[name]).detach().float().cpu().numpy()
        return found

    graph = tracer.graph()
    weights = {name: WeightView(name, layer, array(name), axes[0], axes[1]) for name, (layer, axes) in tracer.seen.axes.items()}
    biases = {node.bias: array(node.bias) for node in graph.nodes if node.bias is not None}
    skipped = [*tracer.seen.computed.items(), *_never_run(model, tracer.seen.parameters, folds)]
    calibration = Calibration(graph, tracer.seen.ranges, tuple(folds.items()))
    return Traced(calibration, weights, biases, tuple(skipped))


def _never_run(model: Any, seen: set[str], folds: Mapping[str, str]) -> list[tuple[str, str]]:
    """Layers none of whose own parameters any call read."""
    idle = []
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        names = [known.get(id(parameter), "") for _, parameter in module.named_parameters(recurse=False)]
        if own and path not in folds and not any(name in seen for name in names):
            idle.append((path, "never run by the example or the calibration data"))
    return idle


def check_calibration(calibration: Batches | None, needed: bool) -> None:
    """Raise `DataError` where activations are quantized and there is nothing to calibrate with."""
    if needed and calibration is None:
        raise DataError(
            "Quantizing activations needs calibration data, got None. Pass calibration= some batches like those the model "
            "will see (a few hundred examples), or quantize weights only with Quantize(…, activations=None)."
        )
