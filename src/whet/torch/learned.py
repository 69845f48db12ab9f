"""Rounding that trains: straight-through gradients, and scales that are learned (LSQ) or observed.

`y = s · clip(round(x / s), low, high)` has the gradients of Esser et al. 2020 (arXiv:1902.08153, eq. 3 and 5):

    ∂y/∂x = 1 inside the range, else 0;     ∂y/∂s = round(x/s) − x/s inside the range, else low or high,

and the gradient of `s` is multiplied by `g = 1 / √(N · high)`, N being the values of one example that share the scale (§2.2).

A trained scale is `base · factor`: `base` is what it began with and `factor`, which trains, begins at 1. A step of SGD moves
the scale exactly as it would move a scale that is trained itself (the gradient of `factor` is `g · ∂/∂s / base`); Adam, whose
steps have the size of the learning rate whatever the gradient, moves it by a fraction of itself, not by a fixed amount.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

Tensor = Any

TINY = 2.0**-40  # a scale below it belongs to a channel of zeros, and is not trained
LEAST_FACTOR = 2.0**-6  # a trained scale stays above this part of where it began
_EDGE = 1e-6  # hardtanh's gradient is 0 at its ends, a clip's is 1


@dataclass(frozen=True, slots=True)
class Lattice:
    """low, high: the ends of the codes, less the zero point where that is one number. rate: g of a learned scale; 0 where it
    does not train yet. groups: (axis, size) of groups of values that share a scale, whose scales are repeated along that
    axis; None where scales broadcast."""

    low: float
    high: float
    rate: float = 1.0
    groups: tuple[int, int] | None = None


def rate_of(count: int, high: float) -> float:
    """LSQ's `g = 1 / √(count · high)`."""
    return 1.0 / math.sqrt(max(count, 1) * max(high, 1.0))


def scale_of(base: Tensor, factor: Tensor | None) -> Tensor:
    """The scale as it now is, in float32."""
    base = base.detach().float()
    return base if factor is None else base * factor.detach().float().clamp_min(LEAST_FACTOR)


class RoundThrough(torch.autograd.Function):  # type: ignore[misc]  # torch is Any to the type checker
    """`s · clip(round(x / s), low, high)`, `s = base · factor`, where `mask`, else 0; see the module for its gradients.

    One operation to autograd whatever it is given, so that recomputed passes (checkpointing) save the same tensors. Backward
    reads x alone, since the caller may change y in place (`y += x`): with codes q less the zero point,
    `∂/∂s = Σ g q − Σ (g inside) x / s`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, factor: Tensor | None, zero: Tensor | None, mask: Tensor | None, lattice: Lattice
    ) -> Tensor:
        """x in float32; base, factor and zero (points) broadcast against it, or hold one number for each group."""
        scale = _spread(scale_of(base, factor), x.shape, lattice.groups)
        kept = x if mask is None else torch.where(mask, x, torch.zeros_like(x))
        y = kept / scale
        y.round_().clamp_(*_ends(zero, x.shape, lattice)).mul_(scale)
        ctx.lattice = lattice
        ctx.save_for_backward(x, base, factor, zero, mask)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x and factor."""
        x, base, factor, zero, mask = ctx.saved_tensors
        lattice: Lattice = ctx.lattice
        small = scale_of(base, factor)
        into_x = _inside(grad, x, small, zero, lattice)
        if mask is not None:
            into_x = torch.where(mask, into_x, torch.zeros_like(into_x))
        if factor is None or not ctx.needs_input_grad[2]:
            return into_x, None, None, None, None, None
        kept = x if mask is None else torch.where(mask, x, torch.zeros_like(x))
        codes = kept / _spread(small, x.shape, lattice.groups)
        codes.round_().clamp_(*_ends(zero, x.shape, lattice))
        by_scale = _summed(grad, codes, base, lattice) - _summed(into_x, x, base, lattice) / small
        free = (base > TINY) & ((factor > LEAST_FACTOR) | (by_scale < 0))  # at its floor it may only grow
        into_factor = torch.where(free, by_scale * lattice.rate / base.float(), torch.zeros_like(by_scale))
        return into_x, None, into_factor.to(factor.dtype), None, None, None


def _ends(zero: Tensor | None, shape: Any, lattice: Lattice) -> tuple[Any, Any]:
    """The ends of the codes less the zero point."""
    if zero is None:
        return lattice.low, lattice.high
    zero = _spread(zero, shape, lattice.groups)
    return lattice.low - zero, lattice.high - zero


def _inside(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, lattice: Lattice) -> Tensor:
    """`grad` where x lies in the range, else 0."""
    low, high = _ends(zero, x.shape, lattice)
    if scale.numel() == 1 and zero is None and x.device.type == "cpu":  # one pass over memory
        step = float(scale)
        return torch.ops.aten.hardtanh_backward(
            grad, x, (low * (1 + _EDGE) - _EDGE) * step, (high * (1 + _EDGE) + _EDGE) * step
        )
    v = x / _spread(scale, x.shape, lattice.groups)
    return torch.where((v >= low) & (v <= high), grad, torch.zeros_like(grad))


def _summed(a: Tensor, b: Tensor, base: Tensor, lattice: Lattice) -> Tensor:
    """`Σ a · b` over the values of each scale, in the shape of `base`."""
    if base.numel() == 1:
        flat = a.is_contiguous() and b.is_contiguous()
        return (torch.dot(a.view(-1), b.view(-1)) if flat else (a * b).sum()).reshape(base.shape)
    terms = a * b
    if lattice.groups is not None:
        along, size = lattice.groups
        short = -terms.shape[along] % size
        terms = torch.nn.functional.pad(terms.movedim(along, -1), (0, short)).unflatten(-1, (-1, size)).sum(-1)
        terms = terms.movedim(-1, along)
    return terms.sum_to_size(base.shape)


def _spread(scale: Tensor, shape: Any, groups: tuple[int, int] | None) -> Tensor:
    """Scales of groups repeated along their axis; one scale alone without dimensions."""
    if groups is None:
        return scale.reshape(()) if scale.numel() == 1 else scale
    along, size = groups
    return torch.repeat_interleave(scale, size, dim=along).narrow(along, 0, shape[along])
