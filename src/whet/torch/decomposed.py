"""The export operators `quantized_decomposed.*`: the one place that imports them."""

from __future__ import annotations

from typing import Any

import torch

from whet.errors import MissingExtraError

try:
    import torch.ao.quantization.fx._decomposed
except ImportError as cause:  # pragma: no cover - depends on the installed torch
    raise MissingExtraError(
        f"torch {torch.__version__} does not bring the operators quantized_decomposed.* that quantized models are exported "
        "with (they were in torch.ao.quantization.fx._decomposed). Install torch 2.13: pip install 'whet[torch]'"
    ) from cause

Tensor = Any
_operators = torch.ops.quantized_decomposed


def quantize_dequantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: Any) -> Tensor:
    """`x` as codes of `dtype` in [low, high] and back."""
    codes = _operators.quantize_per_tensor(x, scale, zero_point, low, high, dtype)
    return _operators.dequantize_per_tensor(codes, scale, zero_point, low, high, dtype)


def dequantize(codes: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Symmetric `codes` times `scale`: a number (axis None), or one for each index of `axis`."""
    low, high = torch.iinfo(codes.dtype).min, torch.iinfo(codes.dtype).max
    if axis is None:
        return _operators.dequantize_per_tensor(codes, scale, 0, low, high, codes.dtype)
    return _operators.dequantize_per_channel(codes, scale, None, axis, low, high, codes.dtype)
