"""The PyTorch runner of post-training algorithms: the float and the quantized model side by side on calibration data."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.data import Batches
from whet.errors import DataError, WhetError
from whet.graph.channels import WEIGHTED
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.graph.refine import Request
from whet.numerics.regression import Regression, checked
from whet.torch.fold import fold_, folded_weights
from whet.torch.interception import Call, Interceptor, Session, tensors_in
from whet.torch.model import call, copy, device_of, dtype_of, to_tensors
from whet.torch.operations import operation
from whet.torch.patches import Geometry, columns_at, geometry, outputs_at, positions
from whet.torch.quantize import Simulator, rounded_copy
from whet.torch.trace import replace_

Tensor = Any
ROWS = 1 << 16  # of one weight, over all calibration data: a sample of the positions where there are more
BLOCK = 8192  # rows that are summed in float32


class EnoughSeenError(WhetError):
    """Ends a forward pass that has nothing left to show."""


@dataclass(slots=True)
class Wanted:
    """What one forward pass must show: the calls of some weights, and some values."""

    calls: Counter[str] = field(default_factory=Counter)
    values: set[str] = field(default_factory=set)
    rows: int = ROWS  # per call
    batch: int = 0
    columns: bool = False
    outputs: bool = False


@dataclass(slots=True)
class _Seen:
    """One call. at: sampled positions; columns: (groups, rows, columns) or None; outputs: (rows, channels) or None."""

    geometry: Geometry
    at: Tensor
    columns: Tensor | None
    outputs: Tensor | None


class Watching(Interceptor):
    """Notes what is `wanted`, and ends the pass when it has all."""

    wanted: Wanted
    seen: dict[str, list[_Seen]]
    shown: dict[str, Tensor]

    def __init__(self, model: Any, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        self.begin(Wanted())

    def begin(self, wanted: Wanted) -> None:
        """Before a forward pass."""
        self.wanted, self.seen, self.shown = wanted, {}, {}

    def enter(self, session: Session, args: Any, kwargs: Any) -> Any:
        """Inputs may be wanted as values."""
        args, kwargs = super().enter(session, args, kwargs)
        for index, tensor in enumerate(t for t in tensors_in((args, kwargs)) if t.is_floating_point()):
            self._value(f"input:{index}", tensor)
        return args, kwargs

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """The call, its input and its output."""
        found = operation(call, lambda t: isinstance(t, torch.Tensor) and session.parameter(t) is not None)
        name = None if found.weight is None else session.parameter(found.weight)
        if name is None or found.op not in WEIGHTED or self.wanted.calls[name] <= len(self.seen.get(name, ())):
            return super().compute(session, call, site)
        x = call.argument(1, "mat1") if call.function == "addmm" else call.argument(0, "input")
        result = super().compute(session, call, site)
        self._note(name, geometry(call, found.op, found.weight), x, result)
        return result

    def after(self, session: Session, call: Call, site: str, result: Any) -> Any:
        """Results may be wanted as values."""
        result = super().after(session, call, site, result)
        if isinstance(result, torch.Tensor):
            self._value(site, result)
        return result

    def _note(self, name: str, shape: Geometry, x: Tensor, result: Tensor) -> None:
        calls = self.seen.setdefault(name, [])
        at = positions(shape, result, self.wanted.rows, zlib.crc32(f"{name}/{self.wanted.batch}/{len(calls)}".encode()))
        columns = columns_at(shape, x, at) if self.wanted.columns else None
        calls.append(_Seen(shape, at, columns, outputs_at(shape, result, at) if self.wanted.outputs else None))
        self._end()

    def _value(self, name: str, tensor: Tensor) -> None:
        if name in self.wanted.values and name not in self.shown:
            self.shown[name] = tensor.detach().clone()
            self._end()

    def _end(self) -> None:
        missing = any(len(self.seen.get(name, ())) < count for name, count in self.wanted.calls.items())
        if not missing and len(self.shown) == len(self.wanted.values):
            raise EnoughSeenError("All that was wanted of this pass has been seen.")


class QuantizedWatching(Watching, Simulator):
    """The same in the model that a plan simulates, without the last bits of its kernels: moments do not hold them."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__(model, plan)
        self.kernels.active = False


class TorchRunner:
    """`graph.refine.Runner` for a torch.nn.Module.

    tensors: what takes the place of the folded model's own weights in the float model too (equalized ones).
    """

    def __init__(
        self,
        model: Any,
        graph: Graph,
        folds: Mapping[str, str],
        calibration: Batches | None,
        tensors: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        self.model, self.calibration, self.folds = model, calibration, dict(folds)
        self.calls = Counter(str(node.weight) for node in graph.nodes if node.op in WEIGHTED)
        self.reference = copy(model).eval()
        fold_(self.reference, self.folds, folded_weights(self.reference, self.folds))
        replace_(self.reference, tensors)
        self.watching = Watching(self.reference, self.folds)

    def regressions(self, plan: Plan | None, requests: Sequence[Request]) -> Mapping[str, tuple[Regression, ...]]:
        """See `Runner`."""
        if self.calibration is None:
            raise DataError("The moments of a model's values need calibration data, got None. Pass calibration=.")
        sums: dict[str, _Sums] = {}
        calls = Counter({request.weight: self.calls[request.weight] for request in requests})
        values = {request.beside for request in requests if request.beside is not None}
        rows = -(-ROWS // max(len(self.calibration), 1))
        with ExitStack() as stack:
            quantized = None if plan is None else rounded_copy(self.model, plan)
            watching = None if plan is None else stack.enter_context(QuantizedWatching(quantized, plan))
            for index, (inputs, _) in enumerate(self.calibration):
                wanted = Wanted(calls, values, rows, index, plan is None, True)
                own = exact = self.forward(self.reference, self.watching, inputs, wanted)
                if watching is not None:
                    own = self.forward(quantized, watching, inputs, Wanted(calls, values, rows, index, True, False))
                for request in requests:
                    _add(sums, request, exact, own)
        return {name: found.regressions() for name, found in sums.items()}

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        found: npt.NDArray[np.float32] = self._named(name).detach().float().cpu().numpy()
        return found

    def affine(self, node: Node) -> tuple[str, ...] | None:
        """See `Runner`."""
        if node.op == "mul(constant)":
            return (node.weight,) if node.weight is not None and self._named(node.weight).ndim == 1 else None
        if node.op not in ("layer_norm", "rms_norm") or node.weight is None or self._named(node.weight).ndim != 1:
            return None
        bias = node.weight.removesuffix("weight") + "bias"
        return (node.weight, bias) if bias in dict(self.reference.named_parameters()) else (node.weight,)

    def normal(self, weight: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """See `Runner`."""
        path = next((norm for norm, layer in self.folds.items() if f"{layer}.weight" == weight), None)
        if path is None:
            return None
        norm = self.model.get_submodule(path)
        ones = torch.ones_like(norm.running_mean)
        shift, factor = ones * 0 if norm.bias is None else norm.bias, ones if norm.weight is None else norm.weight
        plain = folded_weights(self.model, {path: self.folds[path]})[weight]
        new = self._named(weight).detach().float()
        scaled = new.abs().sum() / plain.abs().sum() if plain.ndim < 2 else _row_sizes(new) / _row_sizes(plain)
        pair = (shift.detach() * scaled, factor.detach().abs() * scaled)
        return pair[0].double().cpu().numpy(), pair[1].double().cpu().numpy()

    def _named(self, name: str) -> Tensor:
        owner, _, last = name.rpartition(".")
        return getattr(self.reference.get_submodule(owner), last)

    def forward(self, model: Any, watching: Watching, inputs: Any, wanted: Wanted) -> Watching:
        """One pass of `model` over a batch, as far as is needed to see what is `wanted`."""
        watching.begin(wanted)
        with torch.no_grad():
            try:
                call(model, to_tensors(inputs, device_of(model), dtype_of(model)))
            except EnoughSeenError:
                return watching
        return watching


def _row_sizes(weight: Tensor) -> Tensor:
    return weight.abs().flatten(1).sum(1).clamp_min(1e-30)


@dataclass(slots=True)
class _Sums:
    """Sums over rows, (groups, …), in float64 but for the greatest."""

    second: Tensor
    mean: Tensor
    absmax: Tensor
    cross: Tensor
    target: Tensor
    target_second: Tensor
    count: int

    def add(self, other: _Sums) -> None:
        """Further rows."""
        for name in ("second", "mean", "cross", "target", "target_second"):
            getattr(self, name).add_(getattr(other, name))
        torch.maximum(self.absmax, other.absmax, out=self.absmax)
        self.count += other.count

    def regressions(self) -> tuple[Regression, ...]:
        """One for each group."""
        means = [t / self.count for t in (self.second, self.mean, self.cross, self.target, self.target_second)]
        second, mean, cross, target, squares = (t.cpu().numpy() for t in means)
        absmax = self.absmax.double().cpu().numpy()
        groups = range(len(second))
        parts = ((second[g], mean[g], absmax[g], cross[g], target[g], squares[g]) for g in groups)
        return tuple(checked(Regression(*part, count=self.count)) for part in parts)


def _add(sums: dict[str, _Sums], request: Request, exact: Watching, own: Watching) -> None:
    """The rows of one batch: columns of `own`, outputs of `exact`, with what the value beside has lost."""
    for reference, seen in zip(exact.seen.get(request.weight, ()), own.seen.get(request.weight, ()), strict=False):
        if reference.outputs is None or seen.columns is None:
            continue
        targets = reference.outputs
        if request.beside is not None:
            lost = exact.shown[request.beside] - own.shown[request.beside]
            targets = targets + outputs_at(seen.geometry, lost, seen.at)
        groups, rows, _ = seen.columns.shape
        split = targets.reshape(rows, groups, -1).transpose(0, 1)
        for start in range(0, rows, BLOCK):
            x, t = seen.columns[:, start : start + BLOCK], split[:, start : start + BLOCK]
            block = _Sums(
                (x.transpose(1, 2) @ x).double(),
                x.sum(1, dtype=torch.float64),
                x.abs().amax(1),
                (t.transpose(1, 2) @ x).double(),
                t.sum(1, dtype=torch.float64),
                t.double().square().sum(1),
                x.shape[1],
            )
            if request.weight in sums:
                sums[request.weight].add(block)
            else:
                sums[request.weight] = block
