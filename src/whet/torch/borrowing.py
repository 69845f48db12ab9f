"""A copy that begins in the memory of its original, and functions that read weights with some of their positions at zero.

A removal makes new, smaller tensors and writes into none, so that a whole copy of what leaves need never be made. `silence`
answers the question behind the oracle, what the model gives without some channels, without writing either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from whet.torch.interception import function_name, map_tensors
from whet.torch.model import copy

Zeros = Sequence[tuple[int, Any]]  # (axis, positions as a tensor) of one tensor


def borrow(model: Any) -> Any:
    """A copy of `model` whose parameters lie in the memory of the original's: `own` it before anything writes into them.

    Buffers are copied, and parameters that a forward pass may write into itself: of embeddings with `max_norm`.

    Raises:
        ModelError: something in the model cannot be copied.
    """
    written = {id(p) for m in model.modules() if getattr(m, "max_norm", None) for p in m.parameters(recurse=False)}
    lent = (p for p in model.parameters() if type(p) is torch.nn.Parameter and id(p) not in written)
    return copy(model, {id(p): torch.nn.Parameter(p.data, p.requires_grad) for p in lent})


def own(model: Any, lender: Any) -> None:
    """*In place*: what still lies in the memory of `lender`'s tensors moves into memory of its own."""
    lent = {_memory(tensor) for tensor in (*lender.parameters(), *lender.buffers()) if tensor.numel()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel() and _memory(tensor) in lent:
            tensor.data = tensor.data.clone()


def _memory(tensor: Any) -> tuple[Any, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


class Silence(TorchFunctionMode):  # type: ignore[misc]  # torch is Any to the type checker
    """While it is open, torch's functions get these tensors with the given positions at zero, one at a time.

    The tensors stay as they are. Code that torch's modes do not see, such as a scripted function, reads them as they are too.
    """

    def __init__(self, zeros: Mapping[int, tuple[Any, Zeros]]) -> None:
        """zeros: by the id of a tensor the tensor and its positions."""
        super().__init__()
        self._zeros = zeros

    def _silent(self, tensor: Any) -> Any:
        found = self._zeros.get(id(tensor))
        return tensor if found is None else zeroed(tensor, found[1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_name(func) is None:  # what it asks needs no values
            return func(*args, **kwargs)
        return func(*map_tensors(tuple(args), self._silent), **map_tensors(dict(kwargs), self._silent))


def zeroed(tensor: Any, zeros: Zeros) -> Any:
    """A copy of `tensor` with zeros at these positions of its axes."""
    made = tensor.detach().clone()
    for axis, positions in zeros:
        made.index_fill_(axis, positions, 0.0)
    return made
