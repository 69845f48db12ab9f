"""Post-training algorithms on a solved plan: rounding and bias correction, layer after layer, on calibration data.

Each layer is rounded for the inputs that it gets in the model as it is quantized so far, towards the outputs that the float
model has (so that it also takes back what the layers before it lost). A framework side runs the two models and hands over
moments (`Runner`); everything else is here, once for both. The float model is never changed: codes, scales and biases go
into the plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from whet.data import Batches
from whet.errors import DataError
from whet.graph.channels import WEIGHTED
from whet.graph.matrices import layout
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.graph.rounding import Matrices, cannot_round, nearest, rounded, with_deviation, with_room
from whet.graph.solve import Solved, described
from whet.graph.views import WeightView
from whet.numerics.histograms import histogram
from whet.numerics.regression import Regression
from whet.numerics.statistics import sqnr_db
from whet.numerics.threads import threads_for
from whet.progress import task
from whet.specs.quantization import AWQ, Nearest, Quantize, SmoothQuant

TOGETHER = 8  # weights whose moments are taken in one pass, at most: what is held in memory


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted of one weight. beside: the value that is added to its output, so that the wanted output is the float
    model's, plus what `beside` has lost by quantization; None where there is no such value."""

    weight: str
    beside: str | None = None


class Runner(Protocol):
    """A framework side that runs the float model (batch norms folded, equalized) and the quantized one on calibration data."""

    def regressions(self, plan: Plan | None, requests: Sequence[Request]) -> Mapping[str, tuple[Regression, ...]]:
        """Moments of the inputs and wanted outputs of the weights, over all their calls, by weight name.

        The inputs are those in the model that `plan` simulates, or in the float model when it is None. The outputs are those
        of the float model *with* its bias, one column for each output channel, before any activation. One Regression for each
        group of a grouped convolution; columns are ordered as in `graph.matrices.Layout`. Where there are many rows, a seeded
        sample of them, the same in both models. Weights whose inputs are no rows of a matrix product are left out.
        """

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A parameter or buffer of the float model: folded, equalized."""

    def affine(self, node: Node) -> tuple[str, ...] | None:
        """The names of the parameters, (channels,), that a norm multiplies its output by and adds to it; None for others."""

    def normal(self, weight: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """Mean and deviation, (channels,), that a folded batch norm (its β and |γ|) gives the outputs of a weight; None."""


def refines(spec: Quantize) -> bool:
    """Whether `refine` has anything to do."""
    on_data = spec.correct_bias is not None and not spec.correct_bias.analytic
    return on_data or not isinstance(spec.rounding, Nearest)


def needs_data(spec: Quantize) -> bool:
    """Whether the algorithms of `spec` run the model on calibration data."""
    return refines(spec) or isinstance(spec.equalize, SmoothQuant | AWQ)


def check_data(spec: Quantize, calibration: Batches | None) -> None:
    """Raise `DataError` where an algorithm of `spec` needs calibration data and there is none."""
    if calibration is not None or not needs_data(spec):
        return
    equalize = isinstance(spec.equalize, SmoothQuant | AWQ)
    which = spec.equalize if equalize else spec.correct_bias if isinstance(spec.rounding, Nearest) else spec.rounding
    raise DataError(
        f"{type(which).__name__} looks at what the layers compute and needs calibration data, got None. Pass calibration= some "
        "hundred examples like those the model will see; labels are not used."
    )


def refine(
    solved: Solved,
    graph: Graph,
    weights: Mapping[str, WeightView],
    biases: Mapping[str, npt.NDArray[np.float32]],
    runner: Runner,
    *,
    progress: bool,
) -> Solved:
    """`solved` with the codes, scales and biases that `spec.rounding` and `spec.correct_bias` choose, and their rows.

    weights, biases: those that were solved. Rows of `changed` get "algorithm", "damping" (GPTQ) and "output_db", the output's
    signal-to-error ratio on the calibration data, beside "nearest_db", what rounding to nearest would have had there.
    """
    spec = solved.plan.spec
    if not refines(spec):
        return solved
    work = _Work(solved.plan, graph, weights, biases, spec)
    waves = waves_of(graph, work.plan.weights)
    with task("Rounding" if not isinstance(spec.rounding, Nearest) else "Correcting biases", None, enabled=progress) as bar:
        bar.total = sum(len(wave) for wave in waves)
        for wave in waves:
            seen = runner.regressions(work.plan, wave)
            for request in wave:
                with threads_for(_greatest_product(weights[request.weight])):
                    work.layer(request.weight, seen.get(request.weight))
                bar.advance(note=request.weight)
    if not isinstance(spec.rounding, Nearest):
        work.note_others({request.weight for wave in waves for request in wave})
    changed = tuple({**row, **work.rows.get(row["name"], {})} for row in solved.changed)
    return replace(solved, plan=work.plan, changed=changed, skipped=(*solved.skipped, *work.skipped))


def _greatest_product(view: WeightView) -> int:
    """The multiplications of a weight, (rows, columns), and its inputs' moments, (columns, columns), or of these alone."""
    rows = max(int(view.array.shape[view.out_axis]), 1)
    columns = int(view.array.size) // rows
    return max(rows, columns) * columns**2


class _Work:
    """The plan as it grows, layer by layer."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        weights: Mapping[str, WeightView],
        biases: Mapping[str, npt.NDArray[np.float32]],
        spec: Quantize,
    ) -> None:
        self.plan, self.weights, self.biases, self.spec = plan, weights, biases, spec
        self.nodes = {name: node for node in reversed(graph.nodes) for name in node.weights}
        self.nodes |= {str(node.weight): node for node in reversed(graph.nodes) if node.op in WEIGHTED}
        self.uses: dict[str, set[str | None]] = {}
        for node in graph.nodes:
            if node.bias is not None:
                self.uses.setdefault(node.bias, set()).add(node.weight)
        self.folded = {layer for _, layer in plan.folds}
        self.rows: dict[str, dict[str, Any]] = {}
        self.skipped: list[dict[str, str]] = []

    def layer(self, name: str, seen: tuple[Regression, ...] | None) -> None:
        """Round one weight and correct its bias."""
        node, view = self.nodes[name], self.weights[name]
        if seen is None:
            self._skip(node, "rounded to nearest: its inputs are no rows of a matrix product")
            return
        where = layout(view, node.op, len(seen))
        own = self.biases.get(node.bias) if node.bias is not None else None
        correct = self._corrects(node, own)
        fixed = None if correct else np.zeros(where.outputs) if own is None else own
        quadratics = [s.quadratic(None if fixed is None else where.rows(fixed)[g]) for g, s in enumerate(seen)]
        start = nearest(self.plan.weights[name], where, view.array)
        found = start
        if (reason := cannot_round(start.params, self.spec)) is not None:
            self._skip(node, f"rounded to nearest: {reason}")
        else:
            found = rounded(start.params, where, view.array, quadratics, self.spec)
        if correct and self.spec.correct_bias is not None and self.spec.correct_bias.batch_norm:
            found = self._deviation(node, found, with_deviation(found, where, seen))
        tensors = dict(self.plan.tensors)
        if correct and node.bias is not None:
            free = [s.free_bias(found.weight[g]) for g, s in enumerate(seen)]
            bias = np.concatenate(free).astype(np.float32)
            if node.bias in self.plan.biases:
                found = with_room(found, where, view.array, self._input_scale(node.bias), bias)
            tensors[node.bias] = bias
        errors = [[float(np.sum(q.error(m.weight[g]))) for g, q in enumerate(quadratics)] for m in (start, found)]
        signal = sum(float(np.sum(s.target_variance)) for s in seen)
        self._store(name, found, where.array(found.codes), tensors, isinstance(self.spec.rounding, Nearest))
        self.rows[name] |= {"output_db": decibels(signal, sum(errors[1])), "nearest_db": decibels(signal, sum(errors[0]))}

    def note_others(self, seen: set[str]) -> None:
        """List the layers whose weights are no matrices of rows: embeddings, attention, recurrent layers."""
        for name in self.plan.weights:
            if name not in seen and name in self.nodes:
                self._skip(self.nodes[name], f"rounded to nearest: operation {self.nodes[name].op!r} is no product of rows")

    def _corrects(self, node: Node, own: Any) -> bool:
        """Whether the layer's bias may follow; a bias that several weights share, or that is not there, may not."""
        wanted = self.spec.correct_bias
        if wanted is None or wanted.analytic:
            return False
        if node.bias is None or own is None:
            self._skip(node, "no bias correction: it has no bias")
            return False
        if len(self.uses[node.bias]) > 1:
            self._skip(node, "no bias correction: other layers use its bias too")
            return False
        return True

    def _deviation(self, node: Node, found: Matrices, scaled: Matrices | None) -> Matrices:
        if node.layer not in self.folded:
            return found
        if scaled is None:
            self._skip(node, "deviations are not re-estimated: its channels share a scale")
        return scaled or found

    def _input_scale(self, bias: str) -> float:
        value, _ = self.plan.biases[bias]
        return float(self.plan.values[value].scale)

    def _skip(self, node: Node, reason: str) -> None:
        row = {"name": node.layer, "reason": reason}
        if row not in self.skipped:
            self.skipped.append(row)

    def _store(self, name: str, found: Matrices, codes: Any, tensors: dict[str, Any], is_nearest: bool) -> None:
        plan, view = self.plan, self.weights[name]
        chosen = dict(plan.codes)
        array = np.asarray(view.array, np.float32)
        if not np.array_equal(codes, found.params.encode(array)):
            chosen[name] = codes.astype(np.int32)
        self.plan = replace(plan, weights={**plan.weights, name: found.params}, codes=chosen, tensors=tensors)
        stored, drawn = self.plan.rounded(name, array), histogram(array)
        row: dict[str, Any] = {"scheme": described(found.params), "error_db": sqnr_db(array, stored)}
        row |= {} if drawn is None else {"histogram": drawn.beside(stored)}
        row |= {} if is_nearest else {"algorithm": type(self.spec.rounding).__name__}
        self.rows[name] = row | ({} if found.damping is None else {"damping": found.damping})


def waves_of(graph: Graph, weights: Collection[str]) -> list[list[Request]]:
    """These weights in the graph's order, those together that see nothing of each other (q, k, v; branches)."""
    upstream = upstream_of(graph)
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in WEIGHTED and node.weight in weights and node.inputs:
            calls.setdefault(str(node.weight), []).append(node)
    waves: list[list[Request]] = []
    held: set[str] = set()
    for weight, nodes in calls.items():
        beside = _beside(graph, nodes[0], upstream, set(calls)) if len(nodes) == 1 else None
        needs = set().union(*(upstream[node.inputs[0]] for node in nodes), upstream[beside] if beside else set())
        if not waves or needs & held or len(waves[-1]) >= TOGETHER:
            waves.append([])
            held = set()
        waves[-1].append(Request(weight, beside))
        held.add(weight)
    return waves


def upstream_of(graph: Graph) -> dict[str, set[str]]:
    """For every value, the weights that it depends on."""
    found: dict[str, set[str]] = {value: set() for value in graph.inputs}
    for node in graph.nodes:
        before = set().union(*(found.get(value, set()) for value in node.inputs))
        for value in node.values:
            found[value] = before | set(node.weights)
    return found


def _beside(graph: Graph, node: Node, upstream: Mapping[str, set[str]], weights: set[str]) -> str | None:
    """The value that is added to the output of `node`, if all its weights come before `node`'s in the graph's order."""
    readers = graph.consumers()
    value = node.name
    while len(readers[value]) == 1 and value not in graph.outputs:
        reader = readers[value][0]
        if reader.op == "identity" and len(reader.inputs) == 1:
            value = reader.name
            continue
        if reader.op != "add" or len(reader.inputs) != 2 or reader.inputs[0] == reader.inputs[1]:
            return None
        other = reader.inputs[1] if reader.inputs[0] == value else reader.inputs[0]
        order = {n.name: i for i, n in enumerate(graph.nodes)}
        later = {n.weight for n in graph.nodes if order[n.name] >= order[node.name]} & weights
        return None if upstream[other] & later else other
    return None


def decibels(signal: float, error: float) -> float | None:
    """Signal over error in dB; None where there is no error, or no signal."""
    return 10 * math.log10(signal / error) if signal > 0 and error > 0 else None
