"""What attention layers compute, seen from outside: queries, keys and values of a named module, while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from whet.numerics.losses_attention import Attention

_FORBIDDEN = -1e4  # an additive mask below says that a query may not look there
Hear = Callable[[Attention], None]


def hear_attention(module: Any, hear: Hear) -> list[Any]:
    """Hooks that call `hear` with what `module` computes: it is an `nn.MultiheadAttention`, or somewhere inside calls torch's
    `scaled_dot_product_attention`, or multiplies, takes a softmax and multiplies (as Hugging Face's models do, the latter
    with `attn_implementation="eager"`); the last call counts."""
    if isinstance(module, nn.MultiheadAttention):
        return [
            module.register_forward_hook(lambda own, args, kwargs, _: hear(_of_module(own, args, kwargs)), with_kwargs=True)
        ]
    watches: list[_Watch] = []

    def enter(own: Any, args: Any) -> None:
        watches.append(_Watch(hear))
        watches[-1].__enter__()

    def leave(own: Any, args: Any, outputs: Any) -> None:
        watches.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Torch's fused encoder layers are off while the block runs: they call none of their modules, and no hook either."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Watch(TorchFunctionMode):  # type: ignore[misc]  # torch is Any to the type checker
    """Sees every attention while it is entered: `scaled_dot_product_attention`, and what is written out in products."""

    def __init__(self, hear: Hear) -> None:
        super().__init__()
        self._hear = hear
        self._scores: dict[int, _Scores] = {}  # by the id of the tensor, which they hold

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            self._hear(_of_call(*args, **(kwargs or {})))
        elif isinstance(result, torch.Tensor) and result.ndim == 4 and args:
            self._follow(getattr(func, "__name__", "").strip("_"), result, args, kwargs or {})
        return result

    def _follow(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """From `q·kᵀ` through scale, mask, softmax and dropout to the product with the values."""
        first, second = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mask"))
        known = self._scores.get(id(first))
        if known is None or known.tensor is not first:
            if name == "matmul" and isinstance(second, torch.Tensor) and second.ndim == 4:
                self._scores[id(result)] = _Scores(result, first, second.transpose(-1, -2))
            return
        if name == "matmul" and known.is_softmax and isinstance(second, torch.Tensor) and second.ndim == 4:
            self._hear(Attention(known.query, known.key, second, known.allowed, known.scale))
        elif not known.is_softmax and (found := known.changed(name, second)) is not None:
            self._scores[id(result)] = replace(found, tensor=result)
        elif name in _KEEPS or (name == "softmax" and not known.is_softmax):
            self._scores[id(result)] = replace(known, tensor=result, is_softmax=known.is_softmax or name == "softmax")


_KEEPS = frozenset({"dropout", "to", "type_as", "float", "half", "bfloat16", "contiguous", "clone"})
_PRODUCTS = {"mul": 1, "rmul": 1, "multiply": 1, "imul": 1, "div": -1, "truediv": -1, "divide": -1, "itruediv": -1}
_SUMS = frozenset({"add", "radd", "iadd"})


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """A tensor of scores (n, h, l, l), or of their softmax, on the way through a module."""

    tensor: Any
    query: Any
    key: Any
    scale: float = 1.0
    allowed: Any = None
    is_softmax: bool = False

    def changed(self, name: str, other: Any) -> _Scores | None:
        """These scores scaled or masked; None where the operation does neither."""
        if name in _PRODUCTS and (not isinstance(other, torch.Tensor) or other.numel() == 1):
            return replace(self, scale=self.scale * float(other) ** _PRODUCTS[name])
        if name in _SUMS and isinstance(other, torch.Tensor):
            return self._where(other > _FORBIDDEN)
        if name == "masked_fill" and isinstance(other, torch.Tensor):
            return self._where(~other)
        return None

    def _where(self, allowed: Any) -> _Scores:
        allowed = allowed[(None,) * (4 - allowed.ndim)]
        return replace(self, allowed=allowed if self.allowed is None else self.allowed & allowed)


def _of_call(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Attention:
    """The arguments of torch's function; its boolean masks are True where a query may look."""
    allowed = None
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > _FORBIDDEN
        allowed = allowed[(None,) * (4 - allowed.ndim)]
    elif is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()[None, None]
    return Attention(query, key, value, allowed, scale)


def _of_module(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attention:
    """What an `nn.MultiheadAttention` projects its inputs to, computed anew; its boolean masks are True where not to look."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    inputs = [given[name] if module.batch_first else given[name].transpose(0, 1) for name in names[:3]]
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    heads = module.num_heads
    query, key, value = (
        functional.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    allowed = _allowed(given.get("attn_mask"), given.get("key_padding_mask"), heads)
    return Attention(query, key, value, allowed, 1 / math.sqrt(query.shape[-1]))


def _allowed(mask: Any, padding: Any, heads: int) -> Any:
    """Booleans that broadcast to (n, heads, l, l); None where every query may look everywhere."""
    found = None
    for given, is_padding in ((mask, False), (padding, True)):
        if given is None:
            continue
        may = ~given if given.dtype == torch.bool else given > _FORBIDDEN
        if is_padding:
            may = may[:, None, None, :]
        elif may.ndim == 2:
            may = may[None, None]
        else:  # (n · heads, l, l)
            may = may.unflatten(0, (-1, heads))
        found = may if found is None else found & may
    return found
