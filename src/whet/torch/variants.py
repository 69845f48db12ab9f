"""One copy of a PyTorch model that computes any part of a plan, one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.graph.placement import Plan
from whet.torch.arithmetic import Arithmetic
from whet.torch.fold import fold_, folded_weights
from whet.torch.model import copy, predict
from whet.torch.quantize import Simulator, bias_codes, exact_array, plan_tensors
from whet.torch.trace import trace

Floats = npt.NDArray[np.float32]


def variants(model: Any, plan: Plan, example: Any) -> TorchVariants:
    """`model` with its batch norms folded as `plan` says, ready to compute any part of it; `model` is untouched."""
    return TorchVariants(model, plan, example)


class TorchVariants:
    """See `whet.graph.variants.Variants`."""

    def __init__(self, model: Any, plan: Plan, example: Any) -> None:
        self.graph = trace(model, example, None, progress=False).calibration.graph
        self._work = copy(model).eval()
        folded = folded_weights(self._work, dict(plan.folds))
        fold_(self._work, dict(plan.folds), folded)
        self._tensors = plan_tensors(self._work, plan)
        names = dict.fromkeys((*plan.weights, *plan.biases, *plan.casts, *plan.tensors))
        self._float = {name: exact_array(folded, self._tensors, name).copy() for name in names}
        self._simulator = Simulator(self._work, plan)
        self._state: dict[str, object] = {}
        self.use(plan)

    def use(self, plan: Plan) -> None:
        """Compute as `plan` says from now on: a part of the one that this was made for."""
        with torch.no_grad():
            for name, own in self._float.items():
                state = (name in plan.weights, name in plan.casts, plan.biases.get(name), name in plan.tensors)
                if self._state.get(name) != state:
                    self._state[name] = state
                    self._tensors[name].copy_(torch.from_numpy(_stored(plan, name, plan.tensors.get(name, own))))
        self._simulator.values, self._simulator.dynamic = plan.values, plan.dynamic
        self._simulator.kernels = Arithmetic(plan)

    def predict(self, inputs: Any) -> Any:
        """Outputs as NumPy arrays in the model's own structure."""
        return predict(self._work, inputs)


def _stored(plan: Plan, name: str, array: Floats) -> Floats:
    """What is left of a weight or bias."""
    if name in plan.weights:
        return plan.rounded(name, array)
    if name in plan.biases:
        codes, scale = bias_codes(array, plan, name)
        return np.asarray(codes * scale, np.float32)
    if name in plan.casts:
        return np.asarray(torch.from_numpy(array).to(getattr(torch, plan.casts[name])).float().numpy())
    return array
