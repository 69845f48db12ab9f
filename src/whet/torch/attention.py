"""What attention layers compute, seen from outside: queries, keys and values of a named module, while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from whet.numerics.losses_attention import Attention

_FORBIDDEN = -1e4  # an additive mask below says that a query may not look there
Hear = Callable[[Attention], None]


def hear_attention(module: Any, hear: Hear) -> list[Any]:
    """Hooks that call `hear` with what `module` computes: it is an `nn.MultiheadAttention`, or calls torch's
    `scaled_dot_product_attention` somewhere inside (as Hugging Face's models do); the last call counts."""
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
    """Sees every call of `scaled_dot_product_attention` while it is entered."""

    def __init__(self, hear: Hear) -> None:
        super().__init__()
        self._hear = hear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            self._hear(_of_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


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
