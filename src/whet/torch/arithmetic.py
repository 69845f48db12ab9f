"""The arithmetic of a target's integer kernels in a simulated forward pass, so that its values are theirs to the last bit.

Tensors bear notes on their way to the quantizer behind them: what makes them up in integers, and what clips them. A note is
made by the call that computes, passed on by activations, and used up where the value is rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.numerics.integers import fixed_point_sum, requantization_factor, requantize, round_away, sum_multipliers
from whet.specs import TARGETS
from whet.torch.interception import Call, Session
from whet.torch.namespace import xp
from whet.torch.operations import clamp_bounds, operation

Tensor = Any
_NOTE, _NAME = "_whet_note", "_whet_name"  # attributes of tensors
_BITS = 8  # of activations whose sums are exact in float32


@dataclass(frozen=True, slots=True, eq=False)
class Accumulator:
    """A whole number of `step`s: () or (channels,), along `axis`."""

    step: np.ndarray[Any, Any]
    axis: int


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """The sum of two quantized values, of which these are the codes and scales, clipped to low..high."""

    left: Tensor
    right: Tensor
    left_scale: float
    right_scale: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Average:
    """An average pool of values of this quantizer."""

    params: QParams


def named(tensor: Tensor, name: str) -> Tensor:
    """`tensor`, which stands for the parameter `name`."""
    setattr(tensor, _NAME, name)
    return tensor


class Arithmetic:
    """The rules of the target that `plan` was made for."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.target = plan, TARGETS.get(plan.target)
        rules = self.target
        self.active = rules is not None and (rules.requantizes or rules.sum_bits is not None) and bool(plan.values)

    def before(self, session: Session, call: Call) -> Any:
        """The note for what `call`, which has not run, is going to compute; None for no note."""
        if not self.active or self.target is None or torch.compiler.is_exporting():
            return None
        found = operation(call, lambda tensor: _name(session, tensor) is not None)
        notes = [getattr(tensor, _NOTE, None) for tensor in call.tensors() if tensor.is_floating_point()]
        sources = [note for note in notes if isinstance(note, QParams)]
        if found.op == "add" and len(sources) == len(notes) == 2 and self.target.sum_bits is not None:
            left, right = (call.args[k] for k in (0, 1))
            first, second = (torch.round(t.detach() / float(p.scale)) for t, p in zip((left, right), sources, strict=True))
            small = max(params.spec.bits for params in sources) <= _BITS
            return Sum(first, second, float(sources[0].scale), float(sources[1].scale)) if small else None
        if found.op == "mul" and len(sources) == len(notes) == 2 and self.target.requantizes:
            return Accumulator(np.asarray(sources[0].scale * sources[1].scale, np.float32), 0)
        if found.weight is not None and len(sources) == 1 and self.target.requantizes:
            return self._accumulator(session, found, sources[0])
        if found.op == "avg_pool" and "avg_pool" in self.target.shared and len(sources) == 1:
            return Average(sources[0])
        return _passed_on(call, found.op, notes)

    def _accumulator(self, session: Session, found: Any, source: QParams) -> Accumulator | None:
        name, bias = _name(session, found.weight), None if found.bias is None else _name(session, found.bias)
        weight = self.plan.weights.get(name or "")
        if not isinstance(weight, QParams) or weight.group is not None or not weight.spec.symmetric:
            return None
        if found.bias is not None and bias not in self.plan.biases:
            return None
        return Accumulator(np.asarray(source.scale * weight.scale, np.float32), -1 if found.op == "linear" else 1)

    def after(self, call: Call, result: Any, note: Any) -> Any:
        """The result of `call`, with its note."""
        if not self.active or not isinstance(result, torch.Tensor):
            return result
        if note is not None and result.dtype == torch.float32:
            setattr(result, _NOTE, note)
        elif call.target is not None and hasattr(call.target, _NOTE):
            delattr(call.target, _NOTE)
        return result

    def exact(self, tensor: Tensor, params: QParams) -> Tensor:
        """`tensor` as the kernels have it, before its quantizer `params`; gradients pass through."""
        note = getattr(tensor, _NOTE, None)
        codes = None if note is None or isinstance(note, QParams) else self._codes(tensor.detach(), note, params)
        if codes is None:
            return tensor
        value = codes * float(params.scale)
        if isinstance(note, Sum):
            value = torch.clamp(value, note.low, note.high)
        return tensor + (value - tensor.detach())

    def _codes(self, tensor: Tensor, note: Any, params: QParams) -> Tensor | None:
        """Codes before the zero point is added; None where kernels have no rule."""
        if isinstance(note, Average):
            if note.params.scale != params.scale or note.params.zero_point != params.zero_point:
                return None
            return round_away(tensor, params, xp=xp)
        if isinstance(note, Sum):
            bits = self.target.sum_bits if self.target is not None else None
            numbers = None if bits is None else sum_multipliers(note.left_scale, note.right_scale, float(params.scale), bits)
            return None if numbers is None else fixed_point_sum(note.left, note.right, numbers, xp=xp)
        factor = requantization_factor(note.step, params.scale)
        if factor is None or (note.step.ndim and note.step.size != tensor.shape[note.axis]):
            return None
        shape = [1] * tensor.ndim
        if note.step.ndim:
            shape[note.axis] = -1
        step, factor = (torch.from_numpy(a.reshape(shape)).to(tensor.device) for a in (note.step, factor))
        return requantize(tensor, step, factor, xp=xp)

    def rounded(self, tensor: Tensor, params: QParams) -> Tensor:
        """`tensor`, which holds codes of `params` times their scale from now on."""
        if self.active and tensor.dtype == torch.float32:
            setattr(tensor, _NOTE, params)
        return tensor


def _name(session: Session, tensor: Any) -> str | None:
    """The parameter that `tensor` is or stands for."""
    found: str | None = session.parameter(tensor) or getattr(tensor, _NAME, None)
    return found


def _passed_on(call: Call, op: str, notes: list[Any]) -> Any:
    """The note of the one operand, behind an activation that clips or a call that changes nothing."""
    if len(notes) != 1 or not isinstance(notes[0], Accumulator | Sum):
        return None
    bounds = clamp_bounds(call)
    if bounds is None or bounds[0] > 0 or bounds[1] < 0:
        return notes[0] if op == "identity" else None
    if isinstance(notes[0], Accumulator):
        return notes[0]
    return replace(notes[0], low=max(notes[0].low, bounds[0]), high=min(notes[0].high, bounds[1]))
