"""Processes that train one model together: each takes its rows of every batch, and gradients are added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from whet.data import primary


class Processes:
    """The processes of `torch.distributed`; one where it is not initialized.

    Every process reads the same batches and takes each `count`-th row from its `rank` on. Losses are means over rows, so with
    `share`, a process' part of the rows, the sum of their gradients is the gradient of the whole batch: data parallelism that
    gives what one process gives, but for rounding and batch norm's statistics, which are each process' own within an epoch.
    """

    def __init__(self) -> None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if together else 0
        self.count = torch.distributed.get_world_size() if together else 1

    def own(self, inputs: Any, targets: Any) -> tuple[Any, Any, float]:
        """This process' rows of a batch of arrays, and their share of all; where there is no row for it, one with share 0."""
        if self.count == 1:
            return inputs, targets, 1.0
        rows = len(primary(inputs))
        own = len(range(self.rank, rows, self.count))
        taken = slice(self.rank, None, self.count) if own else slice(0, 1)
        return _rows(inputs, taken), _rows(targets, taken), own / rows

    def total(self, value: float) -> float:
        """The sum over the processes."""
        if self.count == 1:
            return value
        there = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        found = torch.tensor([value], dtype=torch.float64, device=there)
        torch.distributed.all_reduce(found)
        return float(found)

    def add_gradients(self, parameters: Iterable[Any]) -> None:
        """*In place*: gradients become their sum over the processes; a parameter that one of them did not use counts as 0."""
        if self.count == 1:
            return
        for parameter in parameters:
            if hasattr(parameter, "full_tensor"):  # sharded: added up already
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def agree(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """*In place*: all begin with the first process' weights."""
        if self.count > 1:
            for _, tensor in tensors:
                torch.distributed.broadcast(tensor.data, 0)

    def mean(self, buffers: Iterable[Any]) -> None:
        """*In place*: floating-point buffers become their mean over the processes, others those of the first."""
        if self.count == 1:
            return
        for buffer in buffers:
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer.data)
                buffer.data.div_(self.count)
            else:
                torch.distributed.broadcast(buffer.data, 0)


def _rows(value: Any, taken: slice) -> Any:
    if isinstance(value, dict):
        return {key: _rows(item, taken) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(item, taken) for item in value)
    return value[taken] if isinstance(value, np.ndarray) else value
