"""What stays after a removal, solved anew: least squares towards the outputs that the original has.

The removal is looked at before it happens, in the tensors' old shapes: the original with the weights that read the removed
channels at zero computes what the smaller model will. Layer after layer, the other weights are chosen so that this model's
outputs come as near to the original's as they can; a layer thus takes back what those before it lost, and where its output is
added to another value, what that value lost. A framework side runs both models (`refine.Runner`) and writes the result back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import DataError
from whet.graph.channels import WEIGHTED
from whet.graph.groups import Gone, Groups
from whet.graph.ids import IntArray
from whet.graph.matrices import Layout, layout
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.graph.refine import Runner, decibels, upstream_of, waves_of
from whet.graph.views import WeightView
from whet.numerics.regression import Regression, reconstructed
from whet.numerics.threads import threads_for
from whet.progress import task
from whet.specs import Prune, Quantize, Reconstruct

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """One layer, batch norm folded. weight: in its own layout, zero where inputs leave; rows: which outputs stay, (outputs,).

    bias: (outputs,) or None where it is as it was. mean, variance: of `W x̂`, (outputs,): what a batch norm behind it will see.
    """

    weight: Float32s
    bias: Float32s | None
    rows: npt.NDArray[np.bool_]
    mean: Float64s
    variance: Float64s


@dataclass(frozen=True, slots=True, eq=False)
class Normed:
    """A layer and the batch norm behind it, not folded. All but the weight are (outputs,); bias: None without one."""

    weight: Float64s
    bias: Float64s | None
    mean: Float64s
    variance: Float64s
    scale: Float64s
    shift: Float64s

    def with_solved(self, solved: Solved, view: WeightView, epsilon: float) -> Normed:
        """The same with what was solved: in inference exactly `V x̂ + b`, in training, by the batch's statistics, about that.

        The weights keep their size, so that training goes on as before: with `W = k V`, k = |old W| / |V| for each output, the
        statistics are those of `W x̂`, `γ = sqrt(k² Var[V x̂] + ε) / k` and `β = b + E[V x̂]`.
        """
        shape, out = view.array.shape, view.out_axis % view.array.ndim
        new, others = solved.weight.astype(np.float64).reshape(shape), tuple(d for d in range(len(shape)) if d != out)
        old = np.where(new != 0, self.weight.reshape(shape), 0.0)
        sizes = [np.sqrt(np.sum(np.square(array), axis=others)) for array in (old, new)]
        k = np.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / np.where(sizes[1] > 0, sizes[1], 1.0), 1.0)
        stays, along = solved.rows, [-1 if d == out else 1 for d in range(len(shape))]
        shift = np.zeros_like(self.shift) if solved.bias is None else solved.bias
        return Normed(
            np.where(stays.reshape(along), new * k.reshape(along), old).reshape(self.weight.shape),
            None if self.bias is None else np.where(stays, 0.0, self.bias),
            np.where(stays, k * solved.mean, self.mean),
            np.where(stays, k**2 * solved.variance, self.variance),
            np.where(stays, np.sqrt(k**2 * solved.variance + epsilon) / k, self.scale),
            np.where(stays, shift + solved.mean, self.shift),
        )


@dataclass(slots=True)
class Reconstructed:
    """solved: by weight. rows: for the report, {"name", "silenced_db", "output_db"}. skipped: {"name", "reason"}."""

    solved: dict[str, Solved] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the step's record."""
        return {"layers": self.rows, "skipped": self.skipped}


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """The model with its batch norms folded, as a side's trace shows it.

    closed: weights that must stay as they are -> why. folds: (batch norm, layer).
    """

    graph: Graph
    folds: tuple[tuple[str, str], ...]
    weights: Mapping[str, WeightView]
    biases: Mapping[str, Float32s]
    closed: Mapping[str, str]


def check_reconstruct(spec: Prune, data: Any) -> None:
    """Raise `DataError` where `spec` solves what stays and there is no data to look at."""
    if spec.reconstruct is not None and data is None:
        raise DataError(
            "Reconstruct() looks at what the layers compute, and there is no data: pass train= some hundred examples like "
            "those the model will see; targets are not used."
        )


def solve(folded: Folded, groups: Groups, gone: Gone, spec: Reconstruct, runner: Runner, progress: bool) -> Reconstructed:
    """The weights behind the groups that are `gone`, solved."""
    silent = {name: _zeroed(runner.tensor(name), axes) for name, axes in groups.read(gone).items()}
    plan = Plan(Quantize(activations=None), "", {}, {}, {}, folds=folded.folds, tensors=silent)
    work = _Work(folded, groups, groups.kept(gone), spec.damping, dict(silent))
    wanted = work.wanted()
    with task("Reconstructing", len(wanted), enabled=progress) as bar:
        for wave in waves_of(folded.graph, wanted):
            seen = runner.regressions(plan, wave)
            for request in wave:
                work.layer(request.weight, wanted[request.weight], seen.get(request.weight))
                bar.advance(note=request.weight)
            plan = replace(plan, tensors=dict(work.tensors))
    return work.found


@dataclass(slots=True)
class _Work:
    """The model as it grows: tensors are what takes the place of the folded model's own. kept: positions that remain."""

    folded: Folded
    groups: Groups
    kept: Mapping[str, Mapping[int, IntArray]]
    damping: float
    tensors: dict[str, Float32s]
    found: Reconstructed = field(default_factory=Reconstructed)

    def wanted(self) -> dict[str, Node]:
        """The weights that read what leaves, or what others behind it make, and may be solved; others are listed."""
        graph, silent, wanted = self.folded.graph, self.tensors.keys(), dict[str, Node]()
        upstream = upstream_of(graph)
        for name, nodes in _readers(graph).items():
            if name not in silent and not any(silent & upstream[node.inputs[0]] for node in nodes if node.inputs):
                continue
            reason = _closed(name, nodes, self.folded)
            if reason is None:
                wanted[name] = nodes[0]
            elif len(self.groups.structure.held[name].shape) > 1:  # not the scale of a norm
                self._skip(nodes[0], reason)
        return wanted

    def layer(self, name: str, node: Node, seen: tuple[Regression, ...] | None) -> None:
        """Solve one weight."""
        if seen is None:
            self._skip(node, "its inputs are no rows of a matrix product")
            return
        view, shape = self.folded.weights[name], self.groups.structure.held[name].shape
        where = layout(view, node.op, len(seen))
        if where.transposed and where.groups > 1:
            self._skip(node, "it is a grouped transposed convolution")
            return
        stays = where.matrices(_stays(shape, self.kept.get(name, {})).reshape(view.array.shape))
        own = None if node.bias is None else self.folded.biases.get(node.bias)
        done = _matrices(where, view, stays, own, _is_free(node, own, self.folded.graph), seen, self.damping)
        weight = where.array(np.stack(done.weight)).astype(np.float32).reshape(shape)
        bias = np.concatenate(done.bias).astype(np.float32) if done.bias else None
        self.tensors[name] = weight
        if bias is not None:
            self.tensors[str(node.bias)] = bias
        rows = np.concatenate(done.rows)
        self.found.solved[name] = Solved(weight, bias, rows, np.concatenate(done.mean), np.concatenate(done.variance))
        before, after = decibels(done.signal, done.before), decibels(done.signal, done.after)
        self.found.rows.append({"name": name, "silenced_db": before, "output_db": after})

    def _skip(self, node: Node, reason: str) -> None:
        self.found.skipped.append({"name": node.layer, "reason": reason})


@dataclass(slots=True)
class _Done:
    """The groups of one weight: lists of (rows, columns) and (rows,); sums of squares of the outputs that stay."""

    weight: list[Float64s] = field(default_factory=list)
    bias: list[Float64s] = field(default_factory=list)
    rows: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    mean: list[Float64s] = field(default_factory=list)
    variance: list[Float64s] = field(default_factory=list)
    signal: float = 0.0
    before: float = 0.0
    after: float = 0.0


def _matrices(
    where: Layout,
    view: WeightView,
    left: npt.NDArray[np.bool_],
    own: Float32s | None,
    is_free: bool,
    seen: tuple[Regression, ...],
    damping: float,
) -> _Done:
    """Every group's matrix, solved over what is `left` of it. own: the bias; is_free: whether it may follow."""
    done, bias = _Done(), where.rows(np.zeros(where.outputs) if own is None else own.astype(np.float64))
    old = where.matrices(np.asarray(view.array, np.float64))
    for g, moments in enumerate(seen):
        rows, columns = left[g].any(axis=1), left[g].any(axis=0)
        part, near, fixed = moments.part(rows, columns), old[g][np.ix_(rows, columns)], bias[g][rows]
        with threads_for(int(columns.sum()) ** 3):
            new = reconstructed(part, near, None if is_free else fixed, damping)
            done.before += float(np.sum(part.quadratic(fixed).error(near)))
            done.after += float(np.sum(part.quadratic(None if is_free else fixed).error(new)))
            variance = part.output_variance(new)
        done.signal += float(np.sum(part.target_variance))
        done.weight.append(_placed(new, np.where(columns, old[g], 0.0), np.ix_(rows, columns)))
        done.rows.append(rows)
        done.mean.append(_placed(new @ part.mean, np.zeros(len(rows)), rows))
        done.variance.append(_placed(variance, np.zeros(len(rows)), rows))
        if is_free:
            done.bias.append(_placed(part.free_bias(new), bias[g], rows))
    return done


def _placed(values: Float64s, into: Float64s, at: Any) -> Float64s:
    """A copy of `into` that holds `values` at these places."""
    made = into.copy()
    made[at] = values
    return made


def _readers(graph: Graph) -> dict[str, list[Node]]:
    """The nodes that read each weight."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.weights:
            found.setdefault(name, []).append(node)
    return found


def _closed(name: str, nodes: list[Node], folded: Folded) -> str | None:
    """Why a weight stays as it is; None where it may be solved."""
    others = [node.op for node in nodes if node.op not in WEIGHTED or node.weight != name]
    if others:
        return f"operation {others[0]!r} is no product of rows"
    if name not in folded.weights:
        return "its weight is no parameter"
    return folded.closed.get(name)


def _is_free(node: Node, own: Any, graph: Graph) -> bool:
    """Whether the layer has a bias that no other weight shares."""
    return own is not None and len({other.weight for other in graph.nodes if other.bias == node.bias}) == 1


def _stays(shape: Sequence[int], kept: Mapping[int, IntArray]) -> npt.NDArray[np.bool_]:
    """Which values of a weight stay."""
    stays = np.ones(shape, bool)
    for axis, positions in kept.items():
        mask = np.zeros(shape[axis], bool)
        mask[positions] = True
        stays &= mask.reshape([-1 if d == axis else 1 for d in range(stays.ndim)])
    return stays


def _zeroed(array: Float32s, axes: Mapping[int, IntArray]) -> Float32s:
    """A copy with zeros at these positions."""
    made = array.copy()
    for axis, at in axes.items():
        made[(slice(None),) * axis + (at,)] = 0.0
    return made
