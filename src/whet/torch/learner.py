"""The hooks of a model in quantization-aware training."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from whet.errors import ModelError
from whet.graph.learning import with_room
from whet.graph.placement import Plan
from whet.numerics.affine import SCALE_FLOOR, QParams, qparams
from whet.numerics.codebook import Codebook
from whet.specs.schemes import Int
from whet.torch.arithmetic import Arithmetic, named
from whet.torch.interception import Call, Session, interceptor_of
from whet.torch.learned import Lattice, RoundThrough, rate_of, scale_of
from whet.torch.namespace import xp
from whet.torch.quantize import ValueQuantizer, bias_codes, simulated

Tensor = Any
MOMENTUM = 0.9  # of observed ranges: the weight of what was seen before


@dataclass(frozen=True, slots=True)
class WeightState:
    """The names of the tensors beside a weight: what its scales began with, their learned factors, their zero points (of codes
    that are not symmetric), and which weights are kept. None for what it does not have; without base it is not rounded."""

    base: str | None
    factor: str | None
    zero_point: str | None
    mask: str | None


@dataclass(frozen=True, slots=True)
class ValueState:
    """The quantizer of a value. name: of its tensors on the model, before `_base`, `_zero_point`, `_factor`, `_low`, `_high`
    and `_seen`; values of one name share it. observe: for so many steps ranges are observed. member: the value's place in
    what is observed; None where its own range does not count."""

    name: str
    spec: Int
    learns: bool
    observe: int
    member: int | None


def safe(name: str) -> str:
    """`name` as a part of a parameter's name."""
    return re.sub(r"[^0-9A-Za-z_]+", "_", name).strip("_")


class Learner(ValueQuantizer):
    """Rounds weights and values so that both, and their scales, train; in evaluation mode as `simulate` does.

    bare: layers that had no bias before a batch norm was folded into them. frozen: names of parameters of folded batch norms
    that trained before. Its state is in the model's own parameters and buffers.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        weights: dict[str, WeightState],
        states: dict[str, ValueState],
        moved: set[str],
        bare: tuple[str, ...],
        frozen: tuple[str, ...],
    ) -> None:
        super().__init__(model, replace(plan, tensors={}, codes={}))
        self.plan = replace(plan, tensors={}, codes={})
        self.params = {name: params for name, params in plan.weights.items() if isinstance(params, QParams)}
        self.weights, self.states, self.moved, self.bare, self.frozen = weights, states, moved, bare, frozen
        self.called: dict[str, int] = {}  # how often each module was, in the last whole pass
        self.held: dict[str, tuple[Tensor, float, bool]] = {}  # of the last training pass, for passes that recompute it

    def detach_(self) -> None:
        """*In place*: take the hooks off the model."""
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "interceptor", None) is self]:
                    del hooks[key]
                    for options in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                        options.pop(key, None)

    def bake_(self) -> None:
        """*In place*: removed weights become zero, and the learner's own tensors leave the model."""
        with torch.no_grad():
            for name, state in self.weights.items():
                if state.mask is not None:
                    weight = self._tensor(name)
                    weight.masked_fill_(~self._tensor(state.mask), 0)
        for name in self.own_names():
            path, _, last = name.rpartition(".")
            module = self.model.get_submodule(path)
            (module._parameters if last in module._parameters else module._buffers).pop(last)
            module._non_persistent_buffers_set.discard(last)

    def own_names(self) -> list[str]:
        """The names of the tensors that are state of the learner, not of the user's model."""
        names = [n for s in self.weights.values() for n in (s.base, s.factor, s.zero_point, s.mask) if n is not None]
        kinds = ("base", "zero_point", "factor", "low", "high", "seen")
        for prefix in dict.fromkeys(state.name for state in self.states.values()):
            names += [f"{prefix}_{kind}" for kind in kinds if hasattr(self.model, f"{prefix}_{kind}")]
        return names

    def factors(self) -> list[str]:
        """The names of the learned scales."""
        return [name for name in self.own_names() if name.endswith("_factor")]

    # ------------------------------------------------------------------ the plan of the moment

    def present(self) -> Plan:
        """The plan with the scales of the moment."""
        fresh = {}
        for state in {state.name: state for state in self.states.values()}.values():
            base, zero_point = self._range(state)
            scale = scale_of(base, self._factor(state)).clamp_min(SCALE_FLOOR)
            arrays = (scale.cpu().numpy().astype(np.float32).reshape(()), np.asarray(round(zero_point), np.int32))
            fresh[state.name] = QParams(*arrays, state.spec)
        values = {value: fresh[state.name] for value, state in self.states.items()}
        weights: dict[str, QParams | Codebook] = {name: self._solved(name) for name in self.params}
        biases = {name: self._tensor(name).detach().float().cpu().numpy() for name in self.plan.biases}
        return with_room(replace(self.plan, weights=weights, values=values), biases)

    def _solved(self, name: str) -> QParams:
        state, params = self.weights[name], self.params[name]
        factor = None if state.factor is None else self._tensor(state.factor)
        scale = scale_of(self._tensor(str(state.base)), factor).clamp_min(SCALE_FLOOR)
        array = scale.cpu().numpy().astype(np.float32).reshape(np.shape(params.scale))
        return replace(params, scale=array)

    def _tensor(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        return getattr(self.model.get_submodule(path), last)

    def _factor(self, state: ValueState) -> Tensor | None:
        """The learned factor of a value's scale, which is 1 while its range is still observed."""
        return getattr(self.model, f"{state.name}_factor") if state.learns else None

    def _observing(self, state: ValueState) -> bool:
        return bool(state.observe) and float(getattr(self.model, f"{state.name}_seen").min()) < state.observe

    def _range(self, state: ValueState) -> tuple[Tensor, float]:
        """What the scale is a factor of, and the zero point: as solved, or of the ranges observed so far."""
        if not state.observe:
            return getattr(self.model, f"{state.name}_base"), float(getattr(self.model, f"{state.name}_zero_point"))
        low, high = getattr(self.model, f"{state.name}_low"), getattr(self.model, f"{state.name}_high")
        scale, zero_point = qparams(low.float().min(), high.float().max(), state.spec, xp=xp)
        return scale, float(zero_point)

    # ------------------------------------------------------------------ a forward pass

    def enter(self, session: Session, args: Any, kwargs: Any) -> Any:
        """Learn in training mode; else compute as the plan of the moment says."""
        if self.model.training:
            self.held, self.kernels.active = {}, False
        else:
            plan = self.present()
            self.values, self.kernels = plan.values, Arithmetic(plan)
        return super().enter(session, args, kwargs)

    def leave(self, session: Session, outputs: Any) -> Any:
        """Keep how often each module was called."""
        self.called = dict(session.calls)
        return super().leave(session, outputs)

    def substitute(self, session: Session, tensor: Tensor) -> Tensor:
        """A weight masked and rounded; in evaluation mode biases rounded too."""
        name = session.parameter(tensor)
        if name is None:
            return tensor
        state = self.weights.get(name)
        if state is not None:
            rounded = self._weight(name, tensor, state)
            return rounded if self.model.training else named(rounded, name)
        if not self.model.training and name in self.plan.biases:
            codes, scale = bias_codes(tensor.detach().float().cpu().numpy(), self.kernels.plan, name)
            value = torch.from_numpy(codes.astype(np.float32) * scale).to(tensor.device, tensor.dtype)
            return named(value + (tensor - tensor.detach()), name)
        return tensor

    def _weight(self, name: str, weight: Tensor, state: WeightState) -> Tensor:
        mask = None if state.mask is None else self._tensor(state.mask)
        if state.base is None:
            return weight if mask is None else weight.masked_fill(~mask, 0)
        params, base = self.params[name], self._tensor(state.base)
        factor = None if state.factor is None else self._tensor(state.factor)
        if not self.model.training:  # scales may have made room for the bias
            base, factor = torch.from_numpy(self.kernels.plan.weights[name].scale.reshape(base.shape)).to(base.device), None
        zero = None if state.zero_point is None else self._tensor(state.zero_point)
        rate = rate_of(weight.numel() // max(base.numel(), 1), params.spec.qmax)
        lattice = Lattice(params.spec.qmin, params.spec.qmax, rate, params.group)
        return RoundThrough.apply(weight.float(), base, factor, zero, mask, lattice).to(weight.dtype)

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """Batch norms that were not folded use their running statistics.

        Raises:
            ModelError: a checkpointed part is recomputed that holds a layer which runs several times.
        """
        if session.stack and session.stack[0].path and _in_backward() and self.called.get(session.path, 1) > 1:
            raise ModelError(
                f"{session.path!r} runs {self.called[session.path]} times in a forward pass and is recomputed by activation "
                "checkpointing, which does not tell which of its calls it repeats. Leave this layer out of the checkpoint."
            )
        if call.function == "batch_norm" and call.argument(5, "training") and call.argument(1, "running_mean") is not None:
            call = call.with_argument(5, "training", False)
        return super().compute(session, call, site)

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        if not self.model.training:
            return super()._rounded(name, tensor)
        state = self.states.get(name)
        if state is None or name in self.moved:
            return tensor
        recomputed = _in_backward()
        if state.name not in self.held:
            self.held[state.name] = (*self._range(state), self._observing(state))
        base, zero_point, observing = self.held[state.name]
        wide = tensor.float()
        if state.observe and not recomputed and state.member is not None:
            self._watch(state, wide.detach())
        low, high = state.spec.qmin - zero_point, state.spec.qmax - zero_point
        rate = 0.0 if observing else rate_of(tensor[:1].numel(), high)
        return RoundThrough.apply(wide, base, self._factor(state), None, None, Lattice(low, high, rate)).to(tensor.dtype)

    def _watch(self, state: ValueState, x: Tensor) -> None:
        """Let the averages of a value follow this batch, unless they are frozen; they count from the next pass on."""
        seen = getattr(self.model, f"{state.name}_seen")
        if not x.numel() or float(seen[state.member]) >= state.observe:
            return
        for kind, now in zip(("low", "high"), torch.aminmax(x), strict=True):
            getattr(self.model, f"{state.name}_{kind}")[state.member].lerp_(now, 1 - MOMENTUM)
        seen[state.member] += 1

    def round(self, tensor: Tensor, params: QParams) -> Tensor:
        """As `simulate`."""
        return simulated(tensor, params)


def _in_backward() -> bool:
    """Whether a backward pass is under way on this thread: a forward pass in it recomputes a checkpointed part."""
    return bool(torch._C._current_graph_task_id() != -1)


def scale_names(model: Any) -> frozenset[str]:
    """The names of the learned scales of `model`; none where it is not prepared."""
    found = interceptor_of(model)
    return frozenset(found.factors() if isinstance(found, Learner) else ())
