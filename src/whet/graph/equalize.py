"""Factors that move difficulty from where it is hard to quantize to where it is easy, leaving the float model's function.

A factor divides the channels of a value and multiplies the weights that read it. It needs a place where the value is made: the
rows of a layer before, seen through activations that scale with their input, or the parameters of a norm. What has no such
place is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError
from whet.graph.channels import (
    HOMOGENEOUS,
    WEIGHTED,
    alone,
    along_outputs,
    has_own_outputs,
    input_absmax,
    input_owner,
    output_absmax,
    source,
)
from whet.graph.nodes import Graph, Node
from whet.graph.placement import place
from whet.graph.refine import TOGETHER, Request, Runner
from whet.graph.solve import Solved, weight_scheme
from whet.graph.views import WeightView
from whet.graph.weights import solve_weight
from whet.numerics.activation_aware import activation_aware
from whet.numerics.equalization import cross_layer_factors, smooth_factors
from whet.numerics.regression import Regression
from whet.numerics.threads import threads_for
from whet.specs.quantization import AWQ, CrossLayer, Quantize, SmoothQuant
from whet.specs.schemes import Float
from whet.specs.target import Target

Float64s = npt.NDArray[np.float64]
LEAST_AGREEMENT = 1e-2  # of the largest output: float32 sums of equalized weights come in another order of size
SWEEPS, SETTLED = 40, 1e-3  # over all pairs, until no factor is further than that from 1


Rounding = Callable[[str, npt.NDArray[np.float32]], npt.NDArray[np.float32]]  # (weight's name, values) -> what is left


@dataclass(slots=True)
class Equalized:
    """tensors: parameter name -> its new values. rows: what the report's rows of weights get. skipped: (layer, reason).

    folds: the pairs that were folded before, where a side keeps them.
    """

    tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    folds: tuple[tuple[str, str], ...] | None = None

    def noted(self, solved: Solved) -> Solved:
        """`solved`, made of the equalized model, with the tensors in its plan and what was done in its rows."""
        changed = tuple({**row, **self.rows.get(row["name"], {})} for row in solved.changed)
        skipped = tuple({"name": layer, "reason": reason} for layer, reason in dict.fromkeys(self.skipped))
        plan = replace(solved.plan, tensors={**self.tensors, **solved.plan.tensors})
        return replace(solved, plan=plan, changed=changed, skipped=(*solved.skipped, *skipped))


def check_same_function(before: Any, after: Any, name: str) -> None:
    """Raise `ModelError` where the outputs of the equalized float model are not those of the model it was made of."""
    pairs = list(zip(_arrays(before), _arrays(after), strict=True))
    apart = max((float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs), default=0.0)
    size = max((float(np.max(np.abs(a), initial=0.0)) for a, _ in pairs), default=0.0)
    if not apart <= LEAST_AGREEMENT * max(size, 1e-30):
        raise ModelError(
            f"{name} would change what this model computes (outputs differ by {apart:.3g}, of at most {size:.3g}): "
            "between two layers it does something that Whet does not see. Leave equalize= out, or keep the layers behind it."
        )


def _arrays(outputs: Any) -> list[npt.NDArray[np.float64]]:
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list):
        return [array for item in outputs for array in _arrays(item)]
    return [np.asarray(outputs, np.float64)]


def equalize(
    graph: Graph,
    weights: Mapping[str, WeightView],
    biases: Mapping[str, npt.NDArray[np.float32]],
    spec: Quantize,
    target: Target,
    runner: Runner,
) -> Equalized:
    """The tensors that `spec.equalize` gives a folded float model, for the weights that `target` quantizes."""
    placed = place(graph, target, spec).weights
    if spec.equalize is None:
        return Equalized()
    if isinstance(spec.equalize, CrossLayer):
        return cross_layer(graph, weights, biases, list(placed))

    def rounding(name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scheme = weight_scheme(spec, placed[name], target)
        if isinstance(scheme, Float) and scheme.bits == 16:
            return array
        params = solve_weight(replace(weights[name], array=array), scheme, spec.weight_observer)
        return params.decode(params.encode(array))

    wanted = [Request(name) for name in input_requests(graph, list(placed))]
    seen: dict[str, tuple[Regression, ...]] = {}
    for start in range(0, len(wanted), TOGETHER):
        seen |= runner.regressions(None, wanted[start : start + TOGETHER])
    return scale_inputs(graph, weights, biases, list(placed), spec.equalize, seen, runner, rounding)


def cross_layer(
    graph: Graph, weights: Mapping[str, WeightView], biases: Mapping[str, npt.NDArray[np.float32]], chosen: Sequence[str]
) -> Equalized:
    """Equal ranges on both sides of every pair of layers (Nagel et al. 2019, arXiv:1906.04721, §4.1), over and over.

    chosen: the weights that will be quantized, the second layers of pairs.
    """
    found = Equalized()
    exact = {name: np.asarray(view.array, np.float64) for name, view in weights.items()}
    shifts = {name: np.asarray(bias, np.float64) for name, bias in biases.items()}
    pairs = []
    for second in _readers_of(graph, chosen):
        pair = _pair(graph, second, weights, biases)
        if isinstance(pair, str):
            found.skipped.append((second.layer, f"not equalized: {pair}"))
        else:
            pairs.append((pair, second))
    owners = {s.name: input_owner(weights[str(s.weight)], _outputs(weights, f)) for f, s in pairs}
    for _ in range(SWEEPS):
        farthest = 0.0
        for first, second in pairs:
            a, b, owner = str(first.weight), str(second.weight), owners[second.name]
            if owner is None:
                continue
            factors = cross_layer_factors(
                output_absmax(weights[a], exact[a]), input_absmax(exact[b], owner, _outputs(weights, first))
            )
            exact[a] = exact[a] / along_outputs(weights[a], factors)
            exact[b] = exact[b] * factors[owner]
            if first.bias is not None:
                shifts[first.bias] = shifts[first.bias] / factors
            farthest = max(farthest, float(np.max(np.abs(np.log(factors)), initial=0.0)))
        if farthest < SETTLED:
            break
    for first, second in pairs:
        for node in (first, second):
            found.tensors[str(node.weight)] = exact[str(node.weight)].astype(np.float32)
            found.rows[str(node.weight)] = {"equalized": "CrossLayer"}
        if first.bias is not None:
            found.tensors[first.bias] = shifts[first.bias].astype(np.float32)
    return found


def scale_inputs(
    graph: Graph,
    weights: Mapping[str, WeightView],
    biases: Mapping[str, npt.NDArray[np.float32]],
    chosen: Sequence[str],
    spec: SmoothQuant | AWQ,
    seen: Mapping[str, tuple[Regression, ...]],
    runner: Runner,
    rounding: Rounding,
) -> Equalized:
    """SmoothQuant's or AWQ's factors for linear layers; those that read one value share them.

    seen: the moments of the float model's inputs. rounding: how AWQ's search rounds.
    """
    found = Equalized()
    readers = graph.consumers()
    for value, nodes in _shared_inputs(graph, chosen).items():
        names = list(dict.fromkeys(str(node.weight) for node in nodes))
        moments = seen.get(names[0])
        place = _place(graph, value, nodes, weights, biases, runner, readers)
        if moments is None or len(moments) != 1:
            place = "its inputs are no rows of one matrix product"
        elif not isinstance(place, str) and place.channels != moments[0].mean.size:
            place = "its inputs are not the channels of the layer before"
        if isinstance(place, str) or moments is None:
            found.skipped += [(node.layer, f"not equalized: {place}") for node in nodes]
            continue
        arrays = {name: found.tensors.get(name, np.asarray(weights[name].array, np.float32)) for name in names}
        factors, note = _factors(spec, moments[0], arrays, weights, rounding)
        for name, array in arrays.items():
            owner = input_owner(weights[name], factors.size)
            found.tensors[name] = (array * (factors if owner is None else factors[owner])).astype(np.float32)
            found.rows[name] = {"equalized": type(spec).__name__} | note
        for name, kind in place.parameters:
            old = found.tensors.get(name, runner.tensor(name)).astype(np.float64)
            spread = along_outputs(weights[name], factors) if kind == "weight" else factors
            found.tensors[name] = (old / spread).astype(np.float32)
    return found


def input_requests(graph: Graph, chosen: Sequence[str]) -> list[str]:
    """One weight for every value that `scale_inputs` needs the moments of."""
    return [str(nodes[0].weight) for nodes in _shared_inputs(graph, chosen).values()]


def _shared_inputs(graph: Graph, chosen: Sequence[str]) -> dict[str, list[Node]]:
    """Values that linear layers read -> these layers."""
    wanted = set(chosen)
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear" and node.weight in wanted:
            found.setdefault(node.inputs[0], []).append(node)
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """Parameters that are divided by the factors: ("weight" by rows, or "vector")."""

    parameters: tuple[tuple[str, str], ...]
    channels: int


def _place(
    graph: Graph,
    value: str,
    nodes: list[Node],
    weights: Mapping[str, WeightView],
    biases: Mapping[str, npt.NDArray[np.float32]],
    runner: Runner,
    readers: Mapping[str, list[Node]],
) -> _Place | str:
    """Where `value` can be divided by channel, or why nowhere."""
    others = [reader.op for reader in readers[value] if reader not in nodes]
    if others or value in graph.outputs:
        return f"{', '.join(sorted(set(others))) or 'the caller'} reads its input too"
    lonely = alone(graph)
    if any(node.name not in lonely for node in nodes):
        return "its weight or bias is shared"
    norm = source(graph, value, frozenset({"identity"}), readers)
    names = None if norm is None else runner.affine(norm)
    if norm is not None and names is not None:
        if sum(names[0] in node.weights for node in graph.nodes) > 1:
            return "the norm before it is shared"
        return _Place(tuple((name, "vector") for name in names), runner.tensor(names[0]).size)
    before = source(graph, value, HOMOGENEOUS, readers)
    if before is None or before.op not in WEIGHTED or before.weight not in weights:
        return f"{'the input' if before is None else before.op} lies before it, which takes no factor"
    if before.name not in lonely or not aligned(graph, before, nodes[0]):
        return "the layer before it is shared, or a reshape between them may mix channels and positions"
    bias = None if before.bias is None else biases.get(before.bias)
    if not has_own_outputs(before, weights[str(before.weight)], bias):
        return "a grouped transposed convolution lies before it"
    parameters = ((str(before.weight), "weight"), *(((before.bias, "vector"),) if before.bias is not None else ()))
    return _Place(parameters, _outputs(weights, before))


def _factors(
    spec: SmoothQuant | AWQ,
    seen: Regression,
    arrays: Mapping[str, npt.NDArray[np.float32]],
    weights: Mapping[str, WeightView],
    rounding: Rounding,
) -> tuple[Float64s, dict[str, Any]]:
    """The factors of one value, and what the report says of them."""
    matrices = {name: np.moveaxis(array, weights[name].out_axis, 0) for name, array in arrays.items()}
    stacked = np.concatenate([matrix.reshape(matrix.shape[0], -1) for matrix in matrices.values()]).astype(np.float64)
    if isinstance(spec, SmoothQuant):
        return smooth_factors(seen.absmax, np.max(np.abs(stacked), axis=0), spec.alpha), {"alpha": spec.alpha}
    ends = np.cumsum([matrix.shape[0] for matrix in matrices.values()])

    def quantized(scaled: Float64s) -> Float64s:
        parts = []
        for name, rows in zip(matrices, np.split(scaled, ends[:-1]), strict=True):
            own = np.moveaxis(rows.reshape(matrices[name].shape), 0, weights[name].out_axis)
            left = rounding(name, np.ascontiguousarray(own, np.float32))
            parts.append(np.moveaxis(left, weights[name].out_axis, 0).reshape(rows.shape))
        return np.concatenate(parts).astype(np.float64)

    magnitude = np.sqrt(np.einsum("ii->i", seen.second))
    with threads_for(stacked.shape[0] * stacked.shape[1] ** 2):
        best = activation_aware(stacked, seen.second, magnitude, quantized, grid=spec.points)
    return best.factors, {"alpha": best.exponent}


def _readers_of(graph: Graph, chosen: Sequence[str]) -> list[Node]:
    wanted = set(chosen)
    return [node for node in graph.nodes if node.op in WEIGHTED and node.weight in wanted and node.inputs]


def _pair(
    graph: Graph, second: Node, weights: Mapping[str, WeightView], biases: Mapping[str, npt.NDArray[np.float32]]
) -> Node | str:
    """The layer before `second` that it can be equalized with, or why there is none."""
    readers, lonely, value = graph.consumers(), alone(graph), second.inputs[0]
    if len(readers[value]) != 1 or value in graph.outputs:
        return "its input is read by others too"
    first = source(graph, value, HOMOGENEOUS, readers)
    if first is None or first.op not in WEIGHTED or first.weight not in weights:
        return f"{'the input' if first is None else first.op} lies before it, which takes no factor"
    if first.name not in lonely or second.name not in lonely:
        return "a weight or bias is shared"
    view = weights[str(first.weight)]
    if not has_own_outputs(first, view, None if first.bias is None else biases.get(first.bias)):
        return "a grouped transposed convolution lies before it"
    if input_owner(weights[str(second.weight)], _outputs(weights, first)) is None:
        return "its inputs are not the channels of the layer before"
    if not aligned(graph, first, second):
        return "a reshape between them may mix channels and positions"
    return first


def aligned(graph: Graph, first: Node, second: Node) -> bool:
    """Whether the outputs of `first` are the inputs of `second`, channel by channel, as far as the operations show.

    Convolutions reach a linear layer through a flattening (of one position, where the sizes are equal) or a global pool; what
    else reshapes may bring another axis of the same size to the channels' place.
    """
    producer = {made: node for node in graph.nodes for made in node.values}
    passed, node = set(), producer[second.inputs[0]]
    while node is not first:
        passed.add(node.op)
        node = producer[node.inputs[0]]
    if (first.op == "linear") == (second.op == "linear"):
        return not passed & {"flatten", "reshape"}
    return second.op == "linear" and bool(passed & {"flatten", "reshape", "global_avg_pool"})


def _outputs(weights: Mapping[str, WeightView], node: Node) -> int:
    view = weights[str(node.weight)]
    return int(view.array.shape[view.out_axis])
