"""The simulation of what a target computes, and what a plan says about the tensors of a PyTorch model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.errors import ModelError
from whet.graph.placement import Plan
from whet.numerics.affine import QParams, dynamic_rounded, fake_quantize, quantize_bias
from whet.torch.arithmetic import Arithmetic
from whet.torch.fold import fold_, folded_weights
from whet.torch.interception import Call, Interceptor, Session, map_tensors, tensors_in
from whet.torch.model import copy
from whet.torch.namespace import xp

Tensor = Any
Codes = npt.NDArray[np.int32]


def simulate(model: Any, plan: Plan) -> Any:
    """A copy of `model`, in inference mode, that computes in float what the target's integers will.

    Batch norms are folded as planned, weights and int32 biases hold their rounded values, and every value in the plan is
    rounded where it is produced.
    """
    work = rounded_copy(model, plan)
    Simulator(work, plan)
    return work


def rounded_copy(model: Any, plan: Plan) -> Any:
    """A copy of `model`, in inference mode, whose weights and biases hold what is left of them: `simulate` without values."""
    work = copy(model).eval()
    exact = float_weights(work, plan)
    fold_(work, dict(plan.folds), exact)
    tensors = plan_tensors(work, plan)
    with torch.no_grad():
        replace_(tensors, plan)
        for name in plan.weights:
            tensors[name].copy_(torch.from_numpy(plan.rounded(name, exact_array(exact, tensors, name))))
        for name in plan.biases:
            codes, scale = bias_codes(exact_array(exact, tensors, name), plan, name)
            tensors[name].copy_(torch.from_numpy(codes.astype(np.float32) * scale))
        for name, dtype in plan.casts.items():
            tensors[name].copy_(tensors[name].to(getattr(torch, dtype)))
    return work


class ValueInterceptor(Interceptor, ABC):
    """Meets the values of a plan where they are produced; subclasses say what becomes of them."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__(model, dict(plan.folds))
        self.values, self.dynamic = plan.values, plan.dynamic
        self.kernels = Arithmetic(plan)

    @abstractmethod
    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        """What takes the place of `tensor`, which is the value `name`."""

    def enter(self, session: Session, args: Any, kwargs: Any) -> Any:
        """Round the model's own inputs."""
        index = -1

        def change(tensor: Tensor) -> Tensor:
            nonlocal index
            if not tensor.is_floating_point():
                return tensor
            index += 1
            return self._rounded(f"input:{index}", tensor)

        return map_tensors(args, change), map_tensors(kwargs, change)

    def after(self, session: Session, call: Call, site: str, result: Any) -> Any:
        """Round what the call produced."""
        if site not in self.values and f"{site}#0" not in self.values:
            return result
        target = call.target
        if target is not None:
            return self._rounded(site, target)
        several = sum(tensor.is_floating_point() for tensor in tensors_in(result)) > 1
        index = -1

        def change(tensor: Tensor) -> Tensor:
            nonlocal index
            if not tensor.is_floating_point():
                return tensor
            index += 1
            return self._rounded(f"{site}#{index}" if several else site, tensor)

        return map_tensors(result, change)

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """Run the call, on what it reads rounded at run time where the plan says so."""
        if site in self.dynamic:
            place = "mat1" if call.function == "addmm" else "input"
            index = 1 if call.function == "addmm" else 0
            rounded = dynamic_rounded(call.argument(index, place).float(), self.dynamic[str(site)].bits, xp=xp)
            return call.with_argument(index, place, rounded.to(call.argument(index, place).dtype))()
        note = self.kernels.before(session, call)
        return self.kernels.after(call, call(), note)


class ValueQuantizer(ValueInterceptor):
    """Rounds the values of a plan where they are produced; subclasses say how."""

    @abstractmethod
    def round(self, tensor: Tensor, params: QParams) -> Tensor:
        """`tensor` rounded to the lattice of `params`."""

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        params = self.values.get(name)
        if params is None:
            return tensor
        return self.kernels.rounded(self.round(self.kernels.exact(tensor, params), params), params)


class Simulator(ValueQuantizer):
    """Rounds in float arithmetic, with straight-through gradients."""

    def round(self, tensor: Tensor, params: QParams) -> Tensor:
        """`fake_quantize` in float32, returned in the tensor's own dtype."""
        return simulated(tensor, params)


def simulated(tensor: Tensor, params: QParams) -> Tensor:
    """`fake_quantize` in float32, returned in the tensor's own dtype."""
    scale, zero_point = float(params.scale), float(params.zero_point)
    return fake_quantize(tensor.float(), scale, zero_point, params.spec, xp=xp).to(tensor.dtype)


def float_weights(model: Any, plan: Plan) -> dict[str, Tensor]:
    """The float32 weights and biases of the layers that a batch norm of `plan` is folded into, and what the plan replaces.

    Raises:
        ModelError: the model lacks a layer of the plan.
    """
    try:
        folded = folded_weights(model, dict(plan.folds))
    except AttributeError as cause:
        raise ModelError(f"This plan was made for another model: {cause}.") from cause
    return folded | {name: torch.from_numpy(array) for name, array in plan.tensors.items()}


def replace_(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """*In place*: the values that the plan puts in the place of the folded model's own."""
    with torch.no_grad():
        for name, array in plan.tensors.items():
            tensors[name].copy_(torch.from_numpy(array))


def plan_tensors(model: Any, plan: Plan) -> dict[str, Tensor]:
    """The parameters and buffers of `model` by name, checked to hold every weight of `plan`."""
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    missing = [name for name in (*plan.weights, *plan.biases, *plan.casts, *plan.tensors) if name not in tensors]
    if missing:
        raise ModelError(f"This plan was made for another model: there is no {missing[0]!r} in this {type(model).__name__}.")
    return tensors


def exact_array(exact: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> npt.NDArray[np.float32]:
    """A weight or bias as a float32 array: folded if it is, else the model's own."""
    array: npt.NDArray[np.float32] = exact.get(name, tensors[name]).detach().float().cpu().numpy()
    return array


def bias_codes(bias: npt.NDArray[np.float32], plan: Plan, name: str) -> tuple[Codes, npt.NDArray[np.float32]]:
    """The int32 codes of a bias, and their scale: of its input times that of its weight."""
    value, weight = plan.biases[name]
    scale = np.asarray(plan.values[value].scale * plan.weights[weight].scale, np.float32)
    return quantize_bias(bias, plan.values[value].scale, plan.weights[weight].scale), scale
