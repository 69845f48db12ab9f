"""The inputs that the weights of a PyTorch model multiply, seen on data."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from typing import Any

import numpy.typing as npt
import torch

from whet.data import Batches
from whet.graph.channels import WEIGHTED
from whet.graph.inputs import ROWS, InputSums, sums_of
from whet.graph.matrices import layout
from whet.graph.views import WeightView
from whet.torch.interception import Call, Interceptor, Session
from whet.torch.model import call as call_model
from whet.torch.model import copy, device_of, dtype_of, evaluating, to_tensors
from whet.torch.operations import operation
from whet.torch.patches import columns_at, geometry, positions
from whet.torch.views import weight_views


class InputReader:
    """Runs a copy of a model on the first `batches` of some data and sums up what its weights read."""

    def __init__(self, model: Any, data: Batches, batches: int) -> None:
        """Raises DataError if the data holds no batch."""
        self.views = {view.name: view for view in weight_views(model).weights}
        self._given, self._model = model, copy(model)
        self._watch = _Watch(self._model, self.views)
        self._batches = [inputs for inputs, _ in data.some(batches, 0)]

    def sums(self, names: Collection[str], with_products: bool) -> dict[str, InputSums]:
        """By weight name what it reads; weights that are not seen in a convolution or linear call are missing."""
        self._watch.begin(names, with_products, math.ceil(ROWS / len(self._batches)))
        with evaluating(self._model), torch.no_grad():
            for inputs in self._batches:
                call_model(self._model, to_tensors(inputs, device_of(self._model), dtype_of(self._model)))
        return self._watch.sums

    def assign(self, name: str, value: npt.NDArray[Any]) -> None:
        """*In place*: another value of a weight of the model and its copy."""
        with torch.no_grad():
            for model in (self._given, self._model):
                model.get_parameter(name).copy_(torch.from_numpy(value))


class _Watch(Interceptor):
    """Sums up the inputs of the wanted weights."""

    def __init__(self, model: Any, views: dict[str, WeightView]) -> None:
        super().__init__(model)
        self._views = views
        self.begin((), False, 0)

    def begin(self, names: Collection[str], with_products: bool, rows: int) -> None:
        """Forget what was seen. rows: of one call at most."""
        self._names, self._with_products, self._rows = names, with_products, rows
        self.sums: dict[str, InputSums] = {}
        self._calls = 0

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """The call, and its input."""
        found = operation(call, lambda t: isinstance(t, torch.Tensor) and session.parameter(t) is not None)
        name = None if found.weight is None else session.parameter(found.weight)
        result = super().compute(session, call, site)
        if name is not None and name in self._names and found.op in WEIGHTED:
            self._add(name, found.op, found.weight, call, result)
        return result

    def _add(self, name: str, op: str, weight: Any, call: Call, result: Any) -> None:
        x = call.argument(1, "mat1") if call.function == "addmm" else call.argument(0, "input")
        shape = geometry(call, op, weight)
        self._calls += 1
        at = positions(shape, result, self._rows, zlib.crc32(f"{name}/{self._calls}".encode()))
        view = self._views[name]
        columns = columns_at(shape, x.detach(), at).cpu().numpy()
        more = sums_of(columns, tuple(view.array.shape), layout(view, op, shape.groups), self._with_products)
        self.sums[name] = self.sums[name].add(more) if name in self.sums else more
